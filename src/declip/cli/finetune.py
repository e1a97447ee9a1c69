"""`declip finetune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.cli.terminal import (
    add_columns,
    add_root,
    columns_said,
    command,
    console,
    folder,
    is_override,
    is_rank,
    positive,
)
from declip.errors import InputError
from declip.progress import progress_bar

if TYPE_CHECKING:
    from declip.finetune.prepare import Asked, Prepared


def add_finetune(commands: Any) -> None:
    example = "declip finetune ViT-B-32:openai photos/ --general flickr8k --out runs/mine"
    about = "fit pretrained weights to your own pairs, with nothing to choose: looks, plans, trains, tells what changed"
    parser = command(commands, "finetune", _finetune, about, example)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, open_clip's name:pretrained or folder, a Hugging Face folder, a released file; or two "
        "towers as IMAGE+TEXT, say tf_efficientnet_lite0+minilm/; or a recipe whose model section names inits",
    )
    parser.add_argument(
        "data", metavar="DATA", nargs="*", help="pairs as declip train takes them; path=value changes a field"
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="the run folder; not needed with --plan")
    add_columns(parser)
    parser.add_argument(
        "--minutes",
        type=positive,
        metavar="M",
        help="time for all of it; a few steps are timed and the plan made to fit",
    )
    parser.add_argument(
        "--general",
        action="append",
        default=[],
        metavar="SET",
        help="a known set (declip evaluate --list) or pairs that the model shall not forget: judged before and after; "
        "may be given again",
    )
    add_root(parser)
    parser.add_argument("--resume", action="store_true", help="go on where the run in DIR stopped")
    parser.add_argument("--plan", action="store_true", help="only say what would be done and why; write nothing")
    parser.set_defaults(rest="data")


def _finetune(args: argparse.Namespace) -> dict[str, Any]:
    asked = _asked(args)
    from declip.finetune.prepare import prepare

    with progress_bar() as progress:
        prepared = prepare(asked, progress)
    if not args.json:
        _print_plan(prepared)
    if args.plan:
        return {"model": asked.model, "data": prepared.look, "plan": prepared.plan}
    from declip.finetune.run import run

    assert asked.out is not None
    with progress_bar() as progress:
        result = run(prepared, asked.out, args.json, progress)
    if not args.json:
        _print_results(result)
    return result


def _asked(args: argparse.Namespace) -> Asked:
    """What the command line says; raises InputError where it contradicts itself."""
    overrides = [item for item in args.data if is_override(item)]
    data = [item for item in args.data if item not in overrides]
    if not data:
        raise InputError(
            "No data was given: name pairs, as in: declip finetune ViT-B-32:openai photos/ --out runs/mine."
        )
    if args.out is None and not args.plan:
        raise InputError("The following arguments are required: --out; declip finetune --help shows an example.")
    if args.plan and args.resume:
        raise InputError("--plan says what a new run would do and --resume goes on with one: leave one of them out.")
    if is_rank():
        raise InputError("declip finetune trains as one process; for several, train DIR/recipe.toml with declip train.")
    from declip.finetune.prepare import Asked

    return Asked(
        model=args.model,
        data=data,
        overrides=[*columns_said(args), *overrides],
        out=None if args.out is None else Path(args.out),
        minutes=args.minutes,
        general=args.general,
        root=args.root,
        resume=args.resume,
    )


def _print_plan(prepared: Prepared) -> None:
    from rich.table import Table
    from rich.text import Text

    from declip.finetune.run import shown

    out = console()
    table = Table(show_header=False, title="Your pairs", title_justify="left")
    for name, value in prepared.rows:
        table.add_row(name, Text(value))
    out.print(table)
    table = Table("field", "value", "why", title="The plan", title_justify="left")
    for row in prepared.plan:
        table.add_row(Text(row["path"]), Text(shown(row["value"]), overflow="fold"), Text(row["reason"]))
    out.print(table)


def _print_results(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from declip.evaluation.judged import metric_name

    table = Table("set", "metric", title="Before and after, in percent", title_justify="left")
    started = any(change["before"] is not None for change in result["results"])
    for heading in ("before" if started else "before: chance", "after", "change"):
        table.add_column(heading, justify="right")
    for change in result["results"]:
        start = change["chance"] if change["before"] is None else change["before"]
        sure = {one["metric"]: one["interval"] for one in change["differences"]}
        first = f"{change['data']} ({change['items']:,})"
        for name, value in change["after"].items():
            if name.endswith("_median_rank") or name not in start:
                continue
            difference = f"{value - start[name]:+.1f}"
            if name in sure:
                low, high = sure[name]
                difference += f" ({low:+.1f} to {high:+.1f})"
            table.add_row(
                Text(first, overflow="fold"), metric_name(name), f"{start[name]:.1f}", f"{value:.1f}", difference
            )
            first = ""
        table.add_section()
    if result["results"]:
        console().print(table)
    else:
        print("No pairs were held out and no --general set named: nothing was judged.")
    training = result["training"]
    if "trained_share" in training:
        print(f"Kept: {training['trained_share']:.0%} of what was trained, the rest as at the start.")
    print(f"The model is in {result['run']}, the report: {result['report']}")
