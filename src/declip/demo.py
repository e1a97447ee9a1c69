"""`declip demo`: train CLIP and what wins on few pairs, judge both on an artist neither has seen."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.data.sources import open_sources
from declip.errors import InputError
from declip.files import check_unused
from declip.pairs import Data
from declip.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from declip.evaluation.report.training import ModelResult, Query

TRAIN, TEST = ["demo:noto", "demo:twemoji"], "demo:fluent3d"
BEST = "best-small"
NAMES = {"clip": "CLIP", BEST: "declip's best"}
# Pairs that both methods see for each minute asked for. On two ordinary CPU cores the whole demo, both methods, the
# judging and the report, then ends well within those minutes.
PAIRS_PER_MINUTE = 4_000
QUERIES = [
    "red heart",
    "crying cat",
    "smiling face",
    "woman with red hair",
    "pizza",
    "green apple",
    "clock",
    "moon",
    "hand",
    "white flower",
    "musical instrument",
    "person in sports",
]
FILLERS = {"a", "an", "in", "of", "the", "with"}  # words of a query that no keyword has to match


def demo_recipe(method: str, minutes: float) -> Recipe:
    """The recipe of one of the two methods, with the pairs that `minutes` allow."""
    pairs = round(PAIRS_PER_MINUTE * minutes)
    overrides = [f"data.train={TRAIN!r}", "data.holdout=0", f"schedule.pairs_seen={pairs}"]
    return load_recipe(method, overrides)


def run_demo(out: str | Path, minutes: float = 10.0, quiet: bool = False) -> dict[str, Any]:
    """Train both, judge both on unseen pictures, write `report.html`; returns the figures.

    Raises InputError where `out` holds files already or the budget is too small for a single step.
    """
    from rich.console import Console

    from declip.evaluation import evaluate
    from declip.evaluation.report.training import ModelResult
    from declip.model.pretrained import load
    from declip.training.logging import read_metrics
    from declip.training.loop import train

    out, console = Path(out), Console(stderr=True, quiet=quiet)
    recipes = {method: demo_recipe(method, minutes) for method in NAMES} if minutes > 0 else {}
    if not recipes:
        raise InputError(f"--minutes {minutes:g} leaves no time to train: give a number above 0.")
    check_unused(out)
    results, models = [], {}
    for method, name in NAMES.items():
        console.print(f"[bold]{name}[/bold]: {recipes[method].about}")
        summary = train(recipes[method], out / method, quiet=quiet)
        gc.collect()
        models[name] = load(out / method)
        metrics = evaluate(models[name], [TEST], ["retrieval"])["results"][0]["metrics"]
        results.append(
            ModelResult(
                name=name,
                metrics=metrics,
                pairs_seen=summary["pairs_seen"],
                seconds=summary["seconds"],
                pairs_per_second=summary["samples_per_second"],
                peak_memory_gb=summary["peak_memory_gb"],
                history=read_metrics(out / method),
            )
        )
    report = out / "report.html"
    _write_report(report, recipes[BEST], results, find_pictures(models))
    if not quiet:
        _print_table(results)
        print("\nGo on with:", *(f"  {command}   # {what}" for what, command in next_commands(out)), sep="\n")
    fields = ("name", "metrics", "pairs_seen", "seconds", "pairs_per_second", "peak_memory_gb")
    return {
        "report": str(report),
        "models": [
            {"run": str(out / method), **{f: getattr(r, f) for f in fields}}
            for method, r in zip(NAMES, results, strict=True)
        ],
    }


def find_pictures(models: dict[str, Any], queries: list[str] = QUERIES, top: int = 5) -> list[Query]:
    """For each query the `top` unseen pictures of each model; right where name and keywords hold every word of it."""
    from declip.data.decode import decode_image
    from declip.evaluation.report.training import Hit, Query

    source = open_sources([TEST], Data())
    pairs = [source[index] for index in range(len(source))]
    images = [decode_image(pair.image) for pair in pairs]
    ranked = {}
    for name, model in models.items():
        similarity = model.encode_text(queries) @ model.encode_image(images).T
        ranked[name] = similarity.topk(top, dim=-1).indices.tolist()
    found = []
    for number, query in enumerate(queries):
        hits = {
            name: [Hit(pairs[i].image, pairs[i].captions[0], matches(query, pairs[i].captions)) for i in rows[number]]
            for name, rows in ranked.items()
        }
        found.append(Query(query, hits))
    return found


def matches(query: str, captions: tuple[str, ...]) -> bool:
    """Whether the captions hold every word of the query, fillers aside."""
    words = set(" ".join(captions).lower().replace(",", " ").replace(":", " ").split())
    return set(query.lower().split()) - FILLERS <= words


def _write_report(path: Path, recipe: Recipe, results: list[ModelResult], queries: list[Query]) -> None:
    from declip.evaluation.report.training import write_report

    image, text = recipe.model.image, recipe.model.text
    facts = [
        ("Training pairs", "3,812: the emoji of two artists, Noto and Twemoji, with their names and keywords"),
        ("Test pairs", "1,852: the same concepts by an artist never seen in training, Fluent Emoji 3D"),
        ("Image tower", f"{image.layers} layers × {image.width}, {image.image_size} px"),
        ("Text tower", f"{text.layers} layers × {text.width}"),
        ("Pairs seen", f"{results[0].pairs_seen:,} by each model"),
        ("Recipes", f"clip and {BEST} (declip recipes NAME shows every field)"),
    ]
    write_report(
        path,
        title="CLIP and declip's best from the same pairs",
        intro="Two models, the same towers, the same pairs, from random weights. Judged on pictures by an artist that "
        "neither has seen. A picture counts as right where its name and keywords hold every word of the query.",
        models=results,
        queries=queries,
        facts=facts,
        commands=next_commands(path.parent),
    )


def _print_table(results: list[ModelResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Retrieval on 1,852 unseen pictures (Fluent Emoji 3D)")
    table.add_column("")
    for heading in ("text→image\nR@1/5/10 %", "image→text\nR@1/5/10 %", "pairs\nseen", "seconds", "pairs/s", "GB"):
        table.add_column(heading, justify="right")
    for result in results:
        recalls = [
            " ".join(f"{result.metrics[f'{way}_r{k}']:.1f}" for k in (1, 5, 10))
            for way in ("text_to_image", "image_to_text")
        ]
        cost = (result.pairs_seen, round(result.seconds), round(result.pairs_per_second))
        table.add_row(result.name, *recalls, *(f"{figure:,}" for figure in cost), f"{result.peak_memory_gb:.1f}")
    Console().print(table)


def next_commands(out: Path) -> list[tuple[str, str]]:
    """What to do after the demo: (what it does, the command)."""
    return [
        ("Train on your own pairs", f"declip train {BEST} data.train=pairs.parquet --out runs/mine"),
        ("Judge a model on pairs", f"declip evaluate {out / BEST} pairs.parquet"),
        ("Open the report", f"{'open' if sys.platform == 'darwin' else 'xdg-open'} {out / 'report.html'}"),
    ]
