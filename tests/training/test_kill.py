"""Real processes that are killed, and that are asked to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from declip.cli import main
from declip.errors import Preempted
from declip.model.dual_encoder import DualEncoder
from declip.recipe import Recipe
from declip.training import interrupts
from declip.training.checkpoint import checkpoints
from declip.training.logging import read_metrics
from declip.training.loop import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_test.py"
MakeRecipe = Callable[..., Recipe]


def test_killed_runs_end_bit_by_bit_as_undisturbed() -> None:
    """A few kills; DECLIP_KILLS=30 for as many as the benchmark's own."""
    kills = os.environ.get("DECLIP_KILLS", "3")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", kills, "--json", "--check"], capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["differences"] == []
    assert (done.returncode, found["kills"]) == (0, int(kills))


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm(recipe_file: Callable[..., Path], pairs: Path, tmp_path: Path, workers: int) -> None:
    """To the whole group of processes, as clusters send it: saved, exit code 0, one sentence; it can go on."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "declip", "train", str(recipe_file()), f"data.train={str(pairs)!r}"]
    command += [f"data.workers={workers}", "schedule.pairs_seen=600", "--out", str(run), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not checkpoints(run) and time.monotonic() < deadline:
            time.sleep(0.02)
        sent = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert time.monotonic() - sent < 30
    assert process.returncode == 0, err
    assert json.loads(out) == {"preempted": True}
    assert "Traceback" not in err
    (sentence,) = err.splitlines()
    assert sentence.startswith("declip: Stopped by SIGTERM at step ")
    assert sentence.endswith(" of 75; saved. To go on: the same command with --resume.")
    assert main([*command[3:], "--resume"]) == 0
    assert read_metrics(run)[-1]["step"] == 75


def test_sigterm_in_a_step_without_end(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be saved exactly is not saved: the checkpoint before stays."""
    train(tiny(), tmp_path / "whole", quiet=True)
    forward, steps = DualEncoder.forward, iter(range(1, 100))

    def hanging(self: DualEncoder, batch: Any) -> Any:
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DualEncoder, "forward", hanging)
        patch.setattr(interrupts, "GRACE_SECONDS", 0.2)
        with pytest.raises(Preempted, match=r"at step 3 of 8; the last checkpoint is kept\. To go on: "):
            train(tiny(), tmp_path / "run", quiet=True)
    assert checkpoints(tmp_path / "run")[0].name == "step_00000002.pt"
    train(tiny(), tmp_path / "run", resume=True, quiet=True)
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
