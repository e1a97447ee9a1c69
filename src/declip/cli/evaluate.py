"""`declip evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import declip
from declip.cli.terminal import add_columns, add_root, command, console, whole
from declip.errors import InputError
from declip.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from declip.evaluation.details import Overlap
    from declip.evaluation.judged import Judged
    from declip.evaluation.sets import TestSet
    from declip.evaluation.suite import Evaluation
    from declip.progress import Progress

MODEL = "a run folder, open_clip's name:pretrained or folder, a Hugging Face folder, a released DeCLIP file"
_FORMATS = (".html", ".json", ".csv", ".md", ".tex")


def add_evaluate(commands: Any) -> None:
    example = "declip evaluate runs/mine test.parquet --against runs/other --save report.html"
    about = "judge models: retrieval, zero-shot classification, linear probes, with intervals and a report"
    parser = command(commands, "evaluate", _evaluate, about, example)
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="*",
        help="parquet files, tar shards, caption tables beside images, image folders, Hugging Face datasets, "
        "demo:NAME, or the name of a known set, see --list",
    )
    parser.add_argument("--against", action="append", default=[], metavar="MODEL", help="another model, side by side")
    parser.add_argument(
        "--task",
        action="append",
        metavar="TASK",
        help="retrieval, zero-shot or linear-probe; may be given again (default: whatever the data allows)",
    )
    _add_probe(parser)
    _add_known(parser)
    add_columns(parser)
    _add_labels(parser)
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
        "--rerank",
        type=whole,
        default=0,
        metavar="K",
        help="put the first K hits of each query in order with what a text finds in the image, for models trained with "
        "terms.text_conditioned",
    )
    parser.add_argument(
        "--leaks",
        choices=("auto", "off", "all"),
        default="auto",
        help="look for test pictures among those that a run was trained on (auto: where these are 200,000 at most)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of image towers; bfloat16 is nearly twice as fast on processors that know it (%(default)s)",
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
    add_root(parser)
    parser.add_argument("--list", action="store_true", help="list the known sets, what they need, and which are found")
    parser.add_argument("--download", action="store_true", help="fetch known sets that are not there into --root")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", metavar="COL", help="name of the label column")
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


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if args.list:
        return _list(args)
    if args.model is None or not args.data:
        raise InputError("Name a model and what to judge it on, as in: declip evaluate runs/mine test.parquet.")
    if missing := next((path for path in args.save if not path.parent.is_dir()), None):
        raise InputError(f"{missing} cannot be written: there is no folder {missing.parent}.")
    pictured = any(path.suffix == ".html" for path in args.save)
    if args.robustness and not pictured:
        raise InputError("--robustness is part of the report: say --save report.html.")
    from declip.evaluation.opening import open_tests
    from declip.evaluation.statistics import RESAMPLES
    from declip.evaluation.suite import Asked, evaluate_models
    from declip.pairs import Data

    asked = Asked(args.task, args.template, args.shots, args.seed, pictured, args.robustness, args.rerank)
    options = Data(image=args.image, captions=args.captions, label=args.label, key=args.key)
    tests = open_tests(args.data, args.task, options, train=args.train, root=args.root, fetch=args.download)
    models = [args.model, *args.against]
    with progress_bar() as progress:
        found = evaluate_models(models, tests, asked, progress, args.precision)
        overlaps = [] if args.leaks == "off" else _overlaps(models, tests, args.leaks == "all", progress)
    result = {**found.rows(), "overlaps": [asdict(overlap) for overlap in overlaps]}
    found, overlaps = _with_short_names(found, overlaps)  # from here on for people
    facts = [
        ("declip", declip.__version__),
        ("Precision of image towers", args.precision),
        ("Prompts", ", ".join(args.template) if args.template else "each set's own, else openai's 80"),
        ("Intervals", f"95 %, {RESAMPLES:,} draws, seed {args.seed}"),
        ("Read from", ", ".join(args.data)),
    ]
    for path in args.save:
        _save(path, found, overlaps, facts, result)
    if not args.json:
        _print_results(found, overlaps)
    return result


def _with_short_names(found: Evaluation, overlaps: Sequence[Overlap]) -> tuple[Evaluation, list[Overlap]]:
    """Models and sets that are called by the last part of their path, where this tells them apart."""
    models = _last_parts([judged.model for judged in found.results] + [one.model for one in overlaps])
    sets = _last_parts([judged.data for judged in found.results])

    def renamed(one: Any) -> Any:
        return replace(one, model=models[one.model], data=sets[one.data])

    short = replace(
        found,
        results=[renamed(one) for one in found.results],
        details=[renamed(one) for one in found.details],
        comparisons=[
            replace(one, models=(models[one.models[0]], models[one.models[1]]), data=sets[one.data])
            for one in found.comparisons
        ],
    )
    return short, [renamed(one) for one in overlaps]


def _last_parts(names: Sequence[str]) -> dict[str, str]:
    """What each name is called: itself, unless the last parts of all of them differ."""
    names = list(dict.fromkeys(names))
    last = [Path(name).name or name for name in names]
    return dict(zip(names, last if len(set(last)) == len(last) else names, strict=True))


def _overlaps(models: Sequence[str], tests: Sequence[TestSet], unbounded: bool, progress: Progress) -> list[Overlap]:
    """For each run folder and set, which test images were trained on."""
    from declip.curation.overlap import MOST, overlap
    from declip.evaluation.details import Overlap
    from declip.recipe import load_recipe
    from declip.training.pairs import open_pairs

    found: list[Overlap] = []
    looked_at: dict[int, Any] = {}
    by_data: dict[str, list[Overlap]] = {}  # runs on the same pairs are looked through once
    for model in models:
        recipe = Path(model.removeprefix("local-dir:")) / "recipe.toml"
        if not recipe.is_file():
            continue
        data = load_recipe(str(recipe)).data
        key = data.model_dump_json()
        if key not in by_data:
            try:
                train, _ = open_pairs(data)
            except InputError as error:  # the pairs may lie on another machine
                why = str(error)
                by_data[key] = [Overlap(model, test.name, len(test.source), 0, 0, (), False, why) for test in tests]
            else:
                most = len(train) if unbounded else MOST
                by_data[key] = [
                    overlap(model, test.name, test.source, train, progress, looked_at, most) for test in tests
                ]
        found += [replace(one, model=model) for one in by_data[key]]
    return found


def _save(
    path: Path, found: Evaluation, overlaps: Sequence[Overlap], facts: list[tuple[str, str]], result: dict[str, Any]
) -> None:
    import json

    from declip.evaluation.tables import as_csv, as_latex, as_markdown
    from declip.files import write_atomically

    if path.suffix == ".html":
        from declip.evaluation.published import published_rows
        from declip.evaluation.report.evaluation import write_evaluation_report

        tasks = dict.fromkeys((judged.data, judged.task) for judged in found.results)
        published = [row for data, task in tasks for row in published_rows(data, task)]
        write_evaluation_report(path, found.results, found.details, found.comparisons, overlaps, published, facts)
        return
    texts: dict[str, Callable[[Sequence[Judged]], str]] = {
        ".json": lambda _: json.dumps(result, indent=1),
        ".csv": as_csv,
        ".md": as_markdown,
        ".tex": as_latex,
    }
    text = texts[path.suffix](found.results)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), several=True)


def _print_results(found: Evaluation, overlaps: Sequence[Overlap]) -> None:
    """A table for each task, in percent with 95 % intervals; retrieval has a row for each direction."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    models = list(dict.fromkeys(judged.model for judged in found.results))
    if len(models) == 1:
        out.print(Text(f"Model: {models[0]}"))
    for task in dict.fromkeys(judged.task for judged in found.results):
        judged = [one for one in found.results if one.task == task]
        table = Table("data", title=f"{task} (%, 95 % interval)", title_justify="left")
        if len(models) > 1:
            table.add_column("model", overflow="fold")
        for heading in ("images", "unreadable"):
            table.add_column(heading, justify="right")
        columns = list(dict.fromkeys(name for one in judged for row in _by_direction(one).values() for name in row))
        both_ways = task == "retrieval"
        if both_ways:
            table.add_column("from → to")
        for heading in columns:
            table.add_column(heading, justify="right")
        for one in judged:
            shots = f", {one.settings['shots']} a class" if "shots" in one.settings else ""
            first: list[str | Text] = [Text(one.data + shots, overflow="fold")]
            first += [Text(one.model)] if len(models) > 1 else []
            first += [f"{one.items:,}", f"{one.undecodable:,}"]
            for way, figures in _by_direction(one).items():
                table.add_row(*first, *([way] if both_ways else []), *(figures.get(name, "–") for name in columns))
                first = [""] * len(first)
        out.print(table)
    for line in _remarks(found, overlaps):
        out.print(Text(line))


