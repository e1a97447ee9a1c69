"""What a run does so that no work is lost: its checkpoints, and steps that would spoil the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from declip.terms import Section


class Safety(Section):
    """The part of a recipe's engine that is about this."""

    save_seconds: float = Field(
        60.0, ge=0, description="seconds between two checkpoints; each evaluation makes one too"
    )
    keep: int = Field(
        2, gt=0, description="how many checkpoints are kept, the newest; the best weights are kept besides"
    )
    explosion: float = Field(
        5.0,
        ge=0,
        description="a step is skipped where its loss is this much above the average of the last 100 or so; 0 = never. "
        "Where the loss or its gradient is not a number, it always is",
    )
    skip_limit: int = Field(
        10, ge=0, lt=100, description="more skipped steps than this among the last 100 mean that the run has diverged"
    )
    on_divergence: Literal["stop", "roll_back"] = Field(
        "stop", description="what then: stop, or go back to the last good checkpoint with a lower learning rate"
    )
    roll_back_lr: float = Field(0.5, gt=0, lt=1, description="factor on the learning rate at each going back")
    roll_backs: int = Field(3, gt=0, description="after this many goings back the run stops")
