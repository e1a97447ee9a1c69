"""Back to the start: mixtures of the weights there and at the end of a run, and decay towards them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import declip
from declip.errors import InputError
from declip.recipe import Recipe
from declip.training import interpolation
from declip.training.held_out import HeldOut

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def first(tiny: MakeRecipe, tmp_path: Path) -> Path:
    declip.train(tiny("clip"), tmp_path / "first", quiet=True)
    return tmp_path / "first"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "open_clip_model.safetensors")


def scored(monkeypatch: pytest.MonkeyPatch, best: float) -> list[float]:
    """Have mixtures scored by how near their share of trained weights is to `best`."""
    asked: list[float] = []
    mixture = interpolation.mixture

    def noted(*args: object) -> object:
        asked.append(args[2])  # type: ignore[arg-type]
        return mixture(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(interpolation, "mixture", noted)
    monkeypatch.setattr(HeldOut, "score", lambda *_: {"score": -abs(asked[-1] - best) if asked else 0.0, "error": 0.0})
    return asked


@pytest.mark.parametrize("best", [0.0, 0.3, 1.0])
def test_the_best_mixture_is_taken(
    best: float, first: Path, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"model.init={str(first)!r}", "optimizer.lr=0.01", "schedule.pairs_seen=24", "evaluation.every=1.0"]
    declip.train(tiny("clip", *asked), tmp_path / "plain", quiet=True)
    scored(monkeypatch, best)
    summary = declip.train(tiny("clip", *asked, "evaluation.interpolate=true"), tmp_path / "run", quiet=True)
    assert summary["trained_share"] == best
    assert summary["scores_by_share"].keys() == set(interpolation.SHARES)
    start, end = weights(first), weights(tmp_path / "plain")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, start[name].lerp(end[name], best), msg=name)
    declip.load(tmp_path / "run").encode_text(["a red cat"])


def test_what_starts_anew_is_the_trained_one(
    first: Path, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        f"model.image.init={str(first)!r}",
        "model.embed_dim=24",
        "optimizer.lr=0.01",
        "schedule.pairs_seen=24",
        "evaluation.every=1.0",
    ]
    declip.train(tiny("clip", *asked), tmp_path / "plain", quiet=True)
    scored(monkeypatch, 0.0)
    declip.train(tiny("clip", *asked, "evaluation.interpolate=true"), tmp_path / "run", quiet=True)
    start, end, found = weights(first), weights(tmp_path / "plain"), weights(tmp_path / "run")
    for name, tensor in found.items():
        kept = name.startswith("visual.") and name != "visual.proj"
        torch.testing.assert_close(tensor, (start if kept else end)[name], msg=name)


def test_statistics_of_a_tower_that_starts_at_random_are_the_trained_ones(
    first: Path, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resnet = "model.image={ image_size = 32, layers = [1, 1, 1, 1], width = 8, head_width = 32 }"
    asked = [resnet, f"model.text.init={str(first)!r}", "schedule.pairs_seen=24", "evaluation.every=1.0"]
    declip.train(tiny("clip", *asked), tmp_path / "plain", quiet=True)
    scored(monkeypatch, 0.0)
    declip.train(tiny("clip", *asked, "evaluation.interpolate=true"), tmp_path / "run", quiet=True)
    found, end = weights(tmp_path / "run"), weights(tmp_path / "plain")
    assert torch.equal(found["token_embedding.weight"], weights(first)["token_embedding.weight"])
    for name in [name for name in found if name.startswith("visual.")]:
        torch.testing.assert_close(found[name], end[name], msg=name)


def test_what_it_needs_is_said(first: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.interpolate goes back to model\.init, which is not set"):
        tiny("clip", "evaluation.interpolate=true")
    recipe = tiny("clip", f"model.init={str(first)!r}", "evaluation.interpolate=true", "data.holdout=0")
    with pytest.raises(InputError, match=r"evaluation\.interpolate needs held-out pairs"):
        declip.train(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_decay_towards_the_start_is_that_of_a_loop(first: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    """One parameter after the other, each step."""
    from declip.training import loop
    from declip.training.run import Run

    asked = [f"model.init={str(first)!r}", "optimizer.lr=0.01", "schedule.pairs_seen=24", "evaluation.every=1.0"]
    declip.train(tiny("clip", *asked, "optimizer.start_decay=5"), tmp_path / "ours", quiet=True)
    start = weights(first)
    end_step = Run.end_step

    def pulled(self: Run) -> None:
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, parameter in self.model.clip.named_parameters():
                parameter -= rates[id(parameter)] * 5 * (parameter - start[name])
        end_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "end_step", pulled)
        declip.train(tiny("clip", *asked), tmp_path / "loop", quiet=True)
    declip.train(tiny("clip", *asked), tmp_path / "free", quiet=True)
    ours, expected, free = (weights(tmp_path / name) for name in ("ours", "loop", "free"))
    for name, tensor in ours.items():
        if not name.endswith("in_proj_bias"):  # keys' biases have no gradient but rounding, which Adam makes large
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    far, near = (sum(float((w[n] - start[n]).square().sum()) for n in w) for w in (free, ours))
    assert near < 0.95 * far


def test_only_what_came_from_weights_is_held(first: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    from declip.training.loop import Ranks, set_up

    recipe = tiny("clip", f"model.image.init={str(first)!r}", "optimizer.start_decay=1", "model.text.tune=projection")
    run = set_up(recipe, tmp_path / "run", False, Ranks())
    assert run.anchor is not None
    held = {name for name, p in run.model.clip.named_parameters() if id(p) in run.anchor.start}
    assert held == {name for name, _ in run.model.clip.named_parameters() if name.startswith("visual.")}