def _by_direction(judged: Judged) -> dict[str, dict[str, str]]:
    """``text_to_image_r5`` as ``{"text → image": {"R@5": …}}``, ``top1`` as ``{"": {"top-1": …}}``."""
    from declip.evaluation.judged import direction, metric_name
    from declip.evaluation.tables import shown

    found: dict[str, dict[str, str]] = {}
    for name in judged.metrics:
        way = next((way for way in judged.ranks if name.startswith(f"{way}_")), "")
        head = direction(way)
        found.setdefault(head, {})[metric_name(name).removeprefix(f"{head} ")] = shown(judged, name)
    return found


def _remarks(found: Evaluation, overlaps: Sequence[Overlap]) -> list[str]:
    """What tables do not say: who is ahead, what was trained on, what could not be read."""
    from declip.evaluation.judged import metric_name

    lines = []
    for one in found.comparisons:
        low, high = one.interval
        sure = "" if low > 0 or high < 0 else ": no difference that these items can show"
        lines.append(
            f"{one.data}, {one.task}, {metric_name(one.metric)}: {one.models[0]} less {one.models[1]} is "
            f"{one.difference:+.1f} ({low:+.1f} to {high:+.1f}, p = {one.p:.2g}){sure}"
        )
    lines += list(dict.fromkeys(found.notes))  # each model has its own
    for copy in overlaps:
        if not copy.checked:
            lines.append(f"{copy.data} was not compared with what {copy.model} was trained on: {copy.reason}")
        elif copy.exact or copy.near:
            lines.append(
                f"Of {copy.data}, {copy.exact:,} of {copy.items:,} images also are among the training pairs of "
                f"{copy.model}, and {copy.near:,} nearly so: its figures may be too good."
            )
    broken = {one.data: one.broken for one in found.results if one.undecodable}
    lines += [f"{data}: unreadable images count as missed; the first: {first[0]}" for data, first in broken.items()]
    return lines


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from declip.evaluation.datasets import listing

    rows = listing(args.root)
    if not args.json:
        from rich.table import Table
        from rich.text import Text

        table = Table("set", "tasks", "metric", "found", "needs, under --root", "from")
        for row in rows:
            cells = [
                row["name"],
                ", ".join(row["tasks"]),
                row["metric"],
                row["found"] or "–",
                row["needs"],
                row["source"],
            ]
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        console().print(table)
    return {"root": str(args.root), "sets": rows}
