"""The command line: parse, call one function, print.

Nothing heavy is imported before a command runs, so that ``declip --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import declip
from declip.cli.compare import add_compare
from declip.cli.data import add_data
from declip.cli.evaluate import MODEL, add_evaluate
from declip.cli.finetune import add_finetune
from declip.cli.terminal import command, console, folder, is_rank, positive
from declip.cli.train import add_train
from declip.errors import RANK_LOST, InputError, Preempted, RankLost, RunStopped

DONE, STOPPED, BROKEN_PIPE, WRONG_INPUT, INTERRUPTED = 0, 1, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 stopped from outside, 2 wrong input, 130 interrupted."""
    _write_utf8()
    if not is_rank():
        return _run(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is said in one sentence, not in frames
    from declip.training.distributed import leave, only_first_prints

    only_first_prints()
    return leave(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parse(argv)
        if args.json:
            # Whatever a library prints goes to stderr, so that stdout holds one JSON object and nothing else.
            with contextlib.redirect_stdout(sys.stderr):
                result = _result(args)
            print(json.dumps(_plain(result), allow_nan=False))
        else:
            _result(args)
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error))
    except RankLost as error:
        return RANK_LOST if "DECLIP_LAUNCHED" in os.environ else _fail(str(error), STOPPED)
    except RunStopped as error:
        return _fail(str(error), STOPPED)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # the ranks stop together
            print("declip: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not complain again when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            return _fail(f"the disk is full{where}: make room and run the command again.")
        if error.errno is None or not error.filename:
            return _crashed()
        return _fail(f"{error.filename}: {error.strerror}.")
    except Exception:
        return _crashed()
    return int(args.code)


def _result(args: argparse.Namespace) -> Any:
    """The command's result; for a run that SIGTERM has stopped, that it was."""
    try:
        return args.run(args)
    except Preempted as error:
        if os.environ.get("RANK", "0") == "0":  # the ranks stop together
            print(f"declip: {error}", file=sys.stderr)
        return {"preempted": True}


def _crashed() -> int:
    """A mistake of ours: the traceback, from one of several ranks."""
    if not is_rank():
        raise
    if _speaks():
        traceback.print_exc()
    return STOPPED


def _fail(sentence: str, code: int = WRONG_INPUT) -> int:
    if _speaks():
        print(f"declip: {sentence}", file=sys.stderr)
    return code


def _speaks() -> bool:
    """Whether this process says what went wrong: of several ranks one does."""
    if not is_rank():
        return True
    from declip.training.distributed import speaks

    return speaks()


def _write_utf8() -> None:
    """TOML and JSON that go into a file or a pipe are UTF-8 on every system."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON knows it: no NaN or infinity (null instead), no paths, no tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one sentence, like every other error, instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:].rstrip('.')}; {self.prog} --help shows an example.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="declip",
        description="Train CLIP-style models with few pairs, judge them and use them.",
        epilog="example:\n  declip demo --minutes 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"declip {declip.__version__}")
    parser.set_defaults(run=lambda args: parser.print_help(), json=False, rest=None, code=DONE)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (_add_demo, add_train, add_finetune, add_compare, add_evaluate, add_data, _add_convert, _add_recipes):
        add(commands)
    args, extras = parser.parse_known_args(argv)
    # argparse takes the values of `train RECIPE a=1 --out DIR b=2` in one piece only; the later ones come back here.
    if extras and (not args.rest or any(extra.startswith("-") for extra in extras)):
        parser.error(f"unknown argument {next((e for e in extras if e.startswith('-')), extras[0])}")
    if args.rest:
        getattr(args, args.rest).extend(extras)
    return args


def _add_demo(commands: Any) -> None:
    about = "train CLIP and what wins on few pairs on embedded pairs, judge both on unseen pictures, write a report"
    parser = command(commands, "demo", _demo, about, "declip demo --out demo-run --minutes 10")
    parser.add_argument(
        "--out", type=folder, default="demo-run", metavar="DIR", help="folder for the runs and the report (%(default)s)"
    )
    parser.add_argument("--minutes", type=positive, default=10.0, metavar="N", help="about how long (%(default)g)")


def _add_convert(commands: Any) -> None:
    about = "turn a model into an open_clip or a Hugging Face folder"
    parser = command(commands, "convert", _convert, about, "declip convert yfcc15m_vitb32_declip.pth.tar declip-vitb32")
    parser.add_argument("source", metavar="SRC", help=MODEL)
    parser.add_argument("folder", type=folder, metavar="DST", help="the new folder")
    parser.add_argument(
        "--to", default="open_clip", metavar="FORMAT", help="open_clip or huggingface (default: %(default)s)"
    )
    for tower in ("image", "text"):
        parser.add_argument(
            f"--{tower}-heads",
            type=int,
            metavar="N",
            help=f"attention heads of a released file's {tower} tower (default: width / 64)",
        )


def _add_recipes(commands: Any) -> None:
    about = "list the recipes, or print one with every field explained, as a TOML file to change and train"
    parser = command(commands, "recipes", _recipes, about, "declip recipes declip > mine.toml")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a shipped recipe's name or a TOML file")


def _demo(args: argparse.Namespace) -> dict[str, Any]:
    from declip.demo import run_demo

    summary: dict[str, Any] = run_demo(args.out, minutes=args.minutes, quiet=args.json)
    return summary


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from declip.model.convert import convert

    result = convert(args.source, args.folder, args.to, args.image_heads, args.text_heads)
    if not args.json:
        from rich.table import Table

        table = Table(show_header=False)
        for name, value in result.items():
            shown = ", ".join(value) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
            table.add_row(name.replace("_", " "), str(shown or "none"))
        console().print(table)
    return result


def _recipes(args: argparse.Namespace) -> dict[str, Any]:
    from declip.recipe import Recipe, load_recipe, shipped

    if args.name is None:
        recipes = [load_recipe(name) for name in shipped()]
        if not args.json:
            _print_recipes(recipes)
        return {
            "recipes": [
                {
                    "name": recipe.name,
                    "about": recipe.about,
                    "terms": {name: term.model_dump(mode="json") for name, term in recipe.terms.active().items()},
                }
                for recipe in recipes
            ]
        }
    from declip.explain import commented_toml, explain

    recipe: Recipe = load_recipe(args.name)
    if not args.json:
        print(commented_toml(recipe), end="")
    return {"name": recipe.name, "about": recipe.about, "fields": explain(recipe)}


def _print_recipes(recipes: Sequence[Any]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    out = console()
    headings = ["recipe", "what it is", "terms (weight)"]
    table = Table(*headings[: 3 if out.width >= 160 else 2], box=SIMPLE, pad_edge=False)
    for recipe in recipes:
        terms = [f"{name} ({term.weight:g})" for name, term in recipe.terms.active().items()]
        table.add_row(*[recipe.name, recipe.about, ", ".join(terms)][: len(table.columns)])
    out.print(table)
    out.print(
        "Their fields: declip recipes NAME. To the letter of paper or public code: method=paper, method=reference."
    )
