"""Losses that are no numbers or explode: steps are skipped, then the run stops or goes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from declip.engine import Safety
from declip.errors import Diverged, InputError
from declip.objectives.contrastive import Contrastive
from declip.optimization import Optimizer
from declip.recipe import Recipe
from declip.training import guard as guard_module
from declip.training import loop
from declip.training.checkpoint import checkpoints
from declip.training.gradients import LossScale
from declip.training.guard import Guard
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.optimizer import build_optimizer

UNSCALED = LossScale(torch.device("cpu"), moves=False)
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[int], bool], value: float) -> None:
    """The contrastive loss times `value`, wherever the number of its computation, from 1, is to be spoilt."""
    forward, steps = Contrastive.forward, iter(range(1, 10_000))

    def spoiling(self: Contrastive, features: Any, batch: Any) -> torch.Tensor:
        loss = forward(self, features, batch)
        return loss * value if spoilt(next(steps)) else loss

    monkeypatch.setattr(Contrastive, "forward", spoiling)


def stopped(recipe: Recipe, out: Path) -> str:
    with pytest.raises(InputError) as error:
        train(recipe, out, quiet=True)
    assert not (out / "open_clip_model.safetensors").exists()
    return str(error.value)


def assert_good_weights(out: Path, step: int) -> None:
    state = torch.load(checkpoints(out)[0], weights_only=True)
    assert state["progress"]["step"] == step
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    best = out / "checkpoints" / "best.safetensors"
    assert best.exists() == (step > 0)
    if best.exists():
        assert all(tensor.isfinite().all() for tensor in load_file(best).values())


# The limit


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_no_number(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil_loss(monkeypatch, lambda step: step == 6, value)
    says = stopped(tiny("declip", "engine.skip_limit=0"), tmp_path / "out")
    assert "The loss is not a number at step 6 (term contrastive): the last good weights are kept in" in says
    assert "lower optimizer.lr (now 0.001) or look at the pairs." in says
    assert_good_weights(tmp_path / "out", 4)


def test_gradient_that_is_no_number(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, steps = Contrastive.forward, iter(range(1, 1000))

    def spoilt(self: Contrastive, features: Any, batch: Any) -> torch.Tensor:
        loss = forward(self, features, batch)
        return loss + (loss - loss.detach()).sqrt() if next(steps) == 3 else loss  # sqrt has no slope at 0

    monkeypatch.setattr(Contrastive, "forward", spoilt)
    says = stopped(tiny("clip", "engine.skip_limit=0", "optimizer.clip_norm=0"), tmp_path / "out")
    assert "The gradient of the loss is not a number at step 3 (term contrastive)" in says
    assert_good_weights(tmp_path / "out", 2)


@pytest.mark.parametrize("rate", ["1e20", "1e39"])
@pytest.mark.parametrize(
    ("every", "says"), [("0.1", "The model's output is not a number after step 1"), ("1", "at step 2 (term contra")]
)
def test_absurd_learning_rate(tiny: MakeRecipe, tmp_path: Path, rate: str, every: str, says: str) -> None:
    """The first step spoils the weights; they are neither judged the best nor saved over the good ones."""
    options = f"optimizer.lr={rate}", f"evaluation.every={every}", "optimizer.clip_norm=0", "engine.skip_limit=0"
    assert says in stopped(tiny("clip", *options), tmp_path / "out")
    assert_good_weights(tmp_path / "out", 0)


def test_weights_spoilt_by_the_last_step(tiny: MakeRecipe, tmp_path: Path) -> None:
    """There is no next loss that would tell; without held-out pairs the weights themselves do."""
    for holdout in ("0.2", "0"):
        options = "optimizer.lr=1e39", "schedule.pairs_seen=8", f"data.holdout={holdout}"
        says = stopped(tiny("clip", *options), tmp_path / holdout)
        assert "The model's output is not a number after step 1" in says
        assert_good_weights(tmp_path / holdout, 0)


def test_more_than_the_limit(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, lambda step: step % 2 == 0, math.nan)
    says = stopped(tiny("clip", "engine.skip_limit=2"), tmp_path / "out")
    assert "at step 6 (term contrastive), and 3 of the last 100 steps were skipped, more than engine.skip_limit" in says


# Skipped steps


def test_a_skipped_step_leaves_no_trace(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not in the queue, batch norm's statistics, momentum or weights; and it is counted, said, and a row."""
    states: dict[int, dict[str, Any]] = {}
    step = Guard.step

    def noting(guard: Guard, number: int, *arguments: Any) -> str | None:
        reason = step(guard, number, *arguments)
        tensors = [*guard.buffers, *(p for group in guard.optimizer.param_groups for p in group["params"])]
        tensors += [x for state in guard.optimizer.state.values() for x in state.values()]
        states[number] = {"all": [tensor.detach().clone() for tensor in tensors]}
        return reason

    monkeypatch.setattr(Guard, "step", noting)
    spoil_loss(monkeypatch, lambda number: number in (3, 4), math.nan)
    summary = train(tiny("declip"), tmp_path / "out")
    assert (summary["steps"], summary["skipped"], summary["roll_backs"]) == (8, 2, 0)
    for one, other, same in ((1, 2, False), (2, 3, True), (3, 4, True), (4, 5, False)):
        equal = [torch.equal(x, y) for x, y in zip(states[one]["all"], states[other]["all"], strict=True)]
        assert all(equal) == same
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("skipped: The loss is not a number at step") == 2
    rows = [row for row in read_metrics(tmp_path / "out") if "loss" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False, False, False]


