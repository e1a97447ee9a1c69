"""Files in the layout of the public code's releases, made from the golden states or with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import require_shared
from safetensors.torch import load_file
from torch import Tensor

from declip.model.released import ROWS
from declip.model.towers import build_from_config

TO_OURS = ROWS.argsort()
HEADS = ["--image-heads", "2", "--text-heads", "2"]  # the golden towers are narrower than 64 a head
State = dict[str, Tensor]


def golden(method: str) -> State:
    return load_file(require_shared(f"golden/{method}_vit_seed1.safetensors"))


def released_state(method: str) -> State:
    """The tensors as a released file holds them: float32, under `module.`."""
    found = {k.removeprefix("state."): t for k, t in golden(method).items() if k.startswith("state.")}
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


def save(path: Path, state: State, **more: Any) -> Path:
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "last_iter": 128001, **more}, path)
    return path


def make_file(folder: Path, method: str = "declip", spoil: Callable[[State], None] = lambda state: None) -> Path:
    """A golden state as a released file, as it is or spoilt."""
    state = released_state(method)
    spoil(state)
    return save(folder / f"{method}.pth.tar", state)


def vit(width: int, dim: int, patch: int, text: int = 512) -> State:
    """A CLIP of the public code with random weights, two layers a tower."""
    vision = {"image_size": 224, "layers": 2, "width": width, "head_width": 64, "patch_size": patch}
    return _released({"vision_cfg": vision, "embed_dim": dim}, text)


def resnet(dim: int, text: int = 512) -> State:
    vision = {"image_size": 224, "layers": [1, 1, 1, 1], "width": 64}
    state = _released({"vision_cfg": vision, "embed_dim": dim}, text)
    return state | {"module.visual.fc.weight": torch.zeros(dim, 2048), "module.visual.fc.bias": torch.zeros(dim)}


def _released(config: dict[str, Any], text: int) -> State:
    text_cfg = {"layers": 1, "width": text, "heads": text // 64, "proj_bias": True}
    torch.manual_seed(0)
    clip = build_from_config({**config, "text_cfg": text_cfg, "quick_gelu": True})
    state = {}
    for name, tensor in clip.state_dict().items():
        if name == "token_embedding.weight":
            tensor = torch.cat([tensor, torch.randn(1, text)])[TO_OURS]
        prefix = "" if name.startswith("visual.") or name == "logit_scale" else "encode_text."
        state[f"module.{prefix}{name}"] = tensor.reshape([1]) if name == "logit_scale" else tensor
    return state
