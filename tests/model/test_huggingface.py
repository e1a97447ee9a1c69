"""Hugging Face folders and open_clip folders of the same model give the same embeddings, both ways."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from declip.errors import InputError
from declip.model import huggingface
from declip.model.huggingface import is_huggingface_folder, read_huggingface, write_huggingface

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

CAPTIONS = ["a red cat", "It's the dog's BALL!! and 12 more…", "", "Ünïcode 😄 naïve café", "a " * 100]
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "intermediate_size": 150, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SIGLIP_TEXT = {**TEXT, "vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 1}
SIGLIP_VISION = {**VISION, "intermediate_size": 256, "num_attention_heads": 4}
TINY = "vit_declip_patch8_siglip_32"


def tiny_siglip(act: str) -> Any:
    def build(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(unused, None)
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 4,
            "global_pool": "map",
            "class_token": False,
        }
        model = VisionTransformer(**{**sizes, "act_layer": act, **kwargs})
        model.default_cfg = {}
        return model

    return build


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm has an image tower that is like its SigLIP ones but tiny: open_clip passes it nothing but a name."""
    registry = sys.modules["timm.models._registry"]
    monkeypatch.setitem(registry._model_entrypoints, TINY, tiny_siglip("gelu_tanh"))
    monkeypatch.setitem(registry._model_to_module, TINY, "vision_transformer")


def randomised(model: Any) -> Any:
    """Biases, norms and scales too: a mix-up of what starts as 0 or 1 would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def clip_model(**changes: Any) -> Any:
    text = {**TEXT, **changes.pop("text", {})}
    vision = {**VISION, **changes.pop("vision", {})}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, **{"projection_dim": 24, **changes})
    return randomised(transformers.CLIPModel(config))


def siglip_model(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    parts = {"text_config": {**SIGLIP_TEXT, **(text or {})}, "vision_config": {**SIGLIP_VISION, **(vision or {})}}
    return randomised(transformers.SiglipModel(transformers.SiglipConfig(**parts)))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    clip_model().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(clip_folder: Path, tmp_path: Path) -> Path:
    """A CLIPModel's folder to damage."""
    return Path(shutil.copytree(clip_folder, tmp_path / "copied"))


