"""Runs in float16: the scale of the loss, the steps whose gradients overflow, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from declip.engine import Safety
from declip.errors import Diverged
from declip.ranks import ALONE
from declip.recipe import Recipe
from declip.training import gradients, loop
from declip.training import guard as guard_module
from declip.training.checkpoint import checkpoints
from declip.training.gradients import LossScale, clip_gradients
from declip.training.guard import Guard
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.step import autocast

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def test_the_scale_moves_as_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "INTERVAL", 3)
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs, ours = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(CPU, moves=True)
    scales = []
    for overflow in [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]:
        parameter.grad = torch.tensor([1.0, math.inf if overflow else 1.0])
        theirs.scale(torch.ones(()))
        theirs.unscale_(optimizer)
        theirs.update()
        ours.update(torch.tensor(bool(overflow)))
        assert float(ours.value) == theirs.get_scale()
        scales.append(theirs.get_scale())
    assert len(set(scales)) == 3


def test_small_gradients_do_not_vanish() -> None:
    torch.manual_seed(0)
    layers, rows = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(8, 16)
    found = {}
    for name, precision, moves in (("exact", "float32", False), ("lost", "float16", False), ("kept", "float16", True)):
        layers.zero_grad()
        scale = LossScale(CPU, moves)
        with autocast(CPU, precision):
            loss = layers(rows).float().square().mean() * 1e-6
        (loss * scale.value).backward()
        clip_gradients(list(layers.parameters()), math.inf, ALONE, scale)
        found[name] = torch.cat([p.grad.flatten() for p in layers.parameters() if p.grad is not None])
    assert (found["kept"] - found["exact"]).norm() < 5e-3 * found["exact"].norm()
    assert (found["lost"] - found["exact"]).norm() > 0.1 * found["exact"].norm()


@pytest.mark.parametrize("limit", [math.inf, 0.01])
def test_gradients_are_clipped_after_they_are_scaled_back(limit: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    scale = LossScale(CPU, moves=True)
    expected = [torch.randn(p.shape) for p in parameters]
    for parameter, gradient in zip(parameters, expected, strict=True):
        parameter.grad = gradient * scale.value
    norm = clip_gradients(parameters, limit, ALONE, scale)
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    for parameter, gradient in zip(others, expected, strict=True):
        parameter.grad = gradient
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(others, limit))
    torch.testing.assert_close([p.grad for p in parameters], [p.grad for p in others])


@pytest.mark.parametrize("on_device", [False, True])
def test_overflows_are_the_scales_own_doing_above_1(monkeypatch: pytest.MonkeyPatch, on_device: bool) -> None:
    """They are skipped and not counted; a gradient that does not even fit a scale of 1 is no number."""
    monkeypatch.setattr(guard_module, "_waits", lambda tensor: not on_device)
    monkeypatch.setattr(gradients, "START", 4.0)
    model = nn.Linear(2, 2)
    scale = LossScale(CPU, moves=True)
    guard = Guard([model], torch.optim.AdamW(model.parameters(), fused=True), Safety(skip_limit=0), scale)
    loss, fits, overflows = torch.tensor(1.0), torch.tensor(1.0), torch.tensor(math.inf)

    def moved(number: int, norm: torch.Tensor) -> bool:
        before = [p.detach().clone() for p in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) * norm
        guard.step(number, loss, norm, {"term": loss})
        return not all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))

    found = [(moved(number, norm), float(scale.value)) for number, norm in enumerate([fits, overflows, overflows], 1)]
    assert found == [(True, 4.0), (False, 2.0), (False, 1.0)]
    assert guard.skipped == 0

    def one_more() -> None:
        moved(4, overflows)
        guard.read(4)

    with pytest.raises(Diverged, match="The gradient of the loss is not a number at step 4"):
        one_more()


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def test_a_run_learns_as_in_float32(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "START", 2.0**10)
    train(tiny("declip", "model.text.width=32", "engine.precision=float16"), tmp_path / "half", quiet=True)
    train(tiny("declip", "model.text.width=32"), tmp_path / "single", quiet=True)
    half, single = losses(tmp_path / "half"), losses(tmp_path / "single")
    assert half == pytest.approx(single, abs=0.02)
    assert half != single
    assert half[-1] < half[0] - 0.1


def test_a_scale_that_is_too_high_falls(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that this takes are skipped, and none counts."""
    monkeypatch.setattr(gradients, "START", 2.0**22)
    summary = train(tiny("declip", "engine.precision=float16", "engine.skip_limit=0"), tmp_path / "run", quiet=True)
    scales = [row["loss_scale"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert (summary["steps"], summary["skipped"]) == (8, 0)
    assert scales[:4] == [2.0**21, 2.0**20, 2.0**19, 2.0**18]
    assert scales[-1] == scales[-2]


def test_resuming(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped among the overflows, the scale and all else goes on bit by bit."""
    monkeypatch.setattr(gradients, "START", 2.0**20)
    recipe = tiny("declip", "engine.precision=float16")
    train(recipe, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "has_stopped_rising", lambda run: run.step >= 4)
        train(recipe, tmp_path / "stopped", quiet=True)
    train(recipe, tmp_path / "stopped", resume=True, quiet=True)
    states: list[Any] = [torch.load(checkpoints(tmp_path / name)[0]) for name in ("whole", "stopped")]
    assert float(states[0]["guard"]["scale"]["value"]) < 2.0**20
    assert states[0]["guard"]["scale"] == states[1]["guard"]["scale"]
    for part in ("model", "objective"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
