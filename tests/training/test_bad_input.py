"""Whatever is wrong, the answer is one sentence and exit code 2, and nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import pair, write_pairs

from declip.cli import main
from declip.training import saving
from declip.training.logging import read_metrics
from declip.training.saving import Saver

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train(recipe_file: Callable[..., Path], pairs: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`declip train` on the 40 pairs, with overrides: the exit code and what went to stderr."""

    def run(*arguments: str, method: str = "clip") -> tuple[int, str]:
        argv = ["train", str(recipe_file(method)), f"data.train={str(pairs)!r}", "--out", str(out), "--json"]
        code = main([*argv, *arguments])
        return code, capsys.readouterr().err

    return run


def sentence(result: tuple[int, str]) -> str:
    """The one sentence of a failure."""
    code, err = result
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if not line.startswith("skipped: ")]
    assert line.startswith("declip: ")
    assert line.endswith(".")
    assert not line.endswith("..")
    return line


def data(path: Path, rows: list[dict[str, Any]]) -> str:
    return f"data.train={str(write_pairs(path, rows))!r}"


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [pair(number) for number in range(count)]


# Found before training: no run folder


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["data.train=nowhere.parquet"],
            "There is no file or folder 'nowhere.parquet': give a .parquet or .arrow file",
        ),
        (["data.validation=nowhere.csv"], "There is no file or folder 'nowhere.csv'"),
        (["data.train=[]"], "There is nothing to train on: say data.train=FILE"),
        (["data.captions=words"], "no column 'words' (data.captions): its columns are key (string), image (binary)"),
        (["data.image=key2"], "no column 'key2' (data.image)"),
        (["schedule.batch_size=33"], "schedule.batch_size = 33 is larger than the training set of 32 pairs"),
        (["data.fraction=0.1"], "schedule.batch_size = 8 is larger than the training set of 3 pairs"),
        (["schedule.epoch=3"], "there is no field schedule.epoch; the nearest is schedule.epochs"),
        (["terms.simsim.weight=1"], "there is no field terms.simsim; the nearest is terms.simsiam"),
        (["schedule.batch_size=many"], "schedule.batch_size = 'many' is wrong: input should be a valid integer"),
        (["optimizer.lr=-1"], "optimizer.lr = -1 is wrong: input should be greater than 0"),
        (["terms.contrastive.weight=0"], "the recipe has no term with a weight above zero"),
        (["engine.device=abacus"], "engine.device = 'abacus' cannot be used"),
        (["model.name=ViT-Z"], "model.name = 'ViT-Z': open_clip knows no such architecture"),
        (["model.text.heads=5"], "model: open_clip cannot build these towers"),
        (["model.image.image_size=4"], "images of 4 px are smaller than a patch of 8 px"),
        (["data.view_size=8"], "model.image: the tower takes no images of data.view_size = 8"),
        (["--resume"], "holds no run to resume: leave out --resume to start one there"),
    ],
)
def test_input_error(train: Run, out: Path, overrides: list[str], says: str) -> None:
    assert says in sentence(train(*overrides))
    assert not out.exists()


def without_captions(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        del row["captions"]


def empty_captions(rows: list[dict[str, Any]]) -> None:
    for row in rows[:10]:
        row["captions"] = [" ", ""]


def broken_images(rows: list[dict[str, Any]]) -> None:
    for row in rows[:10]:
        row["image"] = row["image"][:-400]


def no_rows(rows: list[dict[str, Any]]) -> None:
    rows[1:] = []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_captions, "has no caption column: its columns are key (string), image (binary), label (string)"),
        (empty_captions, "are broken, more than data.broken_limit = 0.01 allows; the first: "),
        (broken_images, "the image cannot be decoded"),
        (no_rows, "has too few pairs (1) to hold some out"),
    ],
)
def test_wrong_data(train: Run, out: Path, tmp_path: Path, spoil: Callable[[list[Any]], None], says: str) -> None:
    made = rows()
    spoil(made)
    assert says in sentence(train(data(tmp_path / "spoilt.parquet", made)))
    assert not out.exists()


