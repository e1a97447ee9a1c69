"""Starting several ranks, by `--gpus N` or torchrun, and what can go wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TERMS, TINY, write_one_broken

from declip.errors import InputError
from declip.recipe import Recipe
from declip.training import distributed, launch
from declip.training.distributed import joined_ranks, local_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs, one of them broken."""
    folder = tmp_path_factory.mktemp("launch")
    write_one_broken(folder / "pairs.parquet")
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    recipe = folder / "long.toml"
    recipe.write_text(f'name = "clip"\n{TINY}\n{TERMS["clip"]}\n'.replace("pairs_seen = 64", "pairs_seen = 800000"))
    command = [sys.executable, "-m", "declip", "train", str(recipe), f"data.train={str(folder / 'pairs.parquet')!r}"]
    command += ["data.broken_limit=0.1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rank_of(process: int) -> str | None:
    found = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{process}/environ").read_bytes())
    return found[1].decode() if found else None


@pytest.mark.skipif(sys.platform != "linux", reason="finds the rank in /proc")
def test_a_killed_rank_ends_all_and_is_named_once(folder: Path) -> None:
    launcher = start(folder, "--out", str(folder / "long"), "--gpus", "2", "--json")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    metrics = folder / "long" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    ranks = [int(process) for process in children.read_text().split()]
    os.kill(next(process for process in ranks if rank_of(process) == "1"), signal.SIGKILL)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, out) == (1, "")
    sentences = [line for line in err.splitlines() if not line.startswith("skipped: ")]
    assert len(sentences) == 1, err
    assert sentences[0].startswith("declip: Rank 1 was ended by SIGKILL, mostly because memory ran out")
    assert not any(Path(f"/proc/{process}").exists() for process in ranks)


@pytest.mark.parametrize(
    ("codes", "killed", "answer"),
    [
        ([0, 0], set(), 0),
        ([2, 3], set(), 2),
        ([3, 2], set(), 2),
        ([130, 130], set(), 130),
        ([-9, 2], {0}, 2),
        ([3, 3], set(), 1),
        ([1, -6], set(), 1),
    ],
)
def test_one_exit_code_answers_for_all(codes: list[int], killed: set[int], answer: int) -> None:
    assert launch._answer(codes, killed) == answer


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def become(rank: int = 0, count: int = 2, port: int = 1) -> None:
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return become


def refused(recipe: Recipe) -> str:
    with pytest.raises(InputError) as error, joined_ranks(recipe):
        pass
    return str(error.value)


def test_a_batch_that_cannot_be_split(tiny: Callable[..., Recipe], as_rank: Callable[..., None]) -> None:
    as_rank(count=3)
    assert refused(tiny()) == (
        "schedule.batch_size = 8 cannot be split into 3 equal parts, one for each rank: set it to a multiple of 3."
    )
    as_rank(count=16)
    assert "into 16 equal parts" in refused(tiny())
    as_rank(count=8)
    assert refused(tiny("clip", "data.mix=0.3")) == (
        "data.mix mixes the pictures of a rank two by two, and each has 1: set schedule.batch_size to a multiple of 16."
    )


def test_sharding_needs_several_ranks(tiny: Callable[..., Recipe]) -> None:
    assert refused(tiny("clip", "engine.shard=true")) == (
        "engine.shard shares a model out among several ranks, and there is one: start more (--gpus N or torchrun), or "
        "set engine.shard=false."
    )


def test_a_port_in_use(tiny: Callable[..., Recipe], as_rank: Callable[..., None]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        as_rank(port=port)
        says = f"The ranks cannot meet at 127.0.0.1:{port}, the port is in use: give another (MASTER_PORT)."
        assert refused(tiny()) == says


def test_variables_that_are_missing(
    tiny: Callable[..., Recipe], as_rank: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank()
    monkeypatch.delenv("MASTER_ADDR")
    assert "The ranks cannot meet: " in refused(tiny())
    assert "Start them with torchrun or --gpus." in refused(tiny())


def test_the_device_of_a_rank(as_rank: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("cuda:1") == "cuda:1"
    as_rank(rank=1)
    for gpus, name, device in ((0, "auto", "cpu"), (2, "auto", "cuda:1"), (2, "cuda", "cuda:1"), (2, "cpu", "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert local_device(name) == device
    with pytest.raises(InputError, match="'cuda:0' is one device, for one rank"):
        local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="This machine has 1 GPUs, and more ranks were started on it: start 1, or"):
        local_device("auto")


def test_the_first_rank_that_fails_speaks(as_rank: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        count = 0

        def add(self, key: str, by: int) -> int:
            self.count += by
            return self.count

    class Gone:
        def add(self, *_: Any) -> int:
            raise RuntimeError

    assert distributed.speaks()
    as_rank(rank=1)
    assert not distributed.speaks()  # before the ranks have met
    monkeypatch.setattr(distributed, "_store", Store())
    assert [distributed.speaks(), distributed.speaks()] == [True, False]
    monkeypatch.setattr(distributed, "_store", Gone())
    assert distributed.speaks()  # rank 0, which counts, is gone
    as_rank(rank=2)
    assert not distributed.speaks()
