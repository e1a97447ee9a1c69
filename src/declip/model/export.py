"""A finished run as an open_clip folder."""

from __future__ import annotations

import json
from pathlib import Path

from declip.model.dual_encoder import MEAN, STD
from declip.model.towers import model_config
from declip.recipe import Model

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def open_clip_config(model: Model) -> str:
    """The text of open_clip_config.json: the towers and the preprocessing that goes with the weights."""
    preprocessing = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "shortest"}
    return json.dumps({"model_cfg": model_config(model), "preprocess_cfg": preprocessing}, indent=2)


def is_open_clip_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
