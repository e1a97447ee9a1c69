"""`declip train --dry-run`: what a run will need, from a few real steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TERMS, TINY

from declip.cli import main
from declip.errors import InputError
from declip.recipe import Recipe
from declip.training import estimate as estimating
from declip.training import loop
from declip.training import run as runs
from declip.training.estimate import estimate
from declip.training.held_out import HeldOut

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield
    assert list(empty.iterdir()) == []


def test_what_is_found(tiny: MakeRecipe) -> None:
    recipe = tiny("declip", "schedule.pairs_seen=8000")
    found = estimate(recipe, price=2.0)
    run = loop.set_up(recipe, None, False, loop.Ranks())
    counted = {name: found["parameters"][name] for name in ("image", "text", "heads")}
    assert counted["image"] == sum(p.numel() for p in run.model.clip.visual.parameters())
    assert sum(counted.values()) == found["parameters"]["total"]
    assert found["parameters"]["total"] == sum(
        p.numel() for part in (run.model, run.objective) for p in part.parameters()
    )

    weights = sum(p.nbytes for p in run.parameters)
    memory = {name: size * 2**30 for name, size in found["memory_gb"].items()}
    assert weights < memory["weights"] < 1.1 * weights  # and the queue
    assert 0.9 * weights < memory["gradients"] <= weights
    assert memory["optimizer"] == pytest.approx(2 * weights, rel=0.01)  # and a count of steps for each
    assert memory["peak"] > sum(memory[name] for name in ("weights", "gradients", "optimizer"))

    assert (found["steps"], found["batch_size"], found["training_pairs"], found["ranks"]) == (1000, 8, 32, 1)
    assert found["samples_per_second"] == pytest.approx(8 / found["seconds_per_step"])
    assert found["held_out_scores"] == 4
    hours = (1000 * found["seconds_per_step"] + 4 * found["seconds_per_score"]) / 3600
    assert found["hours"] == found["device_hours"] == pytest.approx(hours)
    assert found["cost"] == pytest.approx(2 * hours)


def test_only_the_last_five_steps_are_timed(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 100 s to warm up, five of 2 s, in each of which the loader is waited for a quarter of the time."""
    numbers: list[int] = []

    class Slow(runs.Step):
        def forward(self, batch: Any) -> Any:
            numbers.append(len(numbers))
            return super().forward(batch)

    monkeypatch.setattr(runs, "Step", Slow)
    train = estimating._Notes.train

    def taking(notes: Any, row: dict[str, Any]) -> None:
        took = [100, 100, 2, 2, 2, 2, 2][: len(numbers)]
        notes.run.seconds = float(sum(took))
        train(notes, {**row, "data_wait": 0.25 if len(numbers) > 2 else 1.0})

    monkeypatch.setattr(estimating._Notes, "train", taking)
    found = estimate(tiny("clip", "data.holdout=0"))
    assert len(numbers) == 7
    assert found["seconds_per_step"] == pytest.approx(2.0)
    assert found["data_wait"] == pytest.approx(0.25)
    assert (found["held_out_scores"], found["cost"]) == (0, None)
    assert found["hours"] == pytest.approx(8 * 2 / 3600)


def test_fewer_held_out_pairs_say_how_long_all_take(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "SCORED", 3)
    scored: list[int] = []
    score, judged = HeldOut.score, estimating._Notes.held_out

    def counted(held_out: HeldOut, *arguments: Any) -> dict[str, float]:
        scored.append(len(held_out.images))
        return score(held_out, *arguments)

    def taking(notes: Any, row: dict[str, Any]) -> None:
        judged(notes, row)
        notes.judging = 6.0

    monkeypatch.setattr(HeldOut, "score", counted)
    monkeypatch.setattr(estimating._Notes, "held_out", taking)
    held_out = loop.set_up(tiny(), None, False, loop.Ranks()).held_out
    assert held_out is not None
    count = len(held_out.images)
    assert estimate(tiny())["seconds_per_score"] == pytest.approx(6.0 * count / 3)
    assert count > 3
    assert set(scored) == {3}
    monkeypatch.setattr(estimating, "SCORED", 2 * count)
    assert estimate(tiny())["seconds_per_score"] == pytest.approx(6.0)


def test_a_loader_that_will_not_keep_up(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of the timed steps were made ahead, so they show nothing of it."""
    monkeypatch.setattr(estimating, "_loader_seconds", lambda run: 50.0)
    found = estimate(tiny())
    assert found["seconds_per_step"] == 50.0
    assert found["data_wait"] > 0.9


def test_loader_processes_share_the_work(tiny: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 6.0])
    run = loop.set_up(tiny("clip", "data.workers=3"), None, False, loop.Ranks())
    monkeypatch.setattr("declip.training.estimate.time.perf_counter", lambda: next(clock))
    assert estimating._loader_seconds(run) == 2.0
    run = loop.set_up(tiny(), None, False, loop.Ranks())
    assert estimating._loader_seconds(run) == 0.0


def test_a_run_that_diverges_at_once(tiny: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"after step \d|at step \d.*: lower optimizer\.lr \(now 1e\+39\)\.$"):
        estimate(tiny("clip", "optimizer.lr=1e39", "optimizer.clip_norm=0", "engine.skip_limit=0"))


# The command


def recipe_on(folder: Path, pairs: Path) -> list[str]:
    recipe = folder / "clip.toml"
    recipe.write_text(f'name = "clip"\n{TINY}\n{TERMS["clip"]}\n')
    return ["train", str(recipe), f"data.train={str(pairs)!r}"]


def test_table(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*recipe_on(tmp_path, pairs), "--dry-run", "--price", "3", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    for name in ("parameters, image", "memory, peak", "a step", "waiting for data", "CPU-hours", "cost"):
        assert name in out


def test_options_reach_the_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What two of them find: test_distributed.py."""
    started: list[tuple[list[str], int]] = []
    monkeypatch.setattr(
        "declip.training.launch.launch", lambda arguments, count: started.append((arguments, count)) or (0, '{"a": 1}')
    )
    assert main(["train", "clip", "seed=1", "--dry-run", "--gpus", "2", "--price", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert main(["train", "clip", "--out", "there", "--resume", "--gpus", "4"]) == 0
    assert started == [
        (["train", "clip", "seed=1", "--price", "3.0", "--json", "--dry-run"], 2),
        (["train", "clip", "--out", "there", "--resume"], 4),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dry-run", "--resume"], "--dry-run takes the first steps of a run and --resume later ones"),
        (["--out", "run", "--price", "2"], "--price is the price that --dry-run computes with"),
        (["--dry-run", "--price", "free"], "'free' is not a positive number"),
    ],
)
def test_wrong_options(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "clip", *options]) == 2
    assert says in capsys.readouterr().err
