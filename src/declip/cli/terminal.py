"""What all commands share: how they are described, progress on stderr, tables on stdout."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


_OVERRIDE = r"[A-Za-z_][\w.]*="
_OF_ONE = r"([A-Za-z0-9][\w.-]*:)?"


def command(commands: Any, name: str, run: Any, about: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.set_defaults(run=run)
    return parser


def add_columns(parser: argparse.ArgumentParser) -> None:
    """How the columns of pairs are called, where they are not found by themselves."""
    parser.add_argument("--image", metavar="COL", help="name of the image column")
    parser.add_argument("--captions", action="append", default=[], metavar="COL", help="name of a caption column")
    parser.add_argument("--key", metavar="COL", help="name of the key column")


def columns_said(args: argparse.Namespace) -> list[str]:
    """What `add_columns` was told, as overrides of a recipe."""
    from declip.training.plan import override

    columns = {"data.image": args.image, "data.captions": args.captions, "data.key": args.key}
    return [override(path, value) for path, value in columns.items() if value]


def is_override(item: str, of_one: bool = False) -> bool:
    """Whether an argument among files says ``path=value`` (`of_one`: maybe ``NAME:path=value``) and is no file."""
    return bool(re.match(_OF_ONE + _OVERRIDE if of_one else _OVERRIDE, item)) and not os.path.exists(item)


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, default=Path("."), metavar="DIR", help="where known sets are (%(default)s)"
    )


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def folder(text: str) -> str:
    """A folder to write to."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is a URL, and only local folders are written to")
    return text


def whole(text: str) -> int:
    """A count on the command line; argparse turns the error into a sentence."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def is_rank() -> bool:
    """Whether this is one of several processes that train together, as torchrun starts them."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def console() -> Console:
    """Tables on stdout; where that is no terminal they are not squeezed into its 80 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)
