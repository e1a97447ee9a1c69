"""The two towers: open_clip builds them, and what it is told."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

from declip.architecture import OURS, Model
from declip.errors import InputError, first_line
from declip.model.drop_path import add_drop_path, add_dropout
from declip.model.parts import Part

Towers: TypeAlias = Any  # open_clip's CLIP, which holds its text tower's parts itself, or its CustomTextCLIP

NO_TEXT = {"layers": 1, "width": 64, "heads": 1}  # open_clip wants a text tower described where there is none
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
CONTEXT_LENGTH = 77  # open_clip's, where a text tower does not say


def model_config(model: Model) -> dict[str, Any]:
    """The architecture in the words of an open_clip model config."""
    if model.name is None:
        config: dict[str, Any] = {
            "embed_dim": model.embed_dim,
            "vision_cfg": model.image.model_dump(exclude=_unused_image_fields(model)),
            "text_cfg": model.text.model_dump(exclude=_unused_text_fields(model)),
        }
        if model.quick_gelu:
            config["quick_gelu"] = True
        if model.custom_text:
            config["custom_text"] = True
    else:
        import open_clip

        config = open_clip.get_model_config(model.name)
        if config is None:
            raise InputError(f"model.name = {model.name!r}: open_clip knows no such architecture.")
    text_cfg = config["text_cfg"]
    if text_cfg.get("hf_model_name"):  # without it, open_clip would take its own tokenizer
        text_cfg.setdefault("hf_tokenizer_name", text_cfg["hf_model_name"])
    if model.logit_bias_init is not None:
        config["init_logit_bias"] = model.logit_bias_init
    return config


def _unused_image_fields(model: Model) -> set[str]:
    if "timm_model_name" in (model.image.model_extra or {}):
        return {*OURS, "layers", "width", "head_width", "patch_size"}
    return {*OURS, "patch_size"} if isinstance(model.image.layers, list) else set(OURS)


def _unused_text_fields(model: Model) -> set[str]:
    hugging = "hf_model_name" in (model.text.model_extra or {})
    return {*OURS, "layers", "width", "heads", "vocab_size"} if hugging else set(OURS)


def build_towers(model: Model) -> Towers:
    """An open_clip model with random weights; raises InputError where open_clip refuses the description."""
    from open_clip.transformer import VisionTransformer

    config = model_config(model)
    if "multimodal_cfg" in config:
        raise InputError(f"model.name = {model.name!r} has a caption decoder: choose an architecture of two towers.")
    if config["text_cfg"].get("embed_cls"):
        raise InputError("model.text.embed_cls: a text tower with a class token of its own cannot be trained.")
    vision = dict(config["vision_cfg"])
    if vision["image_size"] < (vision.get("patch_size") or 0):
        raise InputError(
            f"model.image: images of {vision['image_size']} px are smaller than a patch of {vision['patch_size']} px."
        )
    if model.patch_dropout:
        vision["patch_dropout"] = model.patch_dropout
    try:
        clip = build_from_config(config | {"vision_cfg": vision}, init_logit_scale=model.logit_scale_init)
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError, KeyError) as error:
        raise InputError(f"model: open_clip cannot build these towers: {first_line(error)}.") from None
    if model.patch_dropout and not patch_dropouts(clip):
        raise InputError("model.patch_dropout: this image tower has no patches to leave out, only a ViT has.")
    _leave_out(clip, model)
    if model.freeze_patch_embedding and "timm_model_name" in vision:
        raise InputError("model.freeze_patch_embedding: only open_clip's own ViT can be trained so, not a timm tower.")
    if model.freeze_patch_embedding and isinstance(clip.visual, VisionTransformer):  # a ResNet has no patches
        clip.visual.conv1.weight.requires_grad_(False)
    return clip


def _leave_out(clip: Towers, model: Model) -> None:
    text = clip.transformer if hasattr(clip, "transformer") else clip.text
    parts: list[tuple[Part, Any, Any]] = [("image", clip.visual, model.image), ("text", text, model.text)]
    for part, tower, options in parts:
        if options.drop_path:
            add_drop_path(tower, part, options.drop_path)
        if options.dropout:
            add_dropout(tower, part, options.dropout)


def patch_dropouts(clip: Towers) -> list[Any]:
    """The modules of open_clip or timm that leave patches out; `prob` is the share."""
    return [part for part in clip.visual.modules() if type(part).__name__ == "PatchDropout"]


def build_from_config(config: dict[str, Any], **changes: Any) -> Towers:
    """An open_clip model from its model config; what open_clip raises for a bad one differs from field to field."""
    from open_clip.model import CLIP, CustomTextCLIP

    arguments = {"text_cfg": NO_TEXT, **config, **changes}
    custom_text = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    clip = (CustomTextCLIP if custom_text else CLIP)(**arguments)
    trunk: Any = getattr(clip.visual, "trunk", None)
    size = clip.visual.image_size
    if hasattr(trunk, "set_input_size") and getattr(trunk.patch_embed, "img_size", size) not in (None, tuple(size)):
        trunk.set_input_size(img_size=size)  # of a timm ViT, which open_clip builds for the size that timm knows
    return clip
