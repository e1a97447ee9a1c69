"""`declip evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.cli.terminal import command, console, progress_bar
from declip.errors import InputError

if TYPE_CHECKING:
    from declip.evaluation.judged import Judged
    from declip.evaluation.suite import Evaluation

MODEL = "a run folder, open_clip's name:pretrained or folder, a Hugging Face folder, a released DeCLIP file"
_FORMATS = (".html", ".json", ".csv", ".md", ".tex")


def add_evaluate(commands: Any) -> None:
    example = "declip evaluate runs/mine test.parquet --against ViT-B-32:laion2b_s34b_b79k --save report.html"
    about = "judge models: retrieval, zero-shot classification, linear probes, with intervals and a report"
    parser = command(commands, "evaluate", _evaluate, about, example)
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="*",
        help="parquet files, tar shards, caption tables beside images, image folders, Hugging Face datasets, demo:NAME, "
        "or the name of a known set, see --list",
    )
    parser.add_argument("--against", action="append", default=[], metavar="MODEL", help="another model, side by side")
    parser.add_argument(
        "--task",
        action="append",
        metavar="TASK",
        help="retrieval, zero-shot or linear-probe; may be given again (default: what there are captions or labels for)",
    )
    _add_probe(parser)
    _add_known(parser)
    _add_columns(parser)
    parser.add_argument(
        "--save",
        action="append",
        default=[],
        type=_saved,
        metavar="FILE",
        help=f"write results to a file, which its ending chooses: {', '.join(_FORMATS)}; .html is the report with "
        "pictures; may be given again",
    )
    parser.add_argument(
        "--robustness", action="store_true", help="also judge blurred, noisy, compressed and dark pictures"
    )
    parser.add_argument(
        "--leaks",
        choices=("auto", "off", "all"),
        default="auto",
        help="look for test pictures among those that a run was trained on (auto: where these are 200,000 at most)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and intervals (%(default)s)")
    parser.set_defaults(rest="data")


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train", action="append", default=[], metavar="DATA", help="labelled pairs that linear probes learn from"
    )
    parser.add_argument(
        "--shots", type=_shots, default=[], metavar="K,…", help="also probe with so many pairs a class, say 1,2,4,8,16"
    )


def _add_known(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR", help="where known sets lie (%(default)s)")
    parser.add_argument("--list", action="store_true", help="list the known sets, what they need, and which are found")
    parser.add_argument("--download", action="store_true", help="fetch known sets that are not there into --root")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="COL", help="name of the image column")
    parser.add_argument("--captions", action="append", default=[], metavar="COL", help="name of a caption column")
    parser.add_argument("--label", metavar="COL", help="name of the label column")
    parser.add_argument("--key", metavar="COL", help="name of the key column")
    parser.add_argument(
        "--template",
        action="append",
        metavar="STR",
        help="zero-shot prompt with {} for the class, or a set: openai (80 prompts, the default), simple (7)",
    )


def _saved(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of {', '.join(_FORMATS)}")
    return path


def _shots(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers above 0, as 1,2,4")
    return sorted({int(part) for part in parts})
