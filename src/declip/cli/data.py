"""``declip data``: what is in a set of pairs, and better sets made of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.cli.terminal import command, console, folder, whole
from declip.errors import InputError
from declip.progress import progress_bar

if TYPE_CHECKING:
    from declip.pairs import Data

PAIRS = "tar shards, parquet or Arrow files, caption tables, image folders, URLs; data.NAME=value sets an option"


def add_data(commands: Any) -> None:
    """Add ``declip data`` and its own commands."""
    parser = commands.add_parser("data", help="look into pairs, drop copies, pack into fast shards")
    parser.set_defaults(run=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (_add_inspect, _add_dedup, _add_pack, _add_verify):
        add(commands)


def _add_inspect(commands: Any) -> None:
    about = "say what is in a set of pairs, what is wrong with it and what to do about it; writes report.html"
    example = "declip data inspect pairs.parquet --test test.parquet --batch-size 512 --out inspection"
    parser = _about_pairs(commands, "inspect", _inspect, about, example)
    parser.add_argument(
        "--out", type=folder, default="inspection", metavar="DIR", help="folder for report.html (%(default)s)"
    )
    run = "of the run that the pairs are for (%(default)s)"
    parser.add_argument("--batch-size", type=whole, default=256, metavar="N", help=f"batch size {run}")
    parser.add_argument("--image-size", type=whole, default=224, metavar="N", help=f"image size in pixels {run}")
    parser.add_argument("--context-length", type=whole, default=77, metavar="N", help=f"tokens of a caption {run}")
    parser.add_argument("--sample", type=whole, metavar="N", help="look at N pairs only, drawn at random")


def _add_dedup(commands: Any) -> None:
    about = "write a set without copies, near-duplicates, broken pairs and what is in a test set"
    example = "declip data dedup pairs.parquet --test test.parquet --out unique"
    parser = _about_pairs(commands, "dedup", _dedup, about, example)
    parser.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="folder for the new set, empty or not there"
    )
    parser.add_argument("--exact", action="store_true", help="leave near-duplicates in: only drop equal images")
    parser.add_argument("--equal-keys", action="store_true", help="also drop pairs with a key of the test set")
    parser.add_argument(
        "--own-captions", action="store_true", help="do not give the pair that stays the captions of its copies"
    )


def _add_pack(commands: Any) -> None:
    about = "write pairs to fast tar shards with their index, a manifest and checksums; run again, it goes on"
    parser = command(commands, "pack", _pack, about, "declip data pack pairs.parquet packed --resize 256")
    parser.add_argument("data", metavar="SRC", nargs="+", help=PAIRS)
    parser.add_argument("folder", metavar="DST", help="folder for the shards, empty, not there or a pack to finish")
    parser.add_argument(
        "--resize", type=whole, metavar="N", help="make the shorter side of larger images N pixels (default: keep all)"
    )
    parser.add_argument("--quality", type=whole, default=90, metavar="N", help="of resized JPEGs (%(default)s)")
    parser.add_argument(
        "--shard-pairs", type=whole, metavar="N", help="pairs of a shard (default: 10,000 or what takes 256 MB)"
    )
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="processes (%(default)s)")


def _add_verify(commands: Any) -> None:
    about = "compare the shards of a pack with the checksums of its manifest; exit code 1 where they differ"
    parser = command(commands, "verify", _verify, about, "declip data verify packed")
    parser.add_argument("folder", type=folder, metavar="DIR", help="what declip data pack wrote")


def _about_pairs(commands: Any, name: str, run: Any, about: str, example: str) -> argparse.ArgumentParser:
    parser = command(commands, name, run, about, example)
    parser.add_argument("data", metavar="DATA", nargs="+", help=PAIRS)
    parser.add_argument("--test", action="append", default=[], metavar="DATA", help="a set that training must not see")
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="processes (%(default)s)")
    parser.set_defaults(rest="data")
    return parser


def _is_option(item: str) -> bool:
    return item.startswith("data.") and "=" in item


def _sources(args: argparse.Namespace) -> tuple[list[str], Data]:
    """What was named, and the options among it."""
    from declip.recipe import parse_data

    options = list(filter(_is_option, args.data))
    specs = [item for item in args.data if item not in options]
    if not specs:
        raise InputError("No data was given: name files or folders of pairs.")
    return specs, parse_data(options)


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    specs, data = _sources(args)
    from declip.curation.inspect import inspect, print_inspection

    with progress_bar() as progress:
        result = inspect(
            specs,
            data,
            Path(args.out),
            test=args.test,
            batch_size=args.batch_size,
            image_size=args.image_size,
            context_length=args.context_length,
            workers=args.workers,
            sample=args.sample,
            progress=progress,
        )
    if not args.json:
        print_inspection(result, console())
        print(f"Pictures of what was found: {Path(args.out) / 'report.html'}")
    return result


def _dedup(args: argparse.Namespace) -> dict[str, Any]:
    specs, data = _sources(args)
    from declip.curation.dedup import dedup

    with progress_bar() as progress:
        result = dedup(
            specs,
            Path(args.out),
            data,
            test=args.test,
            near=not args.exact,
            equal_keys=args.equal_keys,
            merge_captions=not args.own_captions,
            workers=args.workers,
            progress=progress,
        )
    if not args.json:
        _print_kept(result)
    return result


def _pack(args: argparse.Namespace) -> dict[str, Any]:
    # An option may stand behind DST, whose place is the last of what are no options.
    named = [*args.data, args.folder]
    *sources, last = [item for item in named if not _is_option(item)]
    args.data, args.folder = [*sources, *filter(_is_option, named)], last
    if not sources:
        raise InputError("Only one of SRC and DST was given: name pairs and then a folder for the shards.")
    if "://" in last:
        raise InputError(f"DST {last!r} is a URL, and only local folders are written to.")
    specs, data = _sources(args)
    from declip.curation.pack import pack, print_packed

    with progress_bar() as progress:
        result = pack(
            specs,
            Path(args.folder),
            data,
            resize=args.resize,
            quality=args.quality,
            shard_pairs=args.shard_pairs,
            workers=args.workers,
            progress=progress,
        )
    if not args.json:
        print_packed(result, console())
    return result


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from declip.curation.verify import print_verified, verify

    with progress_bar() as progress:
        result = verify(Path(args.folder), progress)
    if not args.json:
        print_verified(result, console())
    args.code = 0 if result["whole"] else 1
    return result


def _print_kept(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_row("pairs", f"{result['pairs']:,}")
    for reason, count in result["removed"].items():
        table.add_row(f"left out: {reason}", f"{count:,}")
    table.add_row("kept", f"{result['kept']:,}")
    console().print(table)
    print(f"The new set is in {result['out']}; what was left out, and why: {result['out']}/log/removed.jsonl")