@torch.no_grad()
def theirs(model: Any, tokens: Tensor, pixels: Tensor = PIXELS) -> tuple[Tensor, Tensor]:
    image, text = model.get_image_features(pixels).pooler_output, model.get_text_features(tokens).pooler_output
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@torch.no_grad()
def ours(model: Any, tokens: Tensor, pixels: Tensor = PIXELS) -> tuple[Tensor, Tensor]:
    model.eval()
    return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def opened(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """The model that open_clip opens from a folder with this config and these tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(state, folder / "open_clip_model.safetensors")
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.std() > 0.01
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def change_config(folder: Path, part: str | None, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config))


# From Hugging Face


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, "vision": {"hidden_act": "gelu_pytorch_tanh"}},
        {"text": {"eos_token_id": 2, "hidden_size": 96, "num_attention_heads": 3, "max_position_embeddings": 40}},
        {"vision": {"patch_size": 5, "num_attention_heads": 16, "layer_norm_eps": 1e-6}, "projection_dim": 64},
    ],
)
def test_clip_model_opens_in_open_clip(changes: dict[str, Any], tmp_path: Path) -> None:
    model = clip_model(**changes)
    model.save_pretrained(tmp_path / "theirs")
    assert is_huggingface_folder(tmp_path / "theirs")
    clip = opened(tmp_path / "ours", *read_huggingface(tmp_path / "theirs"))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")(CAPTIONS)
    assert_same(ours(clip, tokens), theirs(model, tokens))
    assert clip.logit_scale == model.logit_scale


def test_clip_model_of_another_vocabulary_embeds_at_its_own_end_token(tmp_path: Path) -> None:
    model = clip_model(text={"vocab_size": 60, "eos_token_id": 7, "bos_token_id": 1})
    model.save_pretrained(tmp_path)
    config, state = read_huggingface(tmp_path)
    tokens = torch.tensor([[1, 50, 7, 59, 0], [1, 7, 0, 0, 0]])
    padded = F.pad(tokens, (0, 72))
    assert_same(ours(opened(tmp_path / "ours", config, state), padded), theirs(model, padded))
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == str(tmp_path)


def test_settings_that_config_json_leaves_out_are_as_in_transformers() -> None:
    classes = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}
    for (kind, part), fields in huggingface.DEFAULTS.items():
        whole = classes[kind]().to_dict()
        outside = {"projection_dim": whole["projection_dim"]} if "projection_dim" in fields else {}
        assert fields == {**{name: whole[part][name] for name in fields}, **outside}


def test_settings_of_early_versions_are_the_ones_with_dict(copied: Path) -> None:
    change_config(copied, None, text_config_dict={**TEXT, "num_attention_heads": 8}, vision_config_dict=None)
    assert transformers.CLIPConfig.from_pretrained(copied).text_config.num_attention_heads == 8
    assert read_huggingface(copied)[0]["model_cfg"]["text_cfg"]["heads"] == 8


def test_weights_in_half_precision_in_shards_and_with_position_ids_are_read(copied: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(copied / "model.safetensors").items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (copied / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    for number, (name, tensor) in enumerate(state.items()):
        shards[list(shards)[number % 2]][name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, copied / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config, found = read_huggingface(copied)
    clip = opened(copied / "ours", config, found)
    tokens = open_clip.tokenize(CAPTIONS)
    assert_same(ours(clip, tokens), theirs(transformers.CLIPModel.from_pretrained(copied, dtype="float32"), tokens))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}


@pytest.mark.usefixtures("tiny_timm")
def test_siglip_model_opens_in_open_clip(tmp_path: Path) -> None:
    model = siglip_model()
    model.save_pretrained(tmp_path / "theirs")
    assert is_huggingface_folder(tmp_path / "theirs")
    config, state = read_huggingface(tmp_path / "theirs")
    clip = opened(tmp_path / "ours", config, state)
    tokens = torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    assert_same(ours(clip, tokens), theirs(model, tokens))
    assert (clip.logit_scale, clip.logit_bias) == (model.logit_scale, model.logit_bias)
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == str(tmp_path / "theirs")
    assert config["preprocess_cfg"] == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def test_default_siglip_is_open_clips_own_siglip(tmp_path: Path) -> None:
    """All sizes at transformers' defaults, which the config leaves out."""
    with torch.device("meta"):
        model = transformers.SiglipModel(transformers.SiglipConfig())
    part = huggingface._model_from({}, "siglip", tmp_path / "config.json")
    own = open_clip.get_model_config("ViT-B-16-SigLIP")
    own["text_cfg"] |= {"hf_tokenizer_name": str(tmp_path), "act_kwargs": {"approximate": "tanh"}}
    assert {**part["text_cfg"]} == own["text_cfg"]
    assert {**part, "text_cfg": 0} == {**own, "text_cfg": 0}
    skeleton = huggingface._skeleton(part, "here")
    found = huggingface._to_theirs(huggingface._pairs(skeleton), skeleton, "siglip")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", timm.list_models("vit_*_patch*_siglip_*", exclude_filters="*_gap_*"))
def test_every_siglip_of_timm_is_found_by_its_sizes(name: str, tmp_path: Path) -> None:
    sizes = huggingface._timm_tower(name)
    assert huggingface._timm_name({**sizes, "num_channels": 3}, tmp_path) == name
    assert sizes["layer_norm_eps"] == 1e-6


def test_preprocessing_is_the_folders(copied: Path) -> None:
    processor = transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], resample=2)
    processor.save_pretrained(copied)
    expected = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": "shortest"}
    assert read_huggingface(copied)[0]["preprocess_cfg"] == expected
    settings = json.loads((copied / "preprocessor_config.json").read_text())
    (copied / "preprocessor_config.json").unlink()
    settings |= {"do_normalize": False, "size": {"height": 32, "width": 32}}
    (copied / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    expected |= {"mean": [0.0] * 3, "std": [1.0] * 3, "resize_mode": "squash"}
    assert read_huggingface(copied)[0]["preprocess_cfg"] == expected


# To Hugging Face


def described(vision: dict[str, Any], text: dict[str, Any], **model: Any) -> dict[str, Any]:
    """An open_clip config of a tiny CLIP."""
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16, **vision}
    text = {"context_length": 77, "layers": 2, "width": 48, "heads": 2, **text}
    return {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **model}}


