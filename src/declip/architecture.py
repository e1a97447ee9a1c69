"""What a recipe may say about the model: both towers, what they start from, what of them learns."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from declip.terms import Section

Triple = tuple[float, float, float]
IMAGENET = "imagenet"
"""Stands for the names of ImageNet's 1,000 classes."""
Tune = Literal["all", "last", "lora", "biases", "projection", "nothing"]
OURS = frozenset(
    {"init", "classes", "tune", "tune_layers", "lora_rank", "views_kept", "kept", "drop_path", "dropout"}
)  # fields that are no words of open_clip's


class _Tower(Section):
    """What holds for both; any other field in open_clip's words may be given too."""

    model_config = ConfigDict(extra="allow")

    tune: Tune = Field(
        "all",
        description="what of the tower learns: all; its last layers and what follows them; low-rank changes of its "
        "matrices, and its projection to the joint space (LoRA); its biases and projection (BitFit); its projection "
        "alone; nothing (LiT). Dropout and the statistics of batch norms rest where not all learns",
    )
    tune_layers: int = Field(
        3, gt=0, description="with tune = last: how many layers learn (of a ResNet, or of timm's networks, blocks)"
    )
    lora_rank: int = Field(8, gt=0, description="with tune = lora: rank of what is added to each matrix, scaled by two")
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in training, probability that the last block's branches are left out for a row; in a line less "
        "towards the first (stochastic depth)",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="in training, share of the numbers that are left out of what each branch adds"
    )


class ImageTower(_Tower):
    """open_clip's vision_cfg."""

    init: str | None = Field(
        None,
        description="weights to start from: a timm name, a weight file of model.image.timm_model_name, or the image "
        "tower of whatever declip evaluate opens; architecture and pixels follow them",
    )
    classes: str | None = Field(
        None,
        description="what the classes are called that init, timm's weights, was trained to tell apart: "
        f"{IMAGENET} (its 1,000), or a text file with a name a line in their order; both projections then start in "
        "a space where pictures lie by these names",
    )
    views_kept: int = Field(
        4,
        ge=0,
        description="with tune = last, projection or nothing: of each image so many views are drawn and go through "
        "what does not learn once, before the first step; what that gives is kept on disk, and steps pay nothing for "
        "it; 0 = none are kept, nor are any of views that differ in kind or are convolved",
    )
    image_size: int = Field(64, gt=0, description="side of the image views in pixels")
    layers: int | list[int] = Field(6, description="blocks of a ViT; four numbers make a ResNet of those stages")
    width: int = Field(128, gt=0, description="width of the tower")
    head_width: int = Field(64, gt=0, description="width of an attention head")
    patch_size: int = Field(16, gt=0, description="side of a ViT's patches in pixels (a ResNet has none)")


class TextTower(_Tower):
    """open_clip's text_cfg."""

    init: str | None = Field(
        None,
        description="weights to start from: a Hugging Face name or folder, or the text tower of whatever declip "
        "evaluate opens; architecture and tokenizer follow them",
    )
    kept: bool = Field(
        True,
        description="with tune = last, projection or nothing: every caption goes through what does not learn once, "
        "before the first step, where the terms ask for no other text view than the caption",
    )
    context_length: int = Field(77, gt=2, description="captions are cut to this many tokens")
    vocab_size: int = Field(49408, gt=0, description="size of the tokenizer's vocabulary")
    layers: int = Field(3, gt=0, description="blocks of the transformer")
    width: int = Field(128, gt=0, description="width of the tower")
    heads: int = Field(2, gt=0, description="attention heads")


class Model(Section):
    name: str | None = Field(
        None, description="an open_clip architecture (ViT-B-32, RN50, …) instead of the towers below"
    )
    init: str | None = Field(
        None,
        description="a model to start from, its towers and the heads it has: whatever declip evaluate opens; "
        "architecture, pixels and tokenizer follow it",
    )
    embed_dim: int = Field(128, gt=0, description="width of the joint embedding")
    image: ImageTower = Field(ImageTower(), description="image tower, in the words of open_clip's vision_cfg")
    text: TextTower = Field(TextTower(), description="text tower, in the words of open_clip's text_cfg")
    custom_text: bool = Field(
        False, description="hold the text tower apart, as the SigLIP models of open_clip do; it computes the same"
    )
    quick_gelu: bool = Field(False, description="QuickGELU as in OpenAI's and the published DeCLIP weights")
    normalization: Literal["clip", "imagenet", "half"] | tuple[Triple, Triple] = Field(
        "clip",
        description="mean and standard deviation of pixels: OpenAI's for CLIP, ImageNet's (reference), 0.5, or numbers "
        "for red, green and blue each",
    )
    logit_scale_init: float = Field(2.6593, description="start of the logit scale, as a logarithm: ln(1/0.07)")
    logit_scale_range: tuple[float, float] = Field((0.0, 4.6052), description="the logit scale is kept in here")
    logit_scale_cap: float | None = Field(
        None, gt=0, description="largest factor in the loss while the logit scale itself may go higher (reference: 100)"
    )
    logit_bias_init: float | None = Field(
        None, description="start of the logit bias that the sigmoid term needs (SigLIP: -10); not set: no bias"
    )
    freeze_patch_embedding: bool = Field(False, description="keep a ViT's random patch projection (MoCo v3, reference)")
    freeze_batch_norm: bool = Field(
        False,
        description="batch norms of the towers keep the statistics that they start with, which come from far more "
        "pictures than those of fine-tuning; their scales learn",
    )
    views_apart: bool = Field(
        False, description="run the image tower once a view, so that batch norm sees one view at a time (reference)"
    )
    patch_dropout: float = Field(0.0, ge=0, lt=1, description="share of a ViT's patches left out in training (FLIP)")
    unmasked_end: float = Field(
        0.0, ge=0, lt=1, description="share of the run, its last part, in which no patches are left out (FLIP, §3)"
    )
