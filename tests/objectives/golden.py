"""The reference's training step on tiny towers, loaded into our modules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from conftest import require_shared
from safetensors.torch import load_file
from torch import Tensor, nn

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder
from declip.objectives.objective import Objective, build_objective
from declip.recipe import parse_recipe

REFERENCE_MASK = 49406
# Ids there -> ours: the reference puts its mask token before the start and end tokens, we put it last.
OLD_TO_NEW = torch.cat([torch.arange(49406), torch.tensor([49408, 49406, 49407])])
NEW_ROWS = torch.cat([torch.arange(49406), torch.tensor([49407, 49408, 49406])])

TOWERS: dict[str, Any] = {
    "embed_dim": 48,
    "image": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text": {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 16, "heads": 2, "proj_bias": True},
    "quick_gelu": True,
    "freeze_patch_embedding": True,
}
TERMS: dict[str, dict[str, Any]] = {
    "clip": {"contrastive": {}},
    "declip": {
        "contrastive": {"weight": 0.4, "images": 2, "texts": ["masked", "augmented"]},
        "simsiam": {"weight": 0.2, "width": 64, "bottleneck": 32},
        "masked_language": {"weight": 0.2},
        "nearest_neighbour": {
            "weight": 0.2,
            "texts": ["masked", "augmented"],
            "queue_size": 64,
            "exclude_own": False,
            "random_start": True,
        },
    },
}


@dataclass
class Golden:
    """A recipe's modules with the reference's weights, its batch, and what must come out."""

    model: DualEncoder
    objective: Objective
    batch: Batch
    expected: dict[str, Any]
    tensors: dict[str, Tensor]
    parameters: dict[str, tuple[nn.Parameter, bool]]  # by the reference's name; True where rows are reordered


def load_golden(method: str) -> Golden:
    tensors = load_file(require_shared(f"golden/{method}_vit_seed1.safetensors"))
    expected = json.loads(require_shared(f"golden/{method}_vit_seed1.json").read_text())
    recipe = parse_recipe({"model": TOWERS, "terms": TERMS[method]})
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model)
    state = {k.removeprefix("state.module."): v.float() for k, v in tensors.items() if k.startswith("state.")}
    _load_towers(model, state)
    if method == "declip":
        _load_heads(objective, state, tensors)
    model.train()
    objective.train()
    return Golden(model, objective, _batch(recipe.text_views, tensors), expected, tensors, _named(model, objective))


def _load_towers(model: DualEncoder, state: dict[str, Tensor]) -> None:
    towers = {k.removeprefix("encode_text."): v for k, v in state.items() if k.startswith(("visual.", "encode_text."))}
    embedding = towers["token_embedding.weight"]
    towers["token_embedding.weight"] = embedding[NEW_ROWS][:-1]
    towers["logit_scale"] = state["logit_scale"].reshape([])
    model.clip.load_state_dict(towers, strict=True)
    if model.mask_embedding is not None:
        model.mask_embedding.data.copy_(embedding[REFERENCE_MASK])


def _load_heads(objective: Objective, state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    heads = {k: v for k, v in state.items() if k.startswith(("projector.", "predictor."))}
    objective.terms["simsiam"].load_state_dict(heads, strict=True)
    head = {name: state[f"text_label_predictor.{name}"][NEW_ROWS] for name in ("weight", "bias")}
    objective.terms["masked_language"].head.load_state_dict(head, strict=True)
    objective.terms["nearest_neighbour"].queue.copy_(tensors["io.nn_bank_before"].T)
    objective.terms["nearest_neighbour"].pointer.fill_(60)


def _batch(views: list[str], tensors: dict[str, Tensor]) -> Batch:
    count = tensors["io.images"].shape[1] // 3
    images = tensors["io.images"].unflatten(1, (count, 3)).permute(1, 0, 3, 4, 2).contiguous()
    tokens = [OLD_TO_NEW[tensors["io.tokens_0"]]]
    if "augmented" in views:
        tokens.insert(views.index("augmented"), OLD_TO_NEW[tensors["io.tokens_1"]])
    labels = tensors.get("io.labels_0")
    if labels is not None:
        labels = torch.where(labels == -100, labels, OLD_TO_NEW[labels.clamp(min=0)])
    return Batch(images, torch.stack(tokens), tuple(views), labels, torch.arange(8))


def _named(model: DualEncoder, objective: Objective) -> dict[str, tuple[nn.Parameter, bool]]:
    named: dict[str, tuple[nn.Parameter, bool]] = {}
    for name, parameter in model.clip.named_parameters():
        plain = name.startswith("visual.") or name == "logit_scale"
        named[name if plain else f"encode_text.{name}"] = (parameter, name == "token_embedding.weight")
    for name, parameter in objective.named_parameters():
        name = name.removeprefix("terms.simsiam.").replace("terms.masked_language.head", "text_label_predictor")
        named[name] = (parameter, name.startswith("text_label_predictor"))
    return named