def built(config: dict[str, Any]) -> Any:
    settings = {**config["model_cfg"]}
    cls = open_clip.model.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.model.CLIP
    return randomised(cls(**settings))


@pytest.mark.parametrize(
    "config",
    [
        described({}, {}),
        described({"patch_dropout": 0.5, "mlp_ratio": 2.7}, {"norm_kwargs": {"eps": 1e-4}}, quick_gelu=True),
        described({"act_kwargs": {"approximate": "tanh"}, "image_size": [32, 32]}, {}, custom_text=True),
        described({}, {"pool_type": "eos", "eos_id": 49407}, nonscalar_logit_scale=True, quick_gelu=False),
    ],
)
def test_open_clip_model_opens_in_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    clip = built(config)
    write_huggingface(tmp_path / "a/b", config, clip.state_dict())
    model = transformers.CLIPModel.from_pretrained(tmp_path / "a/b")
    ids = open_clip.tokenize(CAPTIONS)
    assert_same(theirs(model, ids), ours(clip, ids))
    assert model.logit_scale == clip.logit_scale

    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "a/b")
    padded = processor.tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(**padded).pooler_output
    torch.testing.assert_close(F.normalize(text, dim=-1), ours(clip, ids)[1], rtol=0, atol=1e-5)
    assert not [path for path in (tmp_path / "a/b").iterdir() if path.suffix == ".tmp"]


def test_tokens_and_pixels_are_open_clips(tmp_path: Path) -> None:
    config = described({}, {"context_length": 30})
    config["preprocess_cfg"] = {
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    }
    config["declip"] = {"resize": 40}
    clip = built(config)
    write_huggingface(tmp_path, config, clip.state_dict())
    for cls in (transformers.CLIPTokenizer, transformers.AutoTokenizer):
        tokenizer = cls.from_pretrained(tmp_path)
        for caption, row in zip(CAPTIONS, open_clip.SimpleTokenizer(context_length=30)(CAPTIONS).tolist(), strict=True):
            end = row.index(49407) + 1
            assert tokenizer(caption, truncation=True)["input_ids"] == row[:end]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    smooth = Image.fromarray(pixels).resize((9, 6)).resize((90, 60), Image.Resampling.BICUBIC)
    preprocess = open_clip.image_transform(32, False, **config["preprocess_cfg"])
    preprocess.transforms[0].size = 40
    found = transformers.CLIPProcessor.from_pretrained(tmp_path).image_processor(smooth, return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"][0], preprocess(smooth), rtol=0, atol=0.05)


@pytest.mark.usefixtures("tiny_timm")
@pytest.mark.parametrize("bias", [-10, None])
def test_siglip_goes_there_and_back(bias: float | None, tmp_path: Path) -> None:
    model = siglip_model()
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer_config.json").write_text("{}")
    config, state = read_huggingface(tmp_path / "theirs")
    if bias is None:
        del config["model_cfg"]["init_logit_bias"], state["logit_bias"]
    clip = opened(tmp_path / "ours", config, state)
    write_huggingface(tmp_path / "again", config, state)
    again = transformers.SiglipModel.from_pretrained(tmp_path / "again")
    tokens = torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    assert_same(theirs(again, tokens), ours(clip, tokens))
    assert again.logit_bias == (0 if bias is None else model.logit_bias)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert processor(Image.new("RGB", (50, 20)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    assert (tmp_path / "again/tokenizer_config.json").read_text() == "{}"
    assert is_huggingface_folder(tmp_path / "again")


def test_exact_gelu_of_timms_tower_is_written_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry = sys.modules["timm.models._registry"]
    monkeypatch.setitem(registry._model_entrypoints, TINY, tiny_siglip("gelu"))
    monkeypatch.setitem(registry._model_to_module, TINY, "vision_transformer")
    model = siglip_model(vision={"hidden_act": "gelu"})
    model.save_pretrained(tmp_path)
    config, state = read_huggingface(tmp_path)
    write_huggingface(tmp_path / "again", config, state)
    acts = json.loads((tmp_path / "again/config.json").read_text())
    assert (acts["vision_config"]["hidden_act"], acts["text_config"]["hidden_act"]) == ("gelu", "gelu_pytorch_tanh")
    tokens = torch.zeros(1, 16, dtype=torch.long)
    again = transformers.SiglipModel.from_pretrained(tmp_path / "again")
    assert_same(theirs(again, tokens), theirs(model, tokens))


# Refusals


def test_other_things_are_no_huggingface_folder(copied: Path, tmp_path: Path) -> None:
    assert not is_huggingface_folder(tmp_path)
    assert not is_huggingface_folder(tmp_path / "absent")
    for text in ("[]", "{", '{"model_type": "bert"}', '{"model_type": ["clip"]}', "\ud800"):
        (copied / "config.json").write_bytes(text.encode(errors="surrogatepass"))
        assert not is_huggingface_folder(copied)
        with pytest.raises(InputError, match=r"config\.json"):
            read_huggingface(copied)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "hidden_act", "silu"),
        ("vision_config", "hidden_act", "gelu"),  # the text tower has quick_gelu
        ("text_config", "num_attention_heads", 5),
        ("vision_config", "num_attention_heads", 0),
        ("vision_config", "num_channels", 1),
        ("vision_config", "image_size", [32, 32]),
        ("text_config", "eos_token_id", None),
        ("text_config", "layer_norm_eps", "small"),
        (None, "projection_dim", None),
        (None, "text_config", [1]),
    ],
)
def test_unknown_settings_are_refused_by_name(part: str | None, name: str, value: Any, copied: Path) -> None:
    change_config(copied, part, **{name: value})
    with pytest.raises(InputError, match=name):
        read_huggingface(copied)


