"""From a plan to a run folder with its report: judge, train, judge again."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import declip
from declip.data.sources import Source
from declip.evaluation.report.training import Hit, ModelResult, Query, write_report
from declip.finetune.judge import Asking, Change, Verdict, changes, judge
from declip.finetune.prepare import NOTES, Prepared
from declip.model.pretrained import load
from declip.progress import Progress
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.step import pick_device

REPORT = "report.html"
BEFORE, CHANCE, AFTER = "before", "guessing", "fine-tuned"


def run(prepared: Prepared, out: Path, quiet: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Train into `out` and say what it changed; `report.html` is written there too.

    Returns ``{"run", "report", "data", "plan", "training", "results": [Change, …]}``, all but the first two as plain
    values. Raises what `training.loop.train` raises.
    """
    before = _judged(prepared, prepared.before, BEFORE, progress) if prepared.before else None
    beside = {NOTES: prepared.notes()}
    summary = train(prepared.recipe, out, resume=prepared.asked.resume, quiet=quiet, beside=beside)
    gc.collect()
    after = _judged(prepared, str(out), AFTER, progress)
    found = changes(before, after, prepared.tests)
    _write(prepared, out, summary, found, before, after)
    return {
        "run": str(out),
        "report": str(out / REPORT),
        "data": prepared.look,
        "plan": prepared.plan,
        "training": summary,
        "results": [change.as_json() for change in found],
    }


def _judged(prepared: Prepared, spec: str, name: str, progress: Progress | None) -> Verdict:
    if prepared.held is None and not prepared.tests:
        return Verdict()
    model = load(spec, str(pick_device(prepared.recipe.engine.device)))
    model.name = name
    verdict = judge(model, prepared.held, prepared.tests, progress)
    del model
    gc.collect()
    return verdict


def _write(
    prepared: Prepared, out: Path, summary: dict[str, Any], found: list[Change], before: Verdict | None, after: Verdict
) -> None:
    first = BEFORE if before is not None else CHANCE
    seconds, speed = summary["seconds"], summary["samples_per_second"]
    models = [
        ModelResult(first, _figures(found, at_start=True), 0, 0.0, 0.0, 0.0),
        ModelResult(
            AFTER,
            _figures(found, at_start=False),
            summary["pairs_seen"],
            seconds,
            speed,
            summary["peak_memory_gb"],
            read_metrics(out),
        ),
    ]
    asked = {AFTER: after.asked, **({BEFORE: before.asked} if before is not None else {})}
    intro = "The same pairs, held out of training, before and after. In the examples a picture counts as right where "
    intro += "the caption is its own."
    if before is None:
        intro += " Before, the towers share no space: what guessing gives stands in the place of a model."
    write_report(
        out / REPORT,
        title=f"{prepared.asked.model} fine-tuned",
        intro=intro,
        models=models if found else models[1:],
        queries=_queries(prepared.held, asked) if prepared.held is not None else [],
        facts=_facts(prepared, summary),
        commands=[
            ("Judge it on other pairs", f"declip evaluate {out} DATA --against {prepared.asked.model}")
            if before is not None
            else ("Judge it on other pairs", f"declip evaluate {out} DATA"),
            ("Fine-tune it further", f"declip finetune {out} DATA --out DIR"),
        ],
    )


def _figures(found: list[Change], at_start: bool) -> dict[str, float]:
    """Metrics by the report's names: plain those of the held-out pairs, the sets' own with the set in front."""
    figures: dict[str, float] = {}
    for number, change in enumerate(found):
        start = change.chance if change.before is None else change.before
        prefix = "" if number == 0 and change.task == "retrieval" else f"{Path(change.data).name} "
        figures |= {prefix + name: value for name, value in (start if at_start else change.after).items()}
    return figures


def _queries(held: Source, asked: dict[str, list[Asking]]) -> list[Query]:
    """The same captions for each model; pictures as they are stored."""
    found = []
    for number, asking in enumerate(asked[AFTER]):
        hits = {name: [_hit(held, place, right) for place, right in _found(own[number])] for name, own in asked.items()}
        found.append(Query(asking.text, hits))
    return found


def _found(asking: Asking) -> list[tuple[int, bool]]:
    return list(zip(asking.places, asking.right, strict=True))


def _hit(held: Source, place: int, right: bool) -> Hit:
    pair = held[place]
    return Hit(pair.image, pair.captions[0], right)


def _facts(prepared: Prepared, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Data, plan and outcome for the report's last section."""
    facts = [("model", prepared.asked.model), ("data", ", ".join(prepared.recipe.data.train)), *prepared.rows]
    facts += [(row["path"], f"{shown(row['value'])}: {row['reason']}") for row in prepared.plan]
    facts.append(("steps", f"{summary['steps']:,}; the weights of step {summary['best_step']:,} are kept"))
    if "trained_share" in summary:
        facts.append(("kept of what was trained", f"{summary['trained_share']:.0%}, the rest as at the start"))
    return [*facts, ("declip", declip.__version__)]


def shown(value: Any) -> str:
    """A recipe's value for people."""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
