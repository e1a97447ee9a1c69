"""Memory that a step frees is there for the next one."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from declip import memory

PAGES = """
import resource, sys
import torch
from declip.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(16):  # until the small rests that come of alignment are taken
    torch.ones(2**25)  # 128 MB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

RESIDENT = """
from pathlib import Path
import torch
from declip.data.workers import read_ahead
from declip.memory import keep_freed_memory

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024

class Items(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return resident()

assert keep_freed_memory()
at_first = resident()
torch.ones(2**27)  # 512 MB, freed at once
print(resident() - at_first, next(iter(read_ahead(Items(), range(1), 1))) - at_first, resident() - at_first)
"""

SAID = "from declip.memory import keep_freed_memory; print(keep_freed_memory())"


def python(*arguments: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", *arguments], env=inherited | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_not_paged_in_again() -> None:
    given_back, kept = int(python(PAGES, "give back")), int(python(PAGES, "keep"))
    assert kept < given_back / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_loader_processes_inherit_no_freed_memory() -> None:
    kept, of_worker, left = map(int, python(RESIDENT).split())
    assert kept > 450
    assert of_worker < 100
    assert left < 100


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_malloc_stays(name: str) -> None:
    value = "131072" if name.startswith("MALLOC") else "glibc.malloc.trim_threshold=131072"
    assert python(SAID, **{name: value}) == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="it is not known elsewhere")
@pytest.mark.parametrize(
    ("limit", "used", "stat", "files"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_free_memory_is_that_of_the_machine_or_of_its_group(
    limit: str, used: str, stat: str, files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    of_machine = memory.free_bytes()
    assert of_machine is not None
    assert 2**20 < of_machine <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory").mkdir()
    (tmp_path / used).write_text("700\n")
    (tmp_path / stat).write_text(f"anon 400\n{files} 300\n")
    (tmp_path / limit).write_text("1000\n")
    assert memory.free_bytes() == 600
    (tmp_path / limit).write_text("max\n")
    unlimited = memory.free_bytes()
    assert unlimited is not None
    assert unlimited > 2**20