@pytest.mark.usefixtures("tiny_timm")
@pytest.mark.parametrize(
    ("part", "values", "culprit"),
    [
        ("vision", {"hidden_size": 128}, "hidden_size = 128"),
        ("vision", {"num_hidden_layers": 1}, "num_hidden_layers = 1"),
        ("vision", {"image_size": 40}, "image_size = 40"),
        ("vision", {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ("vision", {"vision_use_head": False}, "vision_use_head"),
        ("text", {"projection_size": 32}, "projection_size = 32"),
        ("text", {"hidden_act": "quick_gelu"}, "quick_gelu"),
        ("text", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ],
)
def test_siglip_that_open_clip_cannot_build_is_refused(
    part: str, values: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    parts = {"text_config": dict(SIGLIP_TEXT), "vision_config": dict(SIGLIP_VISION)}
    parts[f"{part}_config"] |= values
    if values.get("hidden_size"):
        parts["text_config"]["projection_size"] = values["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", **parts}))
    with pytest.raises(InputError, match=culprit):
        read_huggingface(tmp_path)


def test_tensors_that_do_not_fit_are_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    state = load_file(path)
    lacking = {name: tensor for name, tensor in state.items() if "text_model.encoder.layers.1." not in name}
    save_file(lacking, path)
    with pytest.raises(
        InputError, match=r"lacks 16 tensors \(text_model\.encoder\.layers\.1\.layer_norm1\.bias, .*, …\)"
    ):
        read_huggingface(copied)
    save_file({**state, "adapter.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"besides the model 1 tensors \(adapter\.weight\)"):
        read_huggingface(copied)
    save_file({**state, "text_projection.weight": torch.zeros(24, 32)}, path)
    with pytest.raises(InputError, match=r"another shape .*text_projection\.weight"):
        read_huggingface(copied)
    config = described({}, {})
    state = built(config).state_dict()
    del state["ln_final.bias"]
    with pytest.raises(InputError, match=r"The state lacks 1 tensors \(ln_final\.bias\)"):
        write_huggingface(copied / "again", config, state)
    assert not (copied / "again").exists()


def test_broken_files_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    data = weights.read_bytes()
    for broken in (data[:-1000], data[:4], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be"):
            read_huggingface(copied)
    weights.write_bytes(data)
    (copied / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        read_huggingface(copied)
    for wrong in ({"image_mean": [1]}, {"resample": 1}, {"image_std": [0, "a", 1]}):
        (copied / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=next(iter(wrong))):
            read_huggingface(copied)


def test_pickled_weights_are_not_opened(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "weights")
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        read_huggingface(copied)
    (copied / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, which could run code"):
        read_huggingface(copied)
    (copied / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../absent.safetensors"}}')
    with pytest.raises(InputError, match=r"copied/absent\.safetensors cannot be"):
        read_huggingface(copied)
    (copied / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="lacks 78 tensors"):
        read_huggingface(copied)


POOLER = {"attentional_pool": True, "attn_pooler_queries": 2, "attn_pooler_heads": 2}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("vision_cfg.layers", {"layers": [1, 1, 1, 1], "width": 16, "head_width": 32}, {}, {}),
    ("vision_cfg.ls_init_value", {"ls_init_value": 0.1}, {}, {}),
    ("vision_cfg.attentional_pool", POOLER, {}, {}),
    ("vision_cfg.no_ln_pre", {"no_ln_pre": True}, {}, {}),
    ("vision_cfg.final_ln_after_pool", {"final_ln_after_pool": True}, {}, {}),
    ("vision_cfg.pool_type", {"pool_type": "avg"}, {}, {}),
    ("vision_cfg.output_tokens", {"output_tokens": True}, {}, {}),
    ("vision_cfg.qk_norm", {"qk_norm": True}, {}, {}),
    ("vision_cfg.head_width", {"head_width": 48}, {}, {}),
    ("image_size", {"image_size": [32, 40]}, {}, {}),
    ("vision_cfg.timm_model_name", {"timm_model_name": "test_vit"}, {}, {}),
    ("vision_cfg.timm_model_name", {"timm_model_name": "vit_base_patch32_siglip_gap_256"}, {}, {}),
    ("unexpected keyword argument 'x'", {"act_kwargs": {"x": 1}}, {}, {}),
    ("text_cfg.norm_kwargs", {}, {"norm_kwargs": {"elementwise_affine": False}}, {}),
    ("text_cfg.proj_bias", {}, {"proj_bias": True}, {}),
    ("text_cfg.proj_type", {}, {"proj_type": "none"}, {}),
    ("text_cfg.embed_cls", {}, {"embed_cls": True}, {}),
    ("text_cfg.no_causal_mask", {}, {"no_causal_mask": True}, {}),
    ("text_cfg.pool_type", {}, {"pool_type": "last"}, {}),
    ("text_cfg.pool_type", {}, {"pool_type": "eos", "eos_id": 2}, {}),
    ("text_cfg.hf_model_name", {}, {"hf_model_name": "roberta-base"}, {}),
    ("init_logit_bias", {}, {}, {"init_logit_bias": -10}),
    ("multimodal_cfg", {}, {}, {"multimodal_cfg": {"layers": 1}}),
    ("model_cfg", {"width": "64"}, {}, {}),
    ("model_cfg", {"head_width": 0}, {}, {}),
]


@pytest.mark.parametrize(("culprit", "vision", "text", "model"), REFUSED)
def test_what_a_clip_model_cannot_be_is_refused(
    culprit: str, vision: dict[str, Any], text: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=culprit):
        write_huggingface(tmp_path / "new", described(vision, text, **model), {})
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("tiny_timm")
@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("vision_cfg", {"timm_pool": "avg"}),
        ("vision_cfg", {"timm_proj": "linear"}),
        ("vision_cfg", {"image_size": 224}),
        ("text_cfg", {"no_causal_mask": False}),
        ("text_cfg", {"pool_type": "argmax"}),
        ("text_cfg", {"proj_bias": False}),
        ("text_cfg", {"ls_init_value": 0.1}),
    ],
)
def test_what_a_siglip_model_cannot_be_is_refused(part: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"text_config": SIGLIP_TEXT, "vision_config": SIGLIP_VISION}
    model = huggingface._model_from(settings, "siglip", tmp_path / "config.json")
    model[part] |= changes
    with pytest.raises(InputError, match=f"{part}.{next(iter(changes))} .* SiglipModel"):
        write_huggingface(tmp_path / "new", {"model_cfg": model}, {})


def test_models_that_compare_otherwise_and_other_preprocessing_are_refused(tmp_path: Path) -> None:
    config = described({}, {})
    for options, culprit in (({"towers": "image"}, "towers"), ({"similarity": "token_wise"}, "similarity")):
        with pytest.raises(InputError, match=culprit):
            write_huggingface(tmp_path, {**config, "declip": options}, {})
    for name, value in {"interpolation": "random", "resize_mode": "longest"}.items():
        with pytest.raises(InputError, match=f"{name}.*{value}"):
            write_huggingface(tmp_path, {**config, "preprocess_cfg": {name: value}}, {})


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = described({}, {})
    state = built(config).state_dict()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        write_huggingface(tmp_path / "file", config, state)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        write_huggingface(tmp_path / "new", config, state)