def test_zero_pairs(train: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("filename,caption\n")
    assert "captions.csv holds no pairs" in sentence(train(f"data.train={str(tmp_path / 'captions.csv')!r}"))
    assert not out.exists()


def test_no_held_out_pair_can_be_read(train: Run, out: Path, tmp_path: Path) -> None:
    broken = write_pairs(tmp_path / "broken.parquet", [{**row, "image": b"no image"} for row in rows(5)])
    says = sentence(train(f"data.validation={str(broken)!r}"))
    assert "None of the 5 held-out pairs of" in says
    assert not out.exists()


@pytest.mark.parametrize("there", ["file", "folder with a file", "file on the way"])
def test_output_that_cannot_be(train: Run, out: Path, there: str) -> None:
    if there == "folder with a file":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        out.write_text("mine")
    arguments = ["--out", str(out / "deeper")] if there == "file on the way" else []
    says = sentence(train(*arguments))
    assert ("cannot be made" if arguments else "already holds files: give another --out") in says
    assert (out / "notes.txt" if out.is_dir() else out).read_text() == "mine"
    assert len(list(out.parent.rglob("out/*"))) == out.is_dir()


def test_output_of_another_run(train: Run, out: Path) -> None:
    assert train()[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert "already holds files: give another --out, or --resume" in sentence(train())
    says = sentence(train("--resume", "optimizer.lr=0.5"))
    assert "was trained with another recipe (optimizer.lr = 0.001 there, 0.5 now): resume with the same one" in says
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_as_a_program(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    command = ["train", str(recipe_file()), "data.train=nowhere.parquet", "--out", "out"]
    done = subprocess.run([sys.executable, "-m", "declip", *command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("declip: There is no file or folder 'nowhere.parquet'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Broken pairs within the limit


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_broken_pairs_are_skipped_and_counted(
    recipe_file: Callable[..., Path], out: Path, tmp_path: Path, cache_gb: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows()
    made[7]["image"] = b"no image"
    made[8]["captions"] = [" "]
    options = [
        data(tmp_path / "some.parquet", made),
        "data.broken_limit=0.06",
        "data.holdout=0",
        f"data.cache_gb={cache_gb}",
    ]
    assert main(["train", str(recipe_file()), *options, "--out", str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    summary = json.loads(printed)
    assert (summary["broken"], summary["training_pairs"], summary["steps"]) == (2, 40, 8)
    if cache_gb:
        assert err.count("skipped: ") == 2
        assert "some.parquet, row 7 (key k7): the image cannot be decoded" in err


def test_too_many_broken_pairs_found_on_the_way(train: Run, out: Path, tmp_path: Path) -> None:
    """Where images are not decoded in advance, the run stops when it finds too many."""
    made = rows()
    for row in made[:10]:
        row["image"] = row["image"][:-400]
    options = [data(tmp_path / "some.parquet", made), "data.broken_limit=0.06", "data.cache_gb=0", "data.holdout=0"]
    says = sentence(train(*options))
    assert "3 of 40 pairs are broken, more than data.broken_limit = 0.06 allows; the first: " in says
    assert says.count("some.parquet") == 1
    assert not (out / "open_clip_model.safetensors").exists()


# A full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """From the given moment on, writing checkpoints meets a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def fill(name: str) -> None:
        replace = os.replace

        def full(source: Path, target: Path) -> None:
            if Path(target).name == name:
                with open("/dev/full", "wb", buffering=0) as device:
                    device.write(Path(source).read_bytes())
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)

    return fill


@pytest.mark.parametrize(
    "name", ["step_00000000.pt", "best.safetensors", "open_clip_model.safetensors", "open_clip_config.json"]
)
def test_disk_full(train: Run, out: Path, full_disk: Callable[[str], None], name: str) -> None:
    full_disk(name)
    assert "the disk is full" in sentence(train())
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert name not in left
    assert not [path for path in left if path.endswith(".tmp")]


@pytest.mark.parametrize("file", [".step_00000002.pt.tmp", ".best.safetensors.tmp"])
def test_writers_say_that_the_disk_is_full(train: Run, out: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch and safetensors themselves write goes to a full device."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    begin = Saver.__init__

    def prepared(saver: Saver, *arguments: Any, **options: Any) -> None:
        begin(saver, *arguments, **options)
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / file).symlink_to("/dev/full")

    monkeypatch.setattr(Saver, "__init__", prepared)
    assert "the disk is full" in sentence(train())
    assert not list((out / "checkpoints").glob(".*"))


def test_disk_full_in_mid_run_can_be_resumed(train: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_checkpoint

    def full_at_six(folder: Path, step: int, state: dict[str, Any]) -> None:
        if step >= 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "checkpoints" / "step.pt"))
        write(folder, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", full_at_six)
        assert "the disk is full while writing" in sentence(train())
    assert train("--resume")[0] == 0
    assert read_metrics(out)[-1]["step"] == 8
