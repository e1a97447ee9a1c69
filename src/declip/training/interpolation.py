"""Weights between those a run started from and those it ended with: what was known is kept, what was learnt stays.

WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): of straight mixtures of both, the one is taken that does best on the
held-out pairs. It costs a few held-out scores after training, and nothing in use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from declip.files import save_weights
from declip.model.export import WEIGHTS, read_weights
from declip.training.run import Run

SHARES = tuple(step / 10 for step in range(11))


def interpolate(run: Run) -> dict[str, Any]:
    """Replace a finished run's towers by the best mixture; returns its share of trained weights, and every score.

    What did not start from weights (a projection that starts anew) is the trained one in each mixture. Of equal scores
    the mixture nearest to the start is taken.
    """
    assert run.held_out is not None
    first, trained = run.first, read_weights(run.out / WEIGHTS)
    scores = {}
    for share in SHARES:
        run.model.clip.load_state_dict(mixture(first, trained, share))
        scores[share] = round(run.held_out.score(run.model, run.device, run.token_wise)["score"], 3)
    best = max(SHARES, key=lambda share: (scores[share], -share))
    mixed = mixture(first, trained, best)
    run.model.clip.load_state_dict(mixed)
    if best < 1:
        save_weights(run.out / WEIGHTS, mixed)
    return {"trained_share": best, "scores_by_share": scores}


def mixture(first: dict[str, Tensor], trained: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """`share` of the trained weights, the rest of the first; what only one side has, and whole numbers, as trained."""
    return {
        name: first[name].to(tensor).lerp(tensor, share) if name in first and tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }
