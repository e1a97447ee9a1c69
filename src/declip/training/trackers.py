"""Where a recipe asks for it, rows go to Weights & Biases and MLflow too: engine.trackers = ["wandb", "mlflow"]."""

from __future__ import annotations

import importlib
import importlib.util
import json
import uuid
from pathlib import Path
from typing import Protocol

from declip.errors import InputError, first_line
from declip.files import write_atomically
from declip.recipe import Recipe

STORED = "trackers.json"  # in the run folder: what each tracker calls this run


class Tracker(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class WandB:
    """A run of wandb, gone on with where `run_id` is stored already."""

    def __init__(self, recipe: Recipe, out: Path, run_id: str | None) -> None:
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self.run = importlib.import_module("wandb").init(
            project="declip",
            name=out.resolve().name,
            id=self.run_id,
            resume="allow",
            dir=str(out),
            config=recipe.model_dump(mode="json"),
        )
        # A run that goes back writes earlier steps again; as wandb's own step they would be dropped.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def finish(self) -> None:
        self.run.finish()


class MLflow:
    """A run of mlflow, gone on with where `run_id` is stored already."""

    def __init__(self, recipe: Recipe, out: Path, run_id: str | None) -> None:
        self.mlflow = importlib.import_module("mlflow")
        run = self.mlflow.start_run(run_id=run_id, run_name=None if run_id else out.resolve().name)
        self.run_id: str = run.info.run_id
        if not run_id:
            self.mlflow.log_dict(recipe.model_dump(mode="json"), "recipe.json")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.mlflow.log_metrics(scalars, step=step)

    def finish(self) -> None:
        self.mlflow.end_run()


TRACKERS: dict[str, type[WandB] | type[MLflow]] = {"wandb": WandB, "mlflow": MLflow}


def check_trackers(recipe: Recipe) -> None:
    """Raises InputError where a tracker that the recipe asks for is not installed."""
    for name in recipe.engine.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"engine.trackers asks for {name}, which is not installed: pip install {name}, or leave it out."
            )


def start_trackers(recipe: Recipe, out: Path) -> dict[str, Tracker]:
    """The trackers that the recipe asks for, by name; a resumed run goes on with the runs that it began.

    Raises InputError where one cannot start, for example for want of a login.
    """
    stored = json.loads((out / STORED).read_text()) if (out / STORED).is_file() else {}
    started: dict[str, Tracker] = {}
    for name in dict.fromkeys(recipe.engine.trackers):
        try:
            tracker = TRACKERS[name](recipe, out, stored.get(name))
        except Exception as error:  # of the tracker's own kinds, and of those of the network
            raise InputError(f"engine.trackers: {name} cannot start: {first_line(error)}.") from None
        stored[name], started[name] = tracker.run_id, tracker
    if started:
        text = json.dumps(stored)
        write_atomically(out / STORED, lambda path: path.write_text(text))
    return started
