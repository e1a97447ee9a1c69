"""What a recipe may say about learning: the optimizer, its rates, and how they go over a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from declip.terms import Section


class Optimizer(Section):
    kind: Literal["adamw", "muon", "sgd"] = Field(
        "adamw",
        description="AdamW; Muon for matrices and convolutions with Adam for all else; or SGD with Nesterov momentum",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_batch: int = Field(
        0,
        ge=0,
        description="the batch that all rates are meant for: with a smaller schedule.batch_size they are lowered, by "
        "the root of the ratio (sgd: the ratio), with a larger one they stay; 0 = never",
    )
    image_lr: float | None = Field(
        None, ge=0, description="peak learning rate of the image tower; 0 keeps its weights; not set: lr"
    )
    text_lr: float | None = Field(
        None, ge=0, description="peak learning rate of the text tower; 0 keeps its weights; not set: lr"
    )
    projection_lr: float | None = Field(
        None,
        ge=0,
        description="peak learning rate of both towers' projections to the joint space, which start at random where "
        "the towers do not; not set: the tower's",
    )
    head_lr: float | None = Field(
        None, ge=0, description="peak learning rate of the heads of the terms; 0 keeps them; not set: lr"
    )
    logit_scale_lr: float | None = Field(
        None, ge=0, description="peak learning rate of the logit scale; 0 keeps it; not set: lr"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the rate of a tower's layer for each layer between it and the top (BEiT); 1 = none",
    )
    unfreeze: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps in which the towers' layers begin to learn one after the other, from the top "
        "down (ULMFiT); 0 = all at once",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum")
    betas: tuple[float, float] = Field((0.9, 0.98), description="betas of AdamW, and of Muon's Adam")
    eps: float = Field(1e-8, gt=0, description="epsilon of AdamW and Muon")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices")
    start_decay: float = Field(
        0.0,
        ge=0,
        description="decay of weights that a run starts from (model.init) towards what they were, besides weight_decay "
        "towards zero (L2-SP)",
    )
    decay_embeddings: bool = Field(
        False, description="also decay embeddings, class token and attention's input biases, as the reference does"
    )
    clip_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 = never")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, which is then what is judged and becomes the finished "
        "model; 0 = none",
    )
    ema_half_life: float = Field(
        0.0,
        ge=0,
        description="such an average by its half-life instead, as a share of all steps: 0.01 to 0.1 suits runs of any "
        "length; 0 = none",
    )
    ema_update: Literal["after", "before"] = Field(
        "after",
        description="when the average takes the weights in: after each step, with a lower decay in the first ones; or "
        "before it, with the same decay from the first one on, as COSMOS's code does",
    )

    @model_validator(mode="after")
    def _one_average(self) -> Optimizer:
        if self.ema and self.ema_half_life:
            raise ValueError("ema and ema_half_life say the decay of one average: leave one of them out")
        return self

    @property
    def averages(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return bool(self.ema or self.ema_half_life)

    def ema_decay(self, steps: int) -> float:
        """Of a run of so many steps: what is left of the average after a step."""
        return float(0.5 ** (1 / max(1.0, self.ema_half_life * steps))) if self.ema_half_life else self.ema


class Schedule(Section):
    epochs: float = Field(32.0, gt=0, description="passes over the training pairs")
    pairs_seen: int | None = Field(None, gt=0, description="length of the run in pairs, instead of epochs")
    batch_size: int = Field(256, gt=1, description="pairs a step")
    shape: Literal["cosine", "constant"] = Field(
        "cosine",
        description="the learning rate after the warm-up: half a cosine down, or constant with a cool-down at the end, "
        "so that a run can be prolonged (docs/methods.md)",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    warmup_pairs: int | None = Field(
        None, ge=0, description="pairs in which the learning rate rises, instead of warmup: whatever the run's length"
    )
    cooldown: float | None = Field(
        None,
        ge=0,
        le=1,
        description="with shape = constant, share of the steps in which the learning rate falls at the end, as "
        "1 - sqrt; 0 = never; not set: 0.2",
    )
    start_lr: float | None = Field(
        None,
        ge=0,
        le=1,
        description="learning rate of the first step, as a share of the peak; the last step's is then exactly final_lr "
        "(reference); not set: equal steps from zero",
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.shape == "cosine" and self.cooldown is not None:
            raise ValueError("a cosine has no cooldown: leave it out, or set shape = constant")
        if self.shape == "constant" and not self.cooldown_share and self.final_lr:
            raise ValueError("without a cooldown the learning rate never falls to final_lr: leave one of them out")
        if self.warmup_pairs is None and self.warmup + self.cooldown_share > 1:
            raise ValueError("warmup and cooldown are more than the whole run together: lower one")
        return self

    @property
    def cooldown_share(self) -> float:
        """Share of the steps in which the rate falls at the end; a cosine has no such part."""
        if self.shape == "cosine":
            return 0.0
        return 0.2 if self.cooldown is None else self.cooldown
