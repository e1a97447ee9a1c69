"""``declip data`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from declip.cli import main
from declip.data.sources import open_sources
from declip.pairs import Data

Capture = pytest.CaptureFixture[str]


def answer(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("command", ["inspect", "dedup", "pack", "verify"])
def test_help_has_an_example(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["data", command, "--help"])
    assert f"example:\n  declip data {command}" in capsys.readouterr().out


def test_no_command_prints_help(capsys: Capture) -> None:
    assert main(["data"]) == 0
    assert "inspect" in capsys.readouterr().out


def test_inspect(pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "seen"
    found = answer(capsys, "data", "inspect", str(pairs), "--test", str(pairs), "--sample", "30", "--out", str(out))
    assert found["looked_at"] == 30
    assert {finding["name"] for finding in found["findings"] if finding["severity"] == "act"} >= {"tiny_images"}
    assert "<html" in (out / "report.html").read_text("utf-8")
    assert main(["data", "inspect", str(pairs), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "40 pairs, 80 captions" in shown
    assert str(out / "report.html") in shown


def test_dedup(pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "unique"
    done = answer(capsys, "data", "dedup", str(pairs), str(pairs), "--out", str(out), "--exact")
    assert (done["pairs"], done["kept"], done["removed"]) == (80, 40, {"equal image": 40})
    assert len(open_sources([str(out)], Data())) == 40
    assert main(["data", "dedup", str(pairs), "--out", str(out)]) == 2
    assert "already holds files" in capsys.readouterr().err


def test_pack_and_verify(pairs: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "packed"
    for written in (1, 0):  # the second call has nothing left to do
        done = answer(capsys, "data", "pack", str(pairs), str(out), "--resize", "10", "--workers", "1")
        assert (done["source_pairs"], done["pairs"], done["written"]) == (40, 40, written)
    assert len(open_sources([str(out)], Data())) == 40
    again = tmp_path / "labels"
    assert answer(capsys, "data", "pack", str(pairs), str(again), "data.captions=label")["pairs"] == 40
    assert main(["data", "verify", str(out)]) == 0
    assert "1 shard with 40 pairs: all as they were written" in capsys.readouterr().out
    (out / "00000.tar").write_bytes(b"something else")
    assert main(["data", "verify", str(out), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["changed"] == ["00000.tar"]
    assert main(["data", "pack", str(pairs), str(out)]) == 2
    assert "holds a pack of other data or with other options (resize)" in capsys.readouterr().err


def test_options_of_the_data_section(tmp_path: Path, pairs: Path, capsys: Capture) -> None:
    out = str(tmp_path / "seen")
    found = answer(capsys, "data", "inspect", str(pairs), "data.captions=label", "--out", out)
    assert found["counts"]["captions"] == 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect"], "required: DATA"),
        (["inspect", "nowhere.tar"], "There is no file or folder 'nowhere.tar'"),
        (["inspect", "data.key=id"], "No data was given"),
        (["inspect", "demo:noto", "--sample", "0"], "'0' is no whole number above 0"),
        (["inspect", "demo:noto", "data.imag=x"], "options: there is no field data.imag; the nearest is data.image"),
        (["dedup", "demo:noto"], "required: --out"),
        (["dedup", "demo:noto", "--out", "s3://bucket/x"], "is a URL, and only local folders are written to"),
        (["pack", "demo:noto", "s3://bucket/x"], "is a URL, and only local folders are written to"),
        (["inspect", "demo:noto", "--out", "/proc/x"], "/proc/x: "),
        (["inspect", "demo:noto", "--out", "pyproject.toml"], "pyproject.toml"),
        (["dedup", "demo:noto", "--out", "pyproject.toml/x"], "pyproject.toml"),
        (["pack", "demo:noto", "pyproject.toml/x"], "pyproject.toml"),
        (["inspect", "x" * 5000], "File name too long"),
    ],
)
def test_wrong_input(arguments: list[str], says: str, capsys: Capture) -> None:
    assert main(["data", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
