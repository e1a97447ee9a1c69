"""The command line: help, exit codes, sentences, JSON, recipes that survive a round trip."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from declip.cli import main
from declip.recipe import load_recipe, parse_recipe, shipped

COMMANDS = ("demo", "train", "finetune", "evaluate", "convert", "recipes")
Capture = pytest.CaptureFixture[str]


def sentence(capsys: Capture) -> str:
    """The one line on stderr, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("declip: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A training loop that only notes what it was asked for; ``action`` may be replaced."""
    module = types.ModuleType("declip.training.loop")
    module.calls = []
    module.action = lambda: print("a chatty library")

    def train(recipe: Any, out: str, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
        module.calls.append((recipe, out, resume, quiet))
        module.action()
        return {"out": Path(out), "score": float("nan"), "steps": 3}

    module.train = train
    monkeypatch.setitem(sys.modules, "declip.training.loop", module)
    return module


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_has_an_example(command: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    assert "example:\n  declip " in capsys.readouterr().out


def test_no_command_prints_help(capsys: Capture) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: declip")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "clop", "--out", "x"], "There is no recipe 'clop': give a TOML file or one of clip"),
        (
            ["train", "clip", "schedule.epoch=3", "--out", "x"],
            "no field schedule.epoch; the nearest is schedule.epochs.",
        ),
        (["train", "clip", "schedule.epochs=many", "--out", "x"], "schedule.epochs = 'many' is wrong"),
        (["train", "clip", "--out", "x", "schedule.epochs=-1"], "schedule.epochs = -1 is wrong"),
        (["train", "clip", "--out", "x", "stray"], "'stray' is not an override: write path=value"),
        (["train", "clip"], "required: --out; declip train --help shows an example."),
        (["train", "clip", "--out", "x", "--fast"], "nknown argument --fast"),
        (["recipes", "nope"], "There is no recipe 'nope'"),
        (["evaluate", "m", "d", "--task", "magic"], "There is no task 'magic'"),
        (["evaluate", "m", "nowhere.parquet"], "nowhere.parquet"),
        (["demo", "--minutes", "soon"], "'soon' is not a positive number"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_wrong_input(argv: list[str], says: str, flags: list[str], training: types.ModuleType, capsys: Capture) -> None:
    assert main([*argv, *flags]) == 2
    assert says in sentence(capsys)
    assert not training.calls


def test_train(training: types.ModuleType, capsys: Capture) -> None:
    assert main(["train", "clip", "seed=3", "--out", "there", "schedule.epochs=2", "--resume"]) == 0
    ((recipe, out, resume, quiet),) = training.calls
    assert (recipe.seed, recipe.schedule.epochs, out, resume, quiet) == (3, 2.0, "there", True, False)
    assert "declip evaluate there DATA" in capsys.readouterr().out


def test_json_is_pure(training: types.ModuleType, capsys: Capture) -> None:
    assert main(["train", "clip", "--out", "there", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": "there", "score": None, "steps": 3}
    assert "a chatty library" in err
    assert training.calls[0][3] is True


def fails(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_interrupted(training: types.ModuleType, capsys: Capture) -> None:
    training.action = fails(KeyboardInterrupt())
    assert main(["train", "clip", "--out", "x"]) == 130
    assert "interrupted" in sentence(capsys)


def test_disk_full(training: types.ModuleType, capsys: Capture) -> None:
    training.action = fails(OSError(errno.ENOSPC, "No space left on device", "runs/x/model.pt"))
    assert main(["train", "clip", "--out", "x"]) == 2
    assert "the disk is full while writing runs/x/model.pt" in sentence(capsys)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), RuntimeError("a bug")])
def test_other_errors_propagate(error: Exception, training: types.ModuleType) -> None:
    training.action = fails(error)
    with pytest.raises(type(error)):
        main(["train", "clip", "--out", "x"])


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    module = types.ModuleType("declip.demo")
    module.run_demo = lambda out, minutes, quiet: {"out": out, "minutes": minutes, "quiet": quiet}
    monkeypatch.setitem(sys.modules, "declip.demo", module)
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": "demo-run", "minutes": 10.0, "quiet": True}


def test_recipes_list(capsys: Capture) -> None:
    assert main(["recipes"]) == 0
    assert "contrastive (1)" in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    recipes = json.loads(capsys.readouterr().out)["recipes"]
    assert [recipe["name"] for recipe in recipes] == shipped()
    assert recipes[0]["terms"]["contrastive"]["weight"] == 1.0


@pytest.mark.parametrize("name", shipped())
def test_printed_recipe_is_the_recipe(name: str, capsys: Capture, tmp_path: Path) -> None:
    assert main(["recipes", name]) == 0
    saved = tmp_path / "mine.toml"
    saved.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(saved) == load_recipe(name)
    assert "peak learning rate (number, > 0)" in saved.read_text(encoding="utf-8")


def test_odd_recipe_survives_too(capsys: Capture, tmp_path: Path) -> None:
    odd = parse_recipe(
        {
            "about": 'quotes " and \\ and\nlines \x7f ü',
            "seed": 7,
            "data": {"train": ["a b.parquet", "ü.csv"], "label": "kind"},
            "model": {"name": "RN50", "image": {"layers": [1, 2], "odd key": {"x": True, "y": 1e-9}}, "text": {}},
            "terms": {"contrastive": {"weight": 0}, "simsiam": {}},
            "optimizer": {"eps": 1e-30},
            "schedule": {"pairs_seen": 10},
        }
    )
    from declip.explain import commented_toml

    saved = tmp_path / "odd.toml"
    saved.write_text(commented_toml(odd), encoding="utf-8")
    assert load_recipe(saved) == odd


def test_every_commented_line_can_be_switched_on(capsys: Capture, tmp_path: Path) -> None:
    main(["recipes", "clip"])
    lines = capsys.readouterr().out.splitlines()
    term = next(number for number, line in enumerate(lines) if line.startswith("# [terms.simsiam]"))
    end = lines.index("", term)
    saved = tmp_path / "on.toml"
    on = [line.removeprefix("# ") for line in lines[term:end]]
    saved.write_text("\n".join([*lines[:term], *on, *lines[end:]]), encoding="utf-8")
    assert "simsiam" in load_recipe(saved).terms.active()


def test_recipe_json_explains_every_field(capsys: Capture) -> None:
    assert main(["recipes", "clip", "--json"]) == 0
    fields = {field["path"]: field for field in json.loads(capsys.readouterr().out)["fields"]}
    assert fields["optimizer.lr"] == {
        "path": "optimizer.lr",
        "value": load_recipe("clip").optimizer.lr,
        "type": "number, > 0",
        "description": "peak learning rate",
    }
    assert fields["engine.precision"]["type"] == '"auto" | "float32" | "bfloat16" | "float16"'
    assert fields["terms.simsiam"]["value"] is None
    assert all(field["description"] for field in fields.values())


def test_broken_pipe() -> None:
    """A reader that stops reading ends the program quietly."""
    code = "import sys; from declip.cli import main; sys.stdin.readline(); sys.exit(main(['recipes', 'clip']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(b"go\n", timeout=60)
    assert (process.returncode, err) == (1, b"")
