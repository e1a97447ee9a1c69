"""A run with a constant rate goes on for longer, as if it had always been meant to; the moving average of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopping import stop_at

from declip.errors import InputError
from declip.recipe import Recipe, load_recipe
from declip.training import loop
from declip.training.checkpoint import checkpoints, step_of
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.run import Run

MakeRecipe = Callable[..., Recipe]
CONSTANT = ("schedule.shape=constant", "schedule.warmup_pairs=16", "schedule.cooldown=0.25", "optimizer.ema=0.5")
RESNET = ("model.image.layers=[1,1,1,1]", "model.image.width=8", "model.image.image_size=32")
LONGER = "schedule.pairs_seen=128"


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def last(run: Path) -> Any:
    return torch.load(checkpoints(run)[0], weights_only=True)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: x for key, item in items for name, x in flat(item, f"{path}.{key}").items()}
    return {path: value}


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, heads, optimizer, average and losses are the same, bit by bit."""
    states = [flat({p: last(run)[p] for p in ("model", "objective", "optimizer", "average")}) for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        same = torch.equal(value, states[1][name]) if isinstance(value, torch.Tensor) else value == states[1][name]
        assert same, name
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row] for run in (one, other)]
    assert losses[0] == losses[1]


def test_a_finished_run_is_prolonged(tiny: MakeRecipe, tmp_path: Path) -> None:
    """8 steps, of them 2 of cool-down, then 16: from the checkpoint before the cool-down, which is always kept."""
    recipe = tiny("declip", *CONSTANT, "engine.keep=1", "evaluation.every=1")
    train(recipe, tmp_path / "run", quiet=True)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [8, 6]
    summary = train(
        tiny("declip", *CONSTANT, "evaluation.every=1", "engine.keep=1", LONGER), tmp_path / "run", True, True
    )
    assert (summary["steps"], summary["pairs_seen"]) == (16, 128)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [16, 12]
    assert load_recipe(tmp_path / "run" / "recipe.toml").schedule.pairs_seen == 128
    train(tiny("declip", *CONSTANT, "evaluation.every=1", "engine.keep=1", LONGER), tmp_path / "whole", quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    finished = [load_file(tmp_path / run / "open_clip_model.safetensors") for run in ("run", "whole")]
    for name, tensor in finished[0].items():
        assert torch.equal(tensor, finished[1][name]), name


def test_a_stopped_run_is_prolonged(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the step it was stopped at; its warm-up was a share of the shorter run."""
    own = [option for option in CONSTANT if "warmup" not in option]
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(tiny("clip", *own, "schedule.warmup=0.25"), tmp_path / "run", quiet=True)
    train(tiny("clip", *CONSTANT, LONGER), tmp_path / "run", resume=True, quiet=True)
    train(tiny("clip", *CONSTANT, LONGER), tmp_path / "whole", quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_what_cannot_be_prolonged_stays_as_it_is(tiny: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(), run, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        train(tiny("clip", LONGER), run, resume=True, quiet=True)
    assert "was trained with another schedule (schedule.pairs_seen = 64 there, 128 now), under which" in str(
        error.value
    )
    with pytest.raises(InputError, match=r"another recipe \(schedule.batch_size = 8 there, 4 now\)"):
        train(tiny("clip", "schedule.batch_size=4"), run, resume=True, quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_best_of_a_cooldown_that_is_taken_back_is_forgotten(tiny: MakeRecipe, tmp_path: Path) -> None:
    """Its weights would be in the folder with no step of the run that has them."""
    run, options = tmp_path / "run", (*CONSTANT, "evaluation.every=1")
    train(tiny("clip", *options), run, quiet=True)
    best = load_file(run / "checkpoints" / "best.safetensors")
    summary = train(tiny("clip", *options, LONGER), run, resume=True, quiet=True)
    assert summary["best_step"] == 16
    finished = load_file(run / "open_clip_model.safetensors")
    assert any(not torch.equal(tensor, best[name]) for name, tensor in finished.items())


# The moving average


def test_the_average_is_judged_and_finished(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the weights after every step, by plain arithmetic; training itself goes on without it."""
    weights: list[torch.Tensor] = []
    end_step, judged = Run.end_step, []

    def noting(run: Run) -> None:
        if not weights:
            weights.append(before[0])
        end_step(run)
        weights.append(run.model.clip.visual.proj.detach().clone())

    real_init = Run.__init__

    def starting(run: Run, *arguments: Any) -> None:
        real_init(run, *arguments)
        before.append(run.model.clip.visual.proj.detach().clone())
        score = run.held_out.score  # type: ignore[union-attr]

        def scoring(model: Any, *rest: Any) -> Any:
            judged.append(model.clip.visual.proj.detach().clone())
            return score(model, *rest)

        run.held_out.score = scoring  # type: ignore[union-attr, method-assign]

    before: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_step", noting)
        patch.setattr(Run, "__init__", starting)
        train(tiny("clip", "optimizer.ema=0.3", "evaluation.every=1"), tmp_path / "run", quiet=True)
    average = weights[0].double()
    for update, weight in enumerate(weights[1:], 1):
        decay = min(0.3, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weight.double()
    finished = load_file(tmp_path / "run" / "open_clip_model.safetensors")["visual.proj"]
    torch.testing.assert_close(finished.double(), average, rtol=1e-5, atol=1e-7)
    assert torch.equal(judged[0], finished)
    train(tiny("clip", "evaluation.every=1"), tmp_path / "plain", quiet=True)
    assert torch.equal(last(tmp_path / "plain")["model"]["clip.visual.proj"], weights[-1])
    assert torch.equal(last(tmp_path / "run")["model"]["clip.visual.proj"], weights[-1])


def assert_stopped_run_goes_on(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stopped`, after five steps and resumed, ends as `whole` does."""
    train(recipe, folder / "whole", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder / "stopped", quiet=True)
    train(recipe, folder / "stopped", resume=True, quiet=True)
    assert_same_end(folder / "stopped", folder / "whole")


def test_muon_goes_on(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its momentum and that of its Adam are one state."""
    recipe = tiny("declip", "optimizer.kind=muon", "optimizer.lr=0.002", *RESNET)
    assert_stopped_run_goes_on(recipe, tmp_path, monkeypatch)


def test_the_average_goes_on(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("declip", "optimizer.ema=0.9", "optimizer.layer_decay=0.7", "optimizer.head_lr=0.002")
    assert_stopped_run_goes_on(recipe, tmp_path, monkeypatch)
    for name in ("open_clip_model.safetensors", "declip_heads.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert last(tmp_path / "whole")["average"]["updates"] == 8