def test_explosion(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, lambda step: step in (4, 7), 50.0)
    assert train(tiny(), tmp_path / "out", quiet=True)["skipped"] == 2


def test_explosion_in_words(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, lambda step: step == 4, 50.0)
    says = stopped(tiny("clip", "engine.skip_limit=0"), tmp_path / "out")
    assert " at step 4 is more than engine.explosion = 5 above its average of 2." in says


def test_explosions_allowed(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, lambda step: step == 4, 50.0)
    assert train(tiny("clip", "engine.explosion=0"), tmp_path / "out", quiet=True)["skipped"] == 0


def test_skipped_steps_and_resuming(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count, the average of losses and the weights are those of the undisturbed run."""
    for name in ("whole", "stopped"):
        with monkeypatch.context() as patch:
            spoil_loss(patch, lambda step: step in (2, 5), math.nan)
            if name == "stopped":  # the first save of step 4 is the last thing it does
                patch.setattr(loop.Run, "has_stopped_rising", lambda run: run.step >= 4)
                train(tiny("declip"), tmp_path / name, quiet=True)
            else:
                train(tiny("declip"), tmp_path / name, quiet=True)
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda step: step == 1, math.nan)
        assert train(tiny("declip"), tmp_path / "stopped", resume=True, quiet=True)["skipped"] == 2
    states = [torch.load(checkpoints(tmp_path / name)[0]) for name in ("whole", "stopped")]
    for part in ("model", "objective", "guard"):
        for name, value in states[0][part].items():
            same = (
                torch.equal(value, states[1][part][name]) if torch.is_tensor(value) else value == states[1][part][name]
            )
            assert same, name


# On a device that is not waited for


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_steps_on_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does, done by the CPU: the optimizer is told on the device, and the same comes out."""
    ends = []
    for on_device in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        optimizer = build_optimizer([model], Optimizer(kind=kind, lr=0.1))
        guard = Guard([model], optimizer, Safety(skip_limit=5), UNSCALED)
        monkeypatch.setattr(guard_module, "_waits", lambda tensor, on_device=on_device: not on_device)
        said = []
        for step in range(1, 9):
            guard.before_forward()
            loss = model(torch.randn(6, 4)).square().mean() * (math.nan if step in (1, 3, 4, 8) else 1)
            guard.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
            said.append(guard.step(step, loss, norm, {"term": loss}))
        said.append(guard.read(8))
        assert [reason is not None for reason in said] == (
            [False, True, False, True, True, False, False, False, True]
            if on_device
            else [True, False, True, True, False, False, False, True, False]
        )
        assert all(f"at step {step} " in reason for step, reason in zip((1, 3, 4, 8), filter(None, said), strict=True))
        ends.append((guard.recent, guard.skipped, [*guard.state().values()][:2], model.state_dict()))
    assert ends[0][:2] == ends[1][:2] == ([1, 3, 4, 8], 4)
    torch.testing.assert_close(ends[0][2:], ends[1][2:], rtol=0, atol=0)


def test_skipped_steps_long_ago_do_not_count() -> None:
    model = nn.Linear(2, 2)
    guard = Guard([model], torch.optim.AdamW(model.parameters(), fused=True), Safety(skip_limit=1), UNSCALED)
    loss, bad = torch.tensor(1.0), torch.tensor(math.nan)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(1, 302):
        assert bool(guard.step(step, bad if step % 100 == 1 else loss, loss, {"term": loss})) == (step % 100 == 1)
    with pytest.raises(Diverged, match=r"2 of the last 100 steps"):
        guard.step(302, bad, loss, {"term": loss})


# Going back


def test_going_back(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_loss(monkeypatch, lambda step: step in (5, 6), math.nan)
    recipe = tiny("declip", "engine.on_divergence=roll_back", "engine.skip_limit=1")
    summary = train(recipe, tmp_path / "out")
    assert (summary["steps"], summary["roll_backs"], summary["skipped"]) == (8, 1, 0)
    rows = [row for row in read_metrics(tmp_path / "out") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    rates = [loop.learning_rate(step, 8, recipe) for step in range(8)]
    assert [row["lr"] for row in rows] == pytest.approx(rates[:4] + [rate / 2 for rate in rates[4:]])
    said = " ".join(capsys.readouterr().err.split())
    assert "were skipped, more than engine.skip_limit = 1: back to step 4 with 0.5 of the learning rate." in said


def test_going_back_further_and_giving_up(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that a run diverges from again is not good: the one before is taken."""
    spoil_loss(monkeypatch, lambda step: step >= 6, math.nan)
    to: list[int] = []
    restore = loop.Run.restore

    def noting(run: loop.Run, state: dict[str, Any]) -> None:
        restore(run, state)
        to.append(run.step)

    monkeypatch.setattr(loop.Run, "restore", noting)
    recipe = tiny("clip", "engine.on_divergence=roll_back", "engine.skip_limit=0", "engine.roll_backs=3")
    says = stopped(recipe, tmp_path / "out")
    assert "The loss is not a number at step 3 (term contrastive) after 3 goings back: the last good" in says
    assert to == [4, 2, 2]
    assert_good_weights(tmp_path / "out", 2)
