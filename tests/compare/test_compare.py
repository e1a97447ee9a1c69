"""A whole comparison on tiny towers: cells as processes, reused, interrupted, diverged, reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import pair, write_pairs
from html_page import Page

import declip
from declip.cli import _parse, main
from declip.cli.compare import _asked
from declip.compare import cell
from declip.compare.cell import run_cell
from declip.compare.grid import CELLS
from declip.recipe import Recipe, to_toml


@pytest.fixture
def line(tmp_path: Path, recipe_file: Callable[..., Path]) -> Callable[..., list[str]]:
    """A command line for recipes by their method, on 100 pairs."""
    train = write_pairs(tmp_path / "train.parquet", [pair(n) for n in range(100)])
    test = write_pairs(tmp_path / "test.parquet", [pair(n) for n in range(1000, 1020)])

    def make(*methods: str, more: tuple[str, ...] = ()) -> list[str]:
        recipes = [str(recipe_file(method)) for method in methods]
        places = ["--data", str(train), "--eval", str(test), "--out", str(tmp_path / "out")]
        return ["compare", *recipes, *places, "--fractions", "1,1/4", "--seeds", "1", "--rates", "1", *more]

    return make


def test_a_grid_is_run_reported_and_gone_on_with(
    line: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line("clip", "declip"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] == {"1": 80, "1/4": 20}
    assert [method["name"] for method in result["methods"]] == ["tiny_clip", "tiny_declip"]
    assert result["cells"] == 2 + 4
    lines = {(one["method"], one["view"]): one for one in result["lines"]}
    for (_, view), one in lines.items():
        assert [point["pairs"] for point in one["points"]] == [20, 80]
        assert all(point["flops"] <= 64 * result["methods"][0]["flops_per_pair"] for point in one["points"]) or (
            view != "compute"
        )
    assert lines["tiny_clip", "best"]["points"][0]["pairs_seen"] == 64
    assert (tmp_path / "out" / "results.json").is_file()
    page = Page((tmp_path / "out" / "report.html").read_text())
    for heading in ("Quality against pairs", "What a pair is worth", "Quality against compute", "What overfits when"):
        assert heading in page.words

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / CELLS).iterdir()}
    assert len(files) == 6
    assert {str(path.relative_to(tmp_path / "out")) for path in files} == {run["file"] for run in result["runs"]}
    # Another list of methods: what both have in common is not run again, and what is gone is no longer shown.
    assert main([*line("clip"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [one["method"] for one in again["lines"]] == ["tiny_clip"] * 3
    assert again["lines"][0]["points"] == result["lines"][0]["points"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / CELLS).iterdir()} == files
    assert again["notes"] == []
    # A cell of a machine that computes otherwise.
    moved = tmp_path / "out" / again["runs"][0]["file"]
    found = json.loads(moved.read_text())
    moved.write_text(json.dumps(found | {"computed": "tf32 on tpu"}))
    assert main([*line("clip"), "--json"]) == 0
    ways = f"{found['computed']}, some in tf32 on tpu"
    assert json.loads(capsys.readouterr().out)["notes"] == [
        f"Some runs were computed in {ways}: what differs may be that."
    ]


def test_an_interrupted_grid_goes_on(
    line: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends as one that was not interrupted."""
    out = tmp_path / "out"
    command = line("clip", more=("--pairs-seen", "800", "--fractions", "1", "--json"))
    process = subprocess.Popen([sys.executable, "-m", "declip", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob(f"{CELLS}/*/run/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert not list(out.glob(f"{CELLS}/*.json"))
    assert list(out.glob(f"{CELLS}/*/run/checkpoints/*"))
    assert not (out / "report.html").exists()
    found = []
    for place in (out, tmp_path / "whole"):
        assert main([*command, "--out", str(place)]) == 0
        result = json.loads(capsys.readouterr().out)
        (points,) = [one["points"] for one in result["lines"] if one["view"] == "best"]
        assert result["seconds"] >= points[0]["seconds"]
        found.append([{name: value for name, value in point.items() if name != "seconds"} for point in points])
    assert found[0] == found[1]


def test_a_run_gone_on_with_counts_the_time_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dict.fromkeys(("method", "fraction", "seed", "seen", "rate", "flops_per_pair", "format"))
    (tmp_path / cell.SPEC).write_text(json.dumps({**spec, "judged": []}))
    monkeypatch.setattr(cell, "_end_with_parent", lambda parent: None)
    monkeypatch.setattr(cell, "run_cell", lambda *_: {"status": "done", "summary": {"seconds": 1000.0}})
    assert cell.main(tmp_path) == 0
    assert json.loads((tmp_path / cell.RESULT).read_text())["wall_seconds"] == 1000.0


def test_a_diverged_cell_is_a_result(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny("clip", "optimizer.lr=1e30", "optimizer.clip_norm=0", "engine.skip_limit=0")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    found = run_cell(tmp_path / "recipe.toml", [str(tmp_path / "pairs.parquet")], tmp_path)
    assert found["status"] == "diverged"
    assert "is not a number" in found["reason"] or "times" in found["reason"]
    assert "checkpoints" not in found["reason"]  # which are gone with the cell
    assert "judged" not in found


def test_a_method_that_diverges_is_shown_and_the_others_are_compared(
    line: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every rate of the search, in the grid and as a variant."""
    lost = [f"tiny_declip:{change}" for change in ("optimizer.lr=1e30", "optimizer.clip_norm=0", "engine.skip_limit=0")]
    variant = "tiny_clip optimizer.lr=1e30 optimizer.clip_norm=0 engine.skip_limit=0"
    arguments = [*line("clip", "declip"), *lost, "--no-equal-compute", "--variant", variant]
    arguments[arguments.index("--rates") + 1], arguments[arguments.index("--fractions") + 1] = "0.5,1", "1/4"
    assert main(arguments) == 0
    said = capsys.readouterr().out
    rows = {row.split()[1]: row for row in said.splitlines() if row.startswith("│")}
    assert "diverged" in rows["tiny_declip"]
    assert "Diverged, and not counted: tiny_declip, 1/4 of the pairs, seed 0: " in said
    assert "checkpoints" not in said
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["method"] for one in result["lines"]} == {"tiny_clip"}
    assert set(result["methods"][1]["rates"]["1/4"].values()) == {None}
    assert [row["quality"] for row in result["ablation"]] == [None]
    page = Page((tmp_path / "out" / "report.html").read_text())
    said = "".join(page.words)
    assert "Diverged, and not counted: tiny_declip with 20 pairs (1), tiny_clip optimizer.lr=1e30" in said
    assert "A pair is worth" not in said


def test_wrong_input_of_a_cell_is_said_once(line: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer's numbers are looked at where the run begins."""
    assert main(line("clip", more=("model.text.heads=3",))) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("declip: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "a", "--eval", "b", "--out", "c"], "arguments are required: recipes"),
        (["clip", "--eval", "b", "--out", "c"], "arguments are required: --data"),
        (["clip", "--data", "a", "--aside", "1.5", "--out", "c"], "--aside 1.5 is no share"),
        (["clip", "--data", "a", "--eval", "b"], "arguments are required: --out"),
        (["clip", "--data", "a", "--eval", "b", "--out", "c", "--fractions", "3"], "'3' is no fraction"),
        (["clip", "--data", "a", "--eval", "b", "--out", "c", "--rates", "0"], "--rates: '0' is not a positive"),
        (["clip", "--data", "a", "--eval", "b", "--out", "c", "--variant", "clip"], "changes nothing"),
        (["clip", "--data", "nowhere.parquet", "--eval", "b", "--out", "c"], "nowhere.parquet"),
        (["klip", "--data", "a", "--eval", "b", "--out", "c"], "There is no recipe 'klip'"),
    ],
)
def test_bad_command_lines(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_quick_fills_in_what_is_not_said() -> None:
    asked = _asked(_parse(["compare", "--quick", "--seeds", "2", "--out", "out"]))
    assert (asked.recipes, asked.judged) == (("clip", "best-small"), ("demo:fluent3d",))
    assert asked.fractions == (1, Fraction(1, 4), Fraction(1, 16))
    assert (asked.seeds, asked.rates, asked.pairs_seen, asked.allow_overlap) == (2, (1.0,), 13_000, True)
    assert not asked.equal_compute
    other = _asked(_parse(["compare", "clip", "declip", "--quick", "--out", "out", "declip:optimizer.ema=0.9"]))
    assert other.own["declip"][-1] == "optimizer.ema=0.9"
    assert "caption" in other.own["declip"][0]  # names as they are
    own = _asked(_parse(["compare", "clip", "--quick", "--data", "mine.parquet", "--out", "out", "optimizer.lr=1"]))
    assert (own.recipes, own.data, own.changes, own.allow_overlap) == (
        ("clip",),
        ("mine.parquet",),
        ("optimizer.lr=1",),
        False,
    )


def test_a_cell_takes_the_pixel_statistics_of_the_weights_it_starts_from(
    line: Callable[..., list[str]], tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    declip.train(tiny("clip", "model.normalization=half"), run, quiet=True)
    command = line("clip", more=(f"model.image.init={str(run)!r}", "--fractions", "1/4", "--json"))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 1


def test_every_judged_set_is_in_the_report(
    line: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(write_pairs(tmp_path / "other.parquet", [pair(n) for n in range(2000, 2009)]))
    assert main([*line("clip", more=("--eval", other, "--fractions", "1/4")), "--json"]) == 0
    assert [*json.loads(capsys.readouterr().out)["judged"].values()] == [20, 9]
    page = (tmp_path / "out" / "report.html").read_text()
    for name in (str(tmp_path / "test.parquet"), other):
        assert Page(page).words.count(name) >= 2  # quality against pairs, and against compute
        assert f"{name}, over TFLOP of the towers" in page
