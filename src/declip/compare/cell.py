"""One cell in a process of its own: ``python -m declip.compare.cell FOLDER`` trains, judges, and writes what it found.

Exit codes: 0 done or diverged, 2 the input was wrong (the last line on stderr says how), 130 stopped with the state
saved: the same command goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from declip.evaluation.sets import TestSet
    from declip.pairs import Data

SET_ASIDE = "set aside"
"""Names the pairs that ``data.set_aside`` keeps out of training, where no others are to be judged on."""

SPEC, RESULT, RUN = "cell.json", "result.json", "run"
_ROWS = 200  # of a training curve at most


def run_cell(recipe_file: Path, judged: list[str], folder: Path) -> dict[str, Any]:
    """Train into `folder` (or go on there) and judge; returns what the cell's file says."""
    from declip.errors import RunDiverged
    from declip.recipe import load_recipe
    from declip.training.loop import train
    from declip.training.step import compute_dtype, pick_device

    recipe, run = load_recipe(str(recipe_file)), folder / RUN
    going_on = (run / "recipe.toml").is_file()
    if not going_on:
        shutil.rmtree(run, ignore_errors=True)  # of a run that was stopped before it began
    device = pick_device(recipe.engine.device)
    dtype = str(compute_dtype(device, recipe.engine.precision)).removeprefix("torch.")
    computed = {"computed": f"{dtype} on {device.type}"}
    try:
        summary = train(recipe, run, resume=going_on, quiet=True)
    except RunDiverged as error:
        return {"status": "diverged", "reason": error.reason, **computed, **_curves(run)}
    return {"status": "done", "summary": summary, **computed, **_curves(run), "judged": _judge(run, judged, recipe)}


def open_judged(judged: Sequence[str], data: Data) -> list[TestSet]:
    """The sets that a comparison judges on. Raises InputError where one cannot be opened."""
    from declip.evaluation.opening import open_tests
    from declip.evaluation.sets import TestSet
    from declip.training.pairs import pairs_set_aside

    if list(judged) == [SET_ASIDE]:
        return [TestSet(SET_ASIDE, pairs_set_aside(data))]
    return open_tests(list(judged), ["retrieval"], data)


def _judge(run: Path, judged: list[str], recipe: Any) -> dict[str, Any]:
    """Of each set the rank of every query, 0 is best: all figures are made of these."""
    from declip.evaluation.suite import Asked, evaluate_models
    from declip.model.pretrained import load

    tests = open_judged(judged, recipe.data)
    found = evaluate_models([load(run)], tests, Asked(["retrieval"]))
    return {
        one.data: {
            "metrics": {name: round(value, 4) for name, value in one.metrics.items()},
            "ranks": {way: ranks.clamp(max=2**31).tolist() for way, ranks in one.ranks.items()},
            "image_of_text": one.asked.tolist(),
        }
        for one in found.results
    }


def _curves(run: Path) -> dict[str, Any]:
    """The held-out scores, and the losses thinned."""
    from declip.training.logging import read_metrics

    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    trained = [row for row in rows if "terms" in row]
    step = max(1, len(trained) // _ROWS)
    kept = ("pairs", "loss", "terms", "neighbour_matches")
    return {
        "held_out": [{"pairs": row["pairs"], "score": row["held_out"]["score"]} for row in rows if "held_out" in row],
        "losses": [{name: row[name] for name in kept if name in row} for row in trained[::step]],
    }


def _end_with_parent(parent: int) -> None:
    """Stop, with the state saved, when whoever started this is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> int:
    from declip.errors import InputError, Preempted
    from declip.files import write_atomically

    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    spec = json.loads((folder / SPEC).read_text())
    began = time.perf_counter()
    try:
        found = run_cell(folder / "recipe.toml", spec["judged"], folder)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Preempted):
        return 130
    found |= {name: spec[name] for name in ("method", "fraction", "seed", "seen", "rate", "flops_per_pair", "format")}
    # Of a run that was gone on with, what training took before counts too.
    trained = found.get("summary", {}).get("seconds", 0.0)
    found["wall_seconds"] = round(max(time.perf_counter() - began, trained), 1)
    write_atomically(folder / RESULT, lambda path: path.write_text(json.dumps(found)))
    shutil.rmtree(folder / RUN, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
