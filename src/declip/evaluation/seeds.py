"""Runs that differ in their seed alone, taken together: how a method does, not one draw of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from declip.evaluation.judged import Judged
from declip.evaluation.statistics import over_seeds


def same_but_for_seed(models: Sequence[Any]) -> list[list[str]]:
    """Run folders among the models whose recipes differ in nothing but the seed: groups of two and more."""
    from declip.recipe import load_recipe

    groups: dict[str, list[str]] = {}
    for model in models:
        if isinstance(model, str | Path):
            recipe = Path(str(model).removeprefix("local-dir:")) / "recipe.toml"
            if recipe.is_file():
                alike = load_recipe(str(recipe)).model_copy(update={"seed": 0}).model_dump_json()
                groups.setdefault(alike, []).append(str(model))
    return [group for group in groups.values() if len(group) > 1]


def over_runs(results: Sequence[Judged], groups: Sequence[Sequence[str]]) -> list[Judged]:
    """For each group, set and task the mean over its runs.

    Intervals are Student's, of the mean over seeds, and do not know how sure the test items are; the setting
    `deviations` has the standard deviations of single runs.
    """
    found = []
    for group in groups:
        own: dict[tuple[str, str, Any], list[Judged]] = {}
        for judged in results:
            if judged.model in group:
                own.setdefault((judged.data, judged.task, judged.settings.get("shots")), []).append(judged)
        for (data, task, shots), runs in own.items():
            figures = {name: over_seeds([run.metrics[name] for run in runs]) for name in runs[0].metrics}
            found.append(
                Judged(
                    f"{group[0]} and {len(group) - 1} more seeds",
                    data,
                    task,
                    runs[0].items,
                    runs[0].skipped,
                    runs[0].undecodable,
                    {name: figure.mean for name, figure in figures.items()},
                    {name: (figure.low, figure.high) for name, figure in figures.items()},
                    settings={
                        "runs": len(runs),
                        **({"shots": shots} if shots else {}),
                        "deviations": {name: figure.deviation for name, figure in figures.items()},
                    },
                )
            )
    return found
