"""A finished model as an open_clip folder, with the heads of its terms beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from declip.errors import InputError, first_line
from declip.files import save_weights, write_atomically
from declip.model.dual_encoder import pixel_statistics
from declip.model.towers import model_config
from declip.recipe import Recipe

CONFIG, WEIGHTS, HEADS = "open_clip_config.json", "open_clip_model.safetensors", "declip_heads.safetensors"


@dataclass
class FinishedModel:
    """What an open_clip folder holds, in memory.

    config: open_clip_config.json: `model_cfg`, `preprocess_cfg`, and `declip`, which open_clip does not read:
        `similarity` ("embedding" or "token_wise"), `mask_padding`, `resize` (pixels of the shorter side before the
        central square is cut out), `towers` ("image" where there is no text tower)
    weights: the towers, by open_clip's names
    heads: the terms' own modules, by term (`simsiam.projector.linear1.weight`), and `mask_embedding`
    tokenizer: under which name open_clip.get_tokenizer has it, where the description alone does not say
    module: the model itself, where open_clip has built it already
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    tokenizer: str = ""
    module: Any = None

    @property
    def options(self) -> dict[str, Any]:
        return {"similarity": "embedding", "mask_padding": True, "towers": "both", **self.config.get("declip", {})}

    def head(self, name: str) -> dict[str, Tensor]:
        """The tensors of one head, by their names inside it; empty where it is not there."""
        return {key.removeprefix(f"{name}."): t for key, t in self.heads.items() if key.startswith(f"{name}.")}

    def write(self, folder: Path) -> None:
        """Write the folder's files, the description last: without it the folder is no model."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / WEIGHTS, self.weights)
        if self.heads:
            save_weights(folder / HEADS, self.heads)
        write_config(folder, self.config)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config, indent=2)
    write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def open_clip_config(recipe: Recipe) -> dict[str, Any]:
    """What open_clip_config.json says of a trained recipe: towers, preprocessing, and how image and text compare."""
    mean, std = pixel_statistics(recipe.model.normalization)
    config: dict[str, Any] = {
        "model_cfg": model_config(recipe.model),
        "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": "shortest"},
    }
    if recipe.similarity == "token_wise":
        config["declip"] = {"similarity": "token_wise", "mask_padding": not recipe.pads_captions}
    return config


def is_open_clip_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_open_clip_folder(folder: Path) -> FinishedModel:
    """Read what `FinishedModel.write` or open_clip wrote; raises InputError where a file is damaged."""
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} cannot be opened: {error}.") from None
    _check_config(config, folder / CONFIG)
    heads = read_weights(folder / HEADS) if (folder / HEADS).is_file() else {}
    return FinishedModel(config, read_weights(folder / WEIGHTS), heads, f"local-dir:{folder}")


def _check_config(config: Any, path: Path) -> None:
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{path} describes no model: it has no model_cfg.")
    options = config.get("declip", {})
    parts = {
        "preprocess_cfg": config.get("preprocess_cfg", {}),
        "declip": options,
        "vision_cfg": model.get("vision_cfg"),
    }
    if not isinstance(options, dict) or options.get("towers") != "image":
        parts["text_cfg"] = model.get("text_cfg")
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise InputError(f"{path} describes no model: its {name} is no table of settings.")
    if not isinstance(model.get("embed_dim"), int):
        raise InputError(f"{path} describes no model: its embed_dim is no number.")
    if options.get("similarity", "embedding") not in ("embedding", "token_wise"):
        raise InputError(f"{path}: similarity = {options['similarity']!r} is neither embedding nor token_wise.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises InputError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be opened: {first_line(error)}.") from None


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load all tensors, no more and no fewer; raises InputError that names the first which does not fit."""
    check_tensors(module.state_dict(), state, where)
    module.load_state_dict(state)


def check_tensors(expected: dict[str, Tensor], state: dict[str, Tensor], where: str) -> None:
    """Raise InputError that names the first tensor which is missing, left over or of another shape."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise InputError(f"{where} is of another architecture: {name} is missing there.")
        if name not in expected:
            raise InputError(f"{where} is of another architecture: {name} is left over.")
        if state[name].shape != expected[name].shape:
            shapes = list(state[name].shape), list(expected[name].shape)
            raise InputError(f"{where} is of another architecture: {name} has the shape {shapes[0]}, not {shapes[1]}.")
