"""The heads of a run's terms, apart from the towers: written beside a finished model, and taken up from one."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from declip.model.dual_encoder import DualEncoder
from declip.model.export import FinishedModel, load_strictly
from declip.objectives.objective import Objective

LEFT_OUT = ("nearest_neighbour.",)  # a queue of captions seen, nothing learnt


def heads_of(model: DualEncoder, objective: Objective) -> dict[str, Tensor]:
    """What the terms have learnt, by term, and the mask embedding."""
    heads = {name: t for name, t in objective.terms.state_dict().items() if not name.startswith(LEFT_OUT)}
    if model.mask_embedding is not None:
        heads["mask_embedding"] = model.mask_embedding.detach()
    return heads


def take_heads(finished: FinishedModel, where: str, model: DualEncoder, objective: Objective) -> None:
    """Load the heads that the run's terms share with a model that it starts from.

    A head that is not there, or that chooses among other words, starts anew, and a line on stderr says so.
    Raises InputError where one is of another shape.
    """
    for name, term in objective.terms.items():
        own = finished.head(name)
        if own and not _of_other_words(term, own):
            load_strictly(term, own, f"{where}: {name}")
        elif any(True for _ in term.parameters()):
            print(f"{where} has no head for {name} that fits, it starts anew.", file=sys.stderr)
    if model.mask_embedding is not None and "mask_embedding" in finished.heads:
        with torch.no_grad():
            model.mask_embedding.copy_(finished.heads["mask_embedding"])


def _of_other_words(term: nn.Module, own: dict[str, Tensor]) -> bool:
    """Whether a head chooses among other words: those of the captions that it was trained on (vocabulary=used)."""
    here, there = getattr(term, "index", None), own.get("index")
    if here is None or there is None:
        return here is not there
    return not torch.equal(here, there)
