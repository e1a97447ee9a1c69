"""A model in another format: open_clip's folder, or Hugging Face's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from declip.errors import InputError, first_line
from declip.files import check_unused
from declip.model.export import FinishedModel
from declip.model.huggingface import write_huggingface
from declip.model.pretrained import build, open_tokenizer, read_model

FORMATS = ("open_clip", "huggingface")


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    to: str = "open_clip",
    image_heads: int | None = None,
    text_heads: int | None = None,
) -> dict[str, Any]:
    """Write the model `source` (whatever `declip.load` opens) into `folder` and sum up what it is.

    open_clip: `open_clip_config.json` and `open_clip_model.safetensors`, and the heads of the terms apart in
    `declip_heads.safetensors`, so that training can go on from them. huggingface: a `CLIPModel` or `SiglipModel`.
    Raises InputError where the source is no model, the format cannot hold it, or the folder holds files already.
    """
    source, folder = os.fspath(source), Path(folder)
    if to not in FORMATS:
        raise InputError(f"There is no format {to!r}: choose from {', '.join(FORMATS)}.")
    check_unused(folder, "give another folder")
    finished = read_model(source, image_heads, text_heads)
    if to == "huggingface":
        _refuse_for_huggingface(finished, source)
    if finished.module is None:
        build(source, finished)  # whatever does not fit is found before anything is written
    result = {"source": source, "folder": str(folder), "format": to, **summary(finished)}
    if to == "huggingface":
        write_huggingface(folder, finished.config, finished.weights)
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({error.strerror}): give another one.") from None
    try:
        _write_tokenizer(finished, folder)
        finished.write(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was empty, and half a model is none
        raise
    return result


def _write_tokenizer(finished: FinishedModel, folder: Path) -> None:
    """open_clip looks for a Hugging Face tokenizer in the model's own folder."""
    name = finished.config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    if not name:
        return
    try:
        tokenizer = open_tokenizer(finished)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"The model's tokenizer {name!r} cannot be opened: {first_line(error)}.") from None
    tokenizer.save_pretrained(folder)


def _refuse_for_huggingface(finished: FinishedModel, source: str) -> None:
    if finished.options["towers"] == "image":
        raise InputError(f"{source} holds an image tower alone: a CLIPModel has a text tower too.")
    if finished.options["similarity"] == "token_wise":
        raise InputError(f"{source} compares tokens (FILIP): a CLIPModel compares embeddings, which were not trained.")


def summary(finished: FinishedModel) -> dict[str, Any]:
    """What a model is, in a few figures."""
    config = finished.config["model_cfg"]
    vision = config["vision_cfg"]
    image = vision.get("timm_model_name") or _in_words(vision, 12, 768, ", {} px")
    text = config.get("text_cfg")
    if finished.options["towers"] == "image" or text is None:
        words = None
    else:
        words = text.get("hf_model_name") or _in_words(text, 12, 512)
    heads = sorted({name.partition(".")[0] for name in finished.heads} - {"mask_embedding"})
    return {
        "image_tower": image,
        "text_tower": words,
        "embed_dim": config["embed_dim"],
        "parameters": sum(tensor.numel() for tensor in finished.weights.values()),
        "similarity": finished.options["similarity"],
        "heads": heads,
    }


def _in_words(tower: dict[str, Any], layers: int, width: int, size: str = "") -> str:
    """A tower's size; what its description leaves out is open_clip's default."""
    return f"{tower.get('layers', layers)} layers × {tower.get('width', width)}" + size.format(
        tower.get("image_size", 224)
    )
