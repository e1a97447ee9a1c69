"""A run that is stopped and resumed ends where it would have ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_checks import RESNET
from safetensors.torch import load_file

from declip.cli import main
from declip.data.loader import BatchMaker
from declip.model.dual_encoder import DualEncoder
from declip.recipe import Recipe, to_toml
from declip.training import loop
from declip.training.checkpoint import checkpoints
from declip.training.logging import RunLog, cut_metrics, read_metrics
from declip.training.loop import train

MakeRecipe = Callable[..., Recipe]
TIMING = ("seconds", "samples_per_second", "data_wait")


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step: a signal, as the terminal sends it."""
    forward = DualEncoder.forward
    steps = iter(range(1, 10_000))

    def stopping(self: DualEncoder, batch: Any) -> Any:
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(DualEncoder, "forward", stopping)


def last(run: Path) -> Any:
    """What the newest checkpoint holds."""
    return torch.load(checkpoints(run)[0], weights_only=True)


def assert_same_end(one: Path, other: Path) -> None:
    states = [last(run) for run in (one, other)]
    for part in ("model", "objective"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(tensor, states[1][part][name], msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"])
    finished = [load_file(run / "open_clip_model.safetensors") for run in (one, other)]
    for name, tensor in finished[0].items():
        torch.testing.assert_close(tensor, finished[1][name])
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run)] for run in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, same in zip(*rows, strict=True):
        assert row.keys() == same.keys()
        assert row.get("loss", 0) == pytest.approx(same.get("loss", 0), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "step"),
    [
        ("clip", [], 3),
        ("clip", RESNET, 3),  # whose convolutions lie channels last in memory
        ("clip", [*RESNET, "optimizer.kind=sgd"], 3),
        ("declip", [], 5),
        ("declip", ["data.workers=1"], 6),
        ("declip", [], 1),
    ],
)
def test_resumed_run_ends_like_an_uninterrupted_one(
    tiny: MakeRecipe, tmp_path: Path, method: str, options: list[str], step: int
) -> None:
    recipe = tiny(method, *options)
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", quiet=True)
    assert last(tmp_path / "stopped")["progress"]["step"] == step
    assert not (tmp_path / "stopped" / "open_clip_model.safetensors").exists()
    summary = train(recipe, tmp_path / "stopped", resume=True, quiet=True)
    assert (summary["steps"], summary["pairs_seen"]) == (8, 64)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_stopped_twice(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("declip", "model.patch_dropout=0.5")  # which draws random numbers in every step
    train(recipe, tmp_path / "whole", quiet=True)
    for resume, step in ((False, 2), (True, 4)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(KeyboardInterrupt):
                train(recipe, tmp_path / "stopped", resume=resume, quiet=True)
    train(recipe, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_views_finished_on_the_device(tiny: MakeRecipe, tmp_path: Path) -> None:
    """A run with them repeats, with other workers too, and resumes exactly; it is close to one with whole views."""
    recipe = tiny("declip", "data.augment_on=device")
    train(recipe, tmp_path / "whole", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", quiet=True)
    train(recipe, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    train(tiny("declip", "data.augment_on=device", "data.workers=2"), tmp_path / "again", quiet=True)
    assert_same_end(tmp_path / "again", tmp_path / "whole")
    train(tiny("declip"), tmp_path / "worker", quiet=True)
    losses = [[row["loss"] for row in read_metrics(tmp_path / run) if "loss" in row] for run in ("whole", "worker")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_interrupt_raised_between_steps(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread there is no signal, only an exception."""
    write = RunLog.train

    def interrupting(log: RunLog, row: dict[str, Any]) -> None:
        write(log, row)
        if row["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "stopped", quiet=True)
    assert train(tiny(), tmp_path / "stopped", resume=True, quiet=True)["steps"] == 8
    train(tiny(), tmp_path / "whole", quiet=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_killed_run_goes_on_from_the_last_checkpoint(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after the checkpoint, and one that was cut off, are made again."""
    train(tiny(), tmp_path / "whole", quiet=True)
    killed, recipe = tmp_path / "killed", tiny()
    save = loop.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "save", lambda run, best=False: save(run, best) if run.step <= 4 else None)
        train(recipe, killed, quiet=True)
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        (killed / name).unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "pai')
    train(recipe, killed, resume=True, quiet=True)
    assert_same_end(killed, tmp_path / "whole")


def test_a_loader_process_that_is_killed(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 1, the state saved; the resumed run ends like an undisturbed one."""
    recipe = tiny("declip", "data.workers=1")
    train(recipe, tmp_path / "undisturbed")
    make, trainer = BatchMaker.make, os.getpid()

    def dying(self: BatchMaker, number: int) -> Any:
        if number == 5 and os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(BatchMaker, "make", dying)
        capsys.readouterr()
        (tmp_path / "recipe.toml").write_text(to_toml(recipe))
        assert main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("declip: ")]
    assert len(said) == 1
    assert re.search(r"A loader process has died: .* At step \d+ of 8 of the run: saved\. .* --resume", said[0])
    train(recipe, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed")


def test_finished_run_resumed_is_finished(tiny: MakeRecipe, tmp_path: Path) -> None:
    first = train(tiny(), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(tiny(), tmp_path / "run", resume=True, quiet=True)
    assert (again["steps"], again["held_out_score"]) == (first["steps"], first["held_out_score"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_cut_metrics(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 3)  # nothing there yet
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3, "x": 1.5}\n{"step": 4}\n{"st')
    cut_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3, "x": 1.5}\n'


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_on_the_command_line(recipe_file: Callable[..., Path], pairs: Path, tmp_path: Path) -> None:
    """Exit code 130, the state saved, no traceback; the same command with --resume reaches the end."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "declip", "train", str(recipe_file()), f"data.train={str(pairs)!r}"]
    command += ["data.workers=1", "schedule.pairs_seen=600", "--out", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "saved. To go on: the same command with --resume." in " ".join(err.split())
    assert main([*command[3:], "--resume"]) == 0
    assert read_metrics(run)[-1]["step"] == 75
    assert (run / "open_clip_model.safetensors").is_file()
