"""Checkpoints that are damaged, of another run, or cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from declip.errors import InputError
from declip.recipe import Recipe
from declip.training import checkpoint, saving
from declip.training.checkpoint import checkpoints, read_newest, step_of, write_checkpoint
from declip.training.loop import train
from declip.training.saving import Saver

MakeRecipe = Callable[..., Recipe]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def spoil_the_checksum(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")


DAMAGES = [
    flip_a_bit,
    spoil_the_checksum,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"garbage"),
    lambda path: os.truncate(path, 5000),
    lambda path: os.truncate(path, path.stat().st_size - 1),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_intact_one_is_taken(
    tiny: MakeRecipe, tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny(), out, quiet=True)
    weights = (out / "open_clip_model.safetensors").read_bytes()
    newest = checkpoints(out)[0]
    damage(newest)
    capsys.readouterr()
    assert train(tiny(), out, resume=True, quiet=True)["steps"] == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{newest} is ")
    assert line.endswith(": the one before it is taken.")
    assert (out / "open_clip_model.safetensors").read_bytes() == weights
    assert [step_of(path) for path in checkpoints(out)] == [8, 6]


def test_none_is_intact(tiny: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(), out, quiet=True)
    for path in checkpoints(out):
        flip_a_bit(path)
    for _ in range(2):  # nor is the run begun anew the second time
        with pytest.raises(InputError, match=r"holds no intact checkpoint: start the run anew"):
            train(tiny(), out, resume=True, quiet=True)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_are_kept_and_the_best(tiny: MakeRecipe, tmp_path: Path, keep: int) -> None:
    recipe = tiny("clip", f"engine.keep={keep}", "engine.save_seconds=0")
    train(recipe, tmp_path / "run", quiet=True)
    found = checkpoints(tmp_path / "run")
    assert (len(found), step_of(found[0])) == (keep, 8)
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").is_file()


def test_of_another_recipe_format_or_version(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    train(tiny(), one, quiet=True)
    train(tiny("clip", "optimizer.lr=0.01"), other, quiet=True)
    path = checkpoints(one)[0]
    shutil.copyfile(checkpoints(other)[0], path)
    with pytest.raises(InputError, match=r"another recipe \(optimizer.lr = 0.01 there, 0.001 now\)"):
        train(tiny(), one, resume=True, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 2)
        with pytest.raises(InputError, match=r"is of format 1, this version of declip reads format 2"):
            train(tiny("clip", "optimizer.lr=0.01"), other, resume=True, quiet=True)
    (other / "checkpoints" / "last.pt").write_bytes(b"earlier")
    with pytest.raises(InputError, match="by an earlier version of declip"):
        train(tiny("clip", "optimizer.lr=0.01"), other, resume=True, quiet=True)


def test_nothing_in_it_is_executed(tmp_path: Path, tiny: MakeRecipe) -> None:
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path, 1, {"format": 1, "evil": Path("x")})
    with pytest.raises(InputError, match="cannot be read") as error:
        read_newest(tmp_path, tiny(), None, lambda *_: True)
    assert "\n" not in str(error.value)


# Written in the background


def test_the_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is that of the moment, whatever becomes of it while it is written; one is written at a time."""
    (tmp_path / "checkpoints").mkdir()
    go_on, write = threading.Event(), saving.write_checkpoint

    def slow(*arguments: Any) -> None:
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(saving, "write_checkpoint", slow)
    with Saver(tmp_path, 2) as saver:
        weight = torch.zeros(3)
        saver.save(1, {"weight": weight, "steps": [1]}, {})
        assert saver.busy
        weight.fill_(7)
        assert not checkpoints(tmp_path)
        go_on.set()
        saver.wait()
        assert not saver.busy
    assert torch.load(checkpoints(tmp_path)[0])["weight"].tolist() == [0, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
@pytest.mark.parametrize("yields", [False, True])
def test_it_is_written_when_nothing_else_wants_the_processor(
    tmp_path: Path, yields: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step that goes on meanwhile keeps the priority that it had."""
    (tmp_path / "checkpoints").mkdir()
    here, there = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), []

    def noted(*_: Any) -> None:
        there.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr(saving, "write_checkpoint", noted)
    with Saver(tmp_path, 2, yields=yields) as saver:
        saver.save(1, {}, {})
    assert there == [19 if yields else here]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.EACCES, "cannot be written (Permission denied)"), (errno.EROFS, "(Read-only file system)")],
)
def test_read_only_folder(
    tiny: MakeRecipe, tmp_path: Path, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Administrators may write anywhere, so the answer of the system is put in; the run can go on afterwards."""
    train(tiny(), tmp_path / "whole", quiet=True)
    write = checkpoint.write_atomically

    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "step_00000004.pt":
            raise OSError(code, os.strerror(code), str(path))
        write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", refused)
        with pytest.raises(InputError) as error:
            train(tiny(), tmp_path / "run", quiet=True)
    assert says in str(error.value)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [2, 0]
    train(tiny(), tmp_path / "run", resume=True, quiet=True)
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny: MakeRecipe, small_disk: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "whole", quiet=True)
    size = checkpoints(tmp_path / "whole")[0].stat().st_size
    ballast = small_disk / "ballast"
    room = shutil.disk_usage(small_disk).free
    with ballast.open("wb") as file:
        file.truncate(0)
        file.write(b"\0" * (room - 2 * size))
    with pytest.raises(OSError, match="No space left"):
        train(tiny(), small_disk / "run", quiet=True)
    assert checkpoints(small_disk / "run")
    assert not list((small_disk / "run" / "checkpoints").glob(".*"))
    ballast.unlink()
    train(tiny(), small_disk / "run", resume=True, quiet=True)
    weights = [(run / "open_clip_model.safetensors").read_bytes() for run in (tmp_path / "whole", small_disk / "run")]
    assert weights[0] == weights[1]
