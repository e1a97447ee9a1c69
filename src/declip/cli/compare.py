"""`declip compare`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.cli.terminal import (
    add_columns,
    columns_said,
    command,
    console,
    folder,
    is_override,
    is_rank,
    positive,
    whole,
)
from declip.compare.quick import NAMES_AS_THEY_ARE, QUICK
from declip.errors import InputError

if TYPE_CHECKING:
    from declip.compare.grid import Asked
    from declip.compare.prepare import Prepared
    from declip.compare.schedule import Told


def add_compare(commands: Any) -> None:
    example = (
        "declip compare clip declip --data pairs.parquet --eval test.parquet --fractions 1,1/2,1/4 --out runs/worth\n"
        "  declip compare --quick --out runs/quick"
    )
    about = (
        "what each pair is worth: train recipes on fractions of the pairs, several seeds each, and compare the curves"
    )
    parser = command(commands, "compare", _compare, about, example)
    parser.add_argument(
        "recipes",
        metavar="RECIPE",
        nargs="*",
        help="shipped recipes' names or TOML files, the base first; path=value changes a field of all, "
        "NAME:path=value of one",
    )
    parser.add_argument(
        "--data", nargs="+", action="extend", metavar="DATA", help="training pairs, as declip train takes"
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        action="extend",
        metavar="DATA",
        dest="judged",
        help="pairs to judge on, never trained on; not given: a share of the training pairs, set aside",
    )
    parser.add_argument(
        "--aside", type=float, default=0.1, metavar="SHARE", help="without --eval: share of the pairs (%(default)s)"
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="folder of cells and report; the same one goes on")
    _add_grid(parser)
    _add_ablation(parser)
    parser.add_argument(
        "--metric", default="mean", choices=["mean", "r1", "r5", "r10"], help="recall at 1, 5, 10, or their mean (mean)"
    )
    parser.add_argument("--jobs", type=whole, metavar="N", help="runs at a time (one a core, or two a GPU)")
    parser.add_argument(
        "--allow-overlap", action="store_true", help="judge on pictures that are trained on all the same"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="embedded pairs, three fractions, one seed, equal pairs seen alone: some minutes",
    )
    parser.add_argument("--plan", action="store_true", help="only say what would be run; write nothing")
    add_columns(parser)
    parser.set_defaults(rest="recipes")


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fractions", metavar="F,…", help="of the training pairs, nested (1,1/2,1/4,1/8,1/16)")
    parser.add_argument("--seeds", type=whole, metavar="N", help="runs of every cell, each on a subset of its own (3)")
    parser.add_argument(
        "--rates",
        metavar="X,…",
        help="factors on each recipe's learning rates, searched at the smallest and the largest fraction on held-out "
        "pairs; one factor: no search (0.5,1,2)",
    )
    parser.add_argument(
        "--pairs-seen",
        type=whole,
        metavar="N",
        help="by the base's runs, whatever the fraction (its recipe's schedule)",
    )
    parser.add_argument(
        "--lengths", metavar="X,…", default="1", help="of all methods' runs, times --pairs-seen (%(default)s)"
    )
    parser.add_argument(
        "--no-equal-compute",
        action="store_true",
        help="do not also run costlier methods for as long as costs what the base costs",
    )
    parser.add_argument("--base", metavar="RECIPE", help="whom the others are measured against (the first)")


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ablate", action="append", default=[], metavar="RECIPE", help="its terms, each off and alone")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="'RECIPE path=value …'",
        help="another row of the ablation; may be given again",
    )


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    asked = _asked(args)
    from declip.compare.prepare import check_folder, prepare
    from declip.compare.run import compare, plan
    from declip.progress import progress_bar

    if args.out is not None:
        check_folder(asked.out)
    with progress_bar() as progress:
        prepared = prepare(asked, progress)
    planned = plan(prepared)
    if not args.json:
        _print_plan(prepared, planned)
    if args.plan:
        return planned
    with _whole_grid() as told:
        result = compare(prepared, args.metric, told)
    if not args.json:
        _print_results(result)
    return result


def _asked(args: argparse.Namespace) -> Asked:
    """What the command line says; raises InputError where it contradicts itself."""
    lists = {name: getattr(args, name) or [] for name in ("recipes", "data", "judged")}
    overrides = [item for items in lists.values() for item in items if is_override(item, of_one=True)]
    given = {name: [item for item in items if item not in overrides] for name, items in lists.items()}
    wanted = given | {name: getattr(args, name) for name in ("fractions", "seeds", "rates", "pairs_seen")}
    if args.quick:
        wanted = {name: value or QUICK[name] for name, value in wanted.items()}
    embedded = args.quick and wanted["data"] == QUICK["data"]
    for name, what in (("recipes", "recipes"), ("data", "--data")):
        if not wanted[name]:
            raise InputError(f"The following arguments are required: {what}; declip compare --help shows an example.")
    if not 0 < args.aside < 1:
        raise InputError(f"--aside {args.aside:g} is no share of the pairs: give a number between 0 and 1.")
    if args.out is None and not args.plan:
        raise InputError("The following arguments are required: --out; declip compare --help shows an example.")
    if is_rank():
        raise InputError("declip compare starts its runs itself, --jobs at a time: leave torchrun out.")
    from declip.compare.grid import Asked, parse_fractions

    common = columns_said(args)
    own: dict[str, tuple[str, ...]] = {}
    for item in overrides:
        name, colon, change = item.partition(":") if ":" in item.partition("=")[0] else ("", "", item)
        if colon:
            own[name] = (*own.get(name, ()), change)
        else:
            common.append(change)
    if embedded and "declip" in wanted["recipes"]:
        own["declip"] = (*NAMES_AS_THEY_ARE, *own.get("declip", ()))
    optional = {
        "fractions": parse_fractions(wanted["fractions"]) if wanted["fractions"] else None,
        "seeds": wanted["seeds"],
        "rates": _factors("--rates", wanted["rates"]) if wanted["rates"] else None,
    }
    return Asked(
        recipes=tuple(wanted["recipes"]),
        data=tuple(wanted["data"]),
        judged=tuple(wanted["judged"]),
        out=Path(args.out or "."),
        base=args.base,
        aside=args.aside,
        changes=tuple(common),
        own=own,
        lengths=_factors("--lengths", args.lengths),
        pairs_seen=wanted["pairs_seen"],
        ablate=tuple(args.ablate),
        variants=tuple(_variant(text) for text in args.variant),
        jobs=args.jobs,
        allow_overlap=args.allow_overlap or embedded,
        equal_compute=not (args.no_equal_compute or args.quick),
        **{name: value for name, value in optional.items() if value},
    )


def _factors(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({positive(part) for part in text.split(",")}))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{option}: {error}.") from None


def _variant(text: str) -> tuple[str, tuple[str, ...]]:
    recipe, *changes = text.split()
    if not changes:
        raise InputError(f"--variant {text!r} changes nothing: write 'RECIPE path=value'.")
    return recipe, tuple(changes)


@contextlib.contextmanager
def _whole_grid() -> Iterator[Told]:
    """One bar on stderr for all cells."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    stderr, left = Console(stderr=True), (TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *left)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("cells", total=None)

        def told(done: float, total: float, cells: int, of: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{cells} of {of} cells")

        yield told


def _print_plan(prepared: Prepared, planned: dict[str, Any]) -> None:
    from rich.console import Console

    stderr = Console(stderr=True)
    fractions = ", ".join(f"{fraction} ({pairs:,} pairs)" for fraction, pairs in planned["pairs"].items())
    names = ", ".join(method.name for method in prepared.methods[1:])
    against = f"{names} against {prepared.base.name}" if names else prepared.base.name
    seeds = f"{prepared.asked.seeds} seed{'s' * (prepared.asked.seeds > 1)}"
    stderr.print(f"{against}, {seeds}, on {fractions}.")
    reused = f", {planned['finished']} of them finished already" if planned["finished"] else ""
    stderr.print(
        f"{planned['cells']} cells{reused}; {prepared.jobs} at a time, {planned['pairs_seen']:,} pairs seen by each."
    )
    for note in planned["notes"]:
        stderr.print(note, style="yellow")


def _print_results(result: dict[str, Any]) -> None:
    from rich.table import Table

    from declip.compare.summary import TITLES, headline, said_factor, said_quality, views_of

    out = console()
    fractions = sorted(result["pairs"], key=result["pairs"].__getitem__)
    out.print(f"{result['metric'].capitalize()}, in percent; factors with their 95 % intervals.")
    for judged in result["judged"]:
        for view in views_of(result, judged):
            table = Table("pairs", title=f"{judged}: {TITLES[view].lower()}", title_justify="left")
            for fraction in fractions:
                table.add_column(f"{result['pairs'][fraction]:,}\n({fraction})", justify="right")
            table.add_column(f"worth, at what {result['base']}\nreaches with all", justify="right")
            own = {line["method"]: line for line in result["lines"] if (line["judged"], line["view"]) == (judged, view)}
            for name in (method["name"] for method in result["methods"]):
                points = {point["fraction"]: point for point in own[name]["points"]} if name in own else {}
                said = [said_quality(result, name, fraction, points) for fraction in fractions]
                factor = said_factor(headline(result, own[name])) if name in own and name != result["base"] else ""
                if name in own or "diverged" in said:
                    table.add_row(name, *said, factor)
            out.print(table)
    _print_ablation(result)
    for row in result["diverged"]:
        where = f"{row['method']}, {row['fraction']} of the pairs, seed {row['seed']}"
        print(f"Diverged, and not counted: {where}: {row['reason']}.")
    for note in result["notes"]:  # some were said hours ago, and some cells only can tell
        print(f"Note: {note}")
    print(f"The report: {result['report']}")


def _print_ablation(result: dict[str, Any]) -> None:
    from rich.table import Table

    from declip.compare.summary import ABLATED, ablation_rows

    if not result["ablation"]:
        return
    table = Table(title="Ablation", title_justify="left")
    for number, heading in enumerate(ABLATED):
        table.add_column(heading.lower(), justify="right" if number > 1 else "left")
    for row in ablation_rows(result):
        table.add_row(*row)
    console().print(table)
