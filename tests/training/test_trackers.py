"""Rows in TensorBoard, wandb and mlflow: each once, also after a resume or a roll-back; nothing is sent unasked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from declip.errors import InputError
from declip.recipe import Recipe
from declip.training import loop
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.step import Step

MakeRecipe = Callable[..., Recipe]
BOTH = 'engine.trackers=["wandb", "mlflow"]'


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


class Services:
    """What wandb and mlflow were told, by run."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.configs: dict[str, Any] = {}
        self.calls: list[str] = []
        self.down = False

    def init(self, project: str, name: str, id: str, resume: str, dir: str, config: Any) -> Any:
        assert (project, name, resume, Path(dir).name) == ("declip", "run", "allow", "run")
        self.calls.append("wandb begins")
        self.configs[id] = config
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=self.rows.setdefault(id, []).append,
            finish=lambda: self.calls.append("wandb ends"),
        )

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        assert (run_id is None) == (run_name == "run")
        self.calls.append("mlflow begins")
        self.current = run_id or f"made here {len(self.rows)}"
        self.rows.setdefault(self.current, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.current))

    def log_metrics(self, scalars: dict[str, float], step: int) -> None:
        if self.down:
            raise ConnectionError("nobody answers")
        self.rows[self.current].append({"step": step, **scalars})

    def log_dict(self, values: Any, file: str) -> None:
        self.configs[self.current] = values


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Services:
    services = Services()
    for name, functions in (("wandb", ("init",)), ("mlflow", ("start_run", "log_metrics", "log_dict"))):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function, getattr(services, function))
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["mlflow"].end_run = lambda: services.calls.append("mlflow ends")  # type: ignore[attr-defined]
    return services


def test_nothing_is_sent_unasked(tiny: MakeRecipe, tmp_path: Path, services: Services) -> None:
    train(tiny(), tmp_path / "run", quiet=True)
    assert (services.calls, services.rows) == ([], {})
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_a_resumed_run_is_the_same_there(
    tiny: MakeRecipe, tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny("clip", BOTH), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "has_stopped_rising", lambda run: run.step >= 4)
        train(recipe, out, quiet=True)
    assert json.loads((out / "trackers.json").read_text()).keys() == {"wandb", "mlflow"}
    train(recipe, out, resume=True, quiet=True)
    assert services.calls == 2 * ["wandb begins", "mlflow begins", "wandb ends", "mlflow ends"]
    assert len(services.rows) == 2
    written = read_metrics(out)
    for rows in services.rows.values():
        assert [row["step"] for row in rows] == [row["step"] for row in written]
        for row, other in zip(rows, written, strict=True):
            assert row.get("loss") == other.get("loss")
            assert row.get("terms/contrastive") == other.get("terms", {}).get("contrastive")
            assert row.get("gradient_norm/image") == other.get("gradient_norm", {}).get("image")
            assert row.get("held_out/score") == other.get("held_out", {}).get("score")
    assert all(config == recipe.model_dump(mode="json") for config in services.configs.values())


def test_a_tracker_that_fails_does_not_end_the_run(
    tiny: MakeRecipe, tmp_path: Path, services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    services.down = True
    assert train(tiny("clip", BOTH), tmp_path / "run")["steps"] == 8
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("mlflow gets no more rows: nobody answers.") == 1
    assert sorted(map(len, services.rows.values())) == [0, 12]


def test_not_installed(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        train(tiny("clip", BOTH), tmp_path / "run", quiet=True)
    says = "engine.trackers asks for wandb, which is not installed: pip install wandb, or leave it out."
    assert str(error.value) == says
    assert not (tmp_path / "run").exists()


def test_cannot_start(tiny: MakeRecipe, tmp_path: Path, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise RuntimeError("no API key.\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(InputError, match=r"^engine.trackers: wandb cannot start: no API key\.$"):
        train(tiny("clip", BOTH), tmp_path / "run", quiet=True)


# TensorBoard


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard shows: as its reader does, a writer that begins at purge_step hides what came before."""
    shown: dict[tuple[str, int], list[float]] = {}

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            for name, step in list(shown):
                if purge_step is not None and step >= purge_step:
                    del shown[name, step]

        def add_scalar(self, name: str, value: float, step: int) -> None:
            shown.setdefault((name, step), []).append(value)

        def close(self) -> None:
            pass

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return shown


def assert_each_row_once(board: dict[tuple[str, int], list[float]], out: Path) -> None:
    rows = {row["step"]: row["loss"] for row in read_metrics(out) if row.get("loss") is not None}
    assert {step: values for (name, step), values in board.items() if name == "loss"} == {
        step: [loss] for step, loss in rows.items()
    }
    assert {step for name, step in board if name == "held_out/score"} == {2, 4, 6, 8}


def test_board_of_a_resumed_run(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: dict[tuple[str, int], list[float]]
) -> None:
    recipe, out = tiny(), tmp_path / "run"

    class Killed(BaseException):
        pass

    def kill(run: loop.Run, *arguments: Any) -> dict[str, Any]:
        if run.step == 5:  # rows are written up to it, the last checkpoint is of step 4
            raise Killed
        return row(run, *arguments)

    row = loop.Run.row
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "row", kill)
        with pytest.raises(Killed):
            train(recipe, out, quiet=True)
    board["loss", 5] = [1.0]
    train(recipe, out, resume=True, quiet=True)
    assert_each_row_once(board, out)


def test_board_of_a_run_that_went_back(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: dict[tuple[str, int], list[float]]
) -> None:
    forward, steps = Step.forward, iter(range(1, 100))

    def spoiling(self: Step, batch: Any) -> Any:
        loss, terms = forward(self, batch)
        return loss * (math.nan if next(steps) == 6 else 1), terms

    monkeypatch.setattr(Step, "forward", spoiling)
    recipe = tiny("clip", "engine.on_divergence=roll_back", "engine.skip_limit=0")
    assert train(recipe, tmp_path / "run", quiet=True)["roll_backs"] == 1
    assert_each_row_once(board, tmp_path / "run")
