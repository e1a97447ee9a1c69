"""What a recipe may say about how a run is computed, and what it does so that no work is lost."""

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


class Engine(Safety):
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps; auto takes the best there is")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="autocast; auto: bfloat16 where the device computes in it, else float32; float16, for GPUs without "
        "bfloat16, with a loss scale",
    )
    threads: int | None = Field(None, gt=0, description="CPU threads for the towers (default: PyTorch's choice)")
    compile: bool = Field(False, description="torch.compile the towers")
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="as many image or text views as the towers compute at once on each rank, with the memory of so "
        "small a batch and the gradients of the whole one: the rest is computed again (GradCache); not set: all",
    )
    grad_checkpointing: bool = Field(
        False, description="keep the inputs of the towers' blocks alone and compute the rest again: less memory"
    )
    shard: bool = Field(
        False,
        description="for towers too large for one GPU: several ranks share out weights, gradients and the optimizer's "
        "state (FSDP2) instead of each holding all",
    )
    sync_batch_norm: bool = Field(
        True,
        description="with several ranks, batch norm sees the global batch, as one process does; false: each rank its "
        "own part (reference), and in the towers each micro-batch",
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="send the rows of metrics.jsonl to these too; they must be installed; nothing is sent unasked"
    )
