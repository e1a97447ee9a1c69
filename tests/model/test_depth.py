"""How deep a parameter sits in its tower, in open_clip's own towers, timm's and Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

from declip.errors import InputError
from declip.model.depth import layers_to_top
from declip.model.towers import Towers, build_towers
from declip.recipe import parse_recipe

VIT = {"image_size": 16, "patch_size": 8, "layers": 3, "width": 32, "head_width": 32}
TEXT = {"layers": 2, "width": 32, "heads": 1, "vocab_size": 100}


def towers(image: dict[str, Any], text: dict[str, Any] | None = None) -> Towers:
    return build_towers(parse_recipe({"model": {"embed_dim": 16, "image": image, "text": text or TEXT}}).model)


def test_open_clips_own() -> None:
    clip = towers(VIT)
    below = layers_to_top(clip)
    assert below.keys() == {name for name, _ in clip.named_parameters()} - {"logit_scale"}
    expected = {
        **{"visual.proj": 0, "visual.ln_post.bias": 0, "visual.transformer.resblocks.2.attn.in_proj_weight": 1},
        **{"visual.transformer.resblocks.0.mlp.c_fc.bias": 3, "visual.ln_pre.weight": 4, "visual.conv1.weight": 4},
        **{"visual.class_embedding": 4, "visual.positional_embedding": 4, "text_projection": 0, "ln_final.weight": 0},
        **{"transformer.resblocks.1.ln_1.bias": 1, "transformer.resblocks.0.ln_1.bias": 2},
        **{"token_embedding.weight": 3, "positional_embedding": 3},
    }
    assert {name: below[name] for name in expected} == expected


def test_stages_of_a_resnet() -> None:
    below = layers_to_top(towers({"layers": [1, 2, 1, 1], "width": 8, "image_size": 32}))
    expected = {"attnpool.c_proj.weight": 0, "layer4.0.conv1.weight": 1, "layer2.0.bn1.bias": 3, "layer2.1.bn1.bias": 3}
    expected |= {"layer1.0.conv1.weight": 4, "conv1.weight": 5, "bn3.bias": 5}
    assert {name: below[f"visual.{name}"] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet10t", {"head.proj.weight": 0, "trunk.layer4.0.bn1.bias": 1, "trunk.conv1.0.weight": 5}),
        (
            "vit_tiny_patch16_224",
            {"head.proj.weight": 0, "trunk.blocks.11.norm1.bias": 1, "trunk.blocks.0.norm1.bias": 12}
            | {"trunk.pos_embed": 13, "trunk.patch_embed.proj.weight": 13},
        ),
    ],
)
def test_timm(name: str, expected: dict[str, int]) -> None:
    clip = towers({"timm_model_name": name, "image_size": 224})
    below = layers_to_top(clip)
    assert {f"visual.{part}" for part, _ in clip.visual.named_parameters()} <= below.keys()
    assert {part: below[f"visual.{part}"] for part in expected} == expected


def test_timm_without_a_projection_of_its_own() -> None:
    """Where timm's classifier is the projection, it is the top."""
    below = layers_to_top(towers({"timm_model_name": "resnet10t", "image_size": 64, "timm_proj": ""}))
    assert (below["visual.trunk.fc.weight"], below["visual.trunk.layer4.0.bn1.bias"]) == (0, 1)


def test_hugging_face(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    clip = towers(VIT, {"hf_model_name": str(tmp_path), "hf_proj_type": "linear"})
    below = layers_to_top(clip)
    assert below.keys() == {name for name, _ in clip.named_parameters()} - {"logit_scale"}
    expected = {"proj.weight": 0, "transformer.encoder.layer.1.output.dense.bias": 1}
    expected |= {"transformer.encoder.layer.0.attention.self.query.weight": 2}
    expected |= {"transformer.embeddings.word_embeddings.weight": 3, "transformer.embeddings.LayerNorm.bias": 3}
    assert {name: below[f"text.{name}"] for name in expected} == expected


def test_towers_that_do_not_say() -> None:
    clip = towers({"timm_model_name": "resnet10t", "image_size": 64})
    clip.visual.trunk = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"optimizer\.layer_decay: timm does not say which the layers of this image"):
        layers_to_top(clip)
