"""What is imported when: the package and its help cost nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import declip

# Makes every import of these fail, as if they were not installed.
WITHOUT = "import sys; [sys.modules.__setitem__(name, None) for name in {names}]\n"
HEAVY = ("torch", "open_clip", "numpy", "pyarrow", "PIL", "pydantic", "rich")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = run(f"import sys, declip\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_evaluation_and_recipes_do_not_import_torch() -> None:
    code = "import sys, declip.evaluation\nfrom declip import load_recipe\nload_recipe('clip')\n"
    done = run(code + "print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["finetune", "--help"], ["--version"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = f"import runpy; sys.argv = ['declip', *{arguments}]; runpy.run_module('declip', run_name='__main__')"
    done = run(WITHOUT.format(names=HEAVY) + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("usage: declip", "declip "))


def test_recipes_need_no_torch() -> None:
    code = "from declip.cli import main; sys.exit(main(['recipes', 'clip']))"
    done = run(WITHOUT.format(names=("torch", "open_clip")) + code)
    assert done.returncode == 0, done.stderr


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "declip", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"declip {declip.__version__}"


def test_lazy_names() -> None:
    assert {"load", "train", "evaluate", "load_recipe"} <= set(dir(declip))
    assert declip.load_recipe("clip").name == "clip"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = declip.nonsense
