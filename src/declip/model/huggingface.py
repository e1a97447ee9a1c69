"""Hugging Face folders of CLIPModel and SiglipModel in open_clip's words, and back; transformers is not needed.

Both sides compute the same: names, shapes and settings are translated, and what one side cannot represent is refused.
There is one exception. Most of timm's SigLIP image towers use the exact GELU, Hugging Face's SigLIP its tanh
approximation; open_clip has no setting for that, and runs its own SigLIP weights with the exact GELU too.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import InputError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "spiece.model tokenizer.model"
).split()
NAMES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
EOT, VOCABULARY = 49407, 49408  # of open_clip's own tokenizer
LEGACY_EOT = 2  # with this, transformers takes the highest token of a caption, as open_clip's argmax does
ACTIVATIONS = {"quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}  # open_clip's act_kwargs
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's

# What transformers takes where config.json leaves a field out.
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP = {**_TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_TOWER, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "eos_token_id": EOT}
_IMAGE = {"num_channels": 3, "image_size": 224}
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("clip", "text_config"): {**_CLIP, **_TEXT, "vocab_size": VOCABULARY, "max_position_embeddings": 77},
    ("clip", "vision_config"): {**_CLIP, **_IMAGE, "patch_size": 32},
    ("siglip", "text_config"): {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64},
    ("siglip", "vision_config"): {**_SIGLIP, **_IMAGE, "patch_size": 16, "vision_use_head": True},
}
_SIZES = {  # in both sides' words
    **{"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"},
    **{"image_size": "image_size", "patch_size": "patch_size"},
    **{"vocab_size": "vocab_size", "max_position_embeddings": "context_length"},
}
# Fields of open_clip's configs that are translated, or change nothing in a trained CLIPModel or SiglipModel.
_FREE = {
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size act_kwargs norm_kwargs patch_dropout "
    "pos_embed_type attn_pooler_queries attn_pooler_heads timm_model_pretrained timm_drop timm_drop_path",
    "text_cfg": "layers width heads mlp_ratio context_length vocab_size act_kwargs norm_kwargs pool_type eos_id pad_id "
    "hf_tokenizer_name tokenizer_mode tokenizer_kwargs hf_model_pretrained hf_proj_type hf_pooler_type",
    "model_cfg": "embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale nonscalar_logit_scale",
}
_SIGLIP_NEEDS = {"no_causal_mask": True, "proj_bias": True, "timm_pool": "map", "timm_proj": "none"}
_REASONS = {
    "proj_bias": "whose text projection has no bias",
    "timm_model_name": "as transformers knows, of timm's image towers, only SigLIP's with attention pooling",
    "init_logit_bias": "whose logits have no bias",
    "pool_type": "which embeds by the end token, or in a SiglipModel the last",
}

# From open_clip's names of tensors to transformers'; "?" stands for q, k and v, which open_clip keeps in one tensor.
_RENAMED = (
    (r"^visual\.(transformer\.resblocks|trunk\.blocks)\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.(positional_embedding|trunk\.pos_embed)$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.(conv1|trunk\.patch_embed\.proj)\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # the slip is theirs
    (r"^visual\.(ln_post|trunk\.norm)\.", "vision_model.post_layernorm."),
    (r"^visual\.trunk\.attn_pool\.latent$", "vision_model.head.probe"),
    (r"^visual\.trunk\.attn_pool\.(q|kv)\.", "vision_model.head.attention.in_proj_"),  # here open_clip has two
    (r"^visual\.trunk\.attn_pool\.proj\.", "vision_model.head.attention.out_proj."),
    (r"^visual\.trunk\.attn_pool\.norm\.", "vision_model.head.layernorm."),
    (r"^visual\.trunk\.attn_pool\.mlp\.", "vision_model.head.mlp."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection\.", "text_model.head."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.(ln_|norm)(?=[12]\.)", ".layer_norm"),
    (r"\.attn\.(out_)?proj\.", ".self_attn.out_proj."),
    (r"\.attn\.(in_proj_|qkv\.)", ".self_attn.?_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def is_huggingface_folder(folder: Path) -> bool:
    """Whether `folder` holds the config.json of a CLIPModel or a SiglipModel; False for anything else."""
    try:
        return _json(folder / CONFIG).get("model_type") in tuple(NAMES)
    except InputError:
        return False


def read_huggingface(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Hugging Face folder as open_clip's config (`model_cfg` and `preprocess_cfg`) and tensors on the CPU.

    Written as open_clip_config.json and open_clip_model.safetensors they make a folder that open_clip opens. Where the
    config has `hf_tokenizer_name`, open_clip wants the tokenizer's files there too: see `copy_tokenizer`. Images are
    resized straight to the model's size, whatever sizes the Hugging Face folder resizes and crops to.

    Raises InputError where the folder holds no such model, a file of it is broken, a tensor is missing, left over or
    of another shape, or open_clip cannot represent the model.
    """
    path = folder / CONFIG
    config = _json(path)
    kind = config.get("model_type")
    if kind not in tuple(NAMES):
        raise InputError(f"{path} is of model_type {kind!r}: give a folder of a CLIPModel or a SiglipModel.")
    model = _model_from(config, kind, path)
    found = {"model_cfg": model, "preprocess_cfg": _preprocessing(folder, kind)}
    skeleton = _skeleton(model, path)
    pairs = _pairs(skeleton)
    tensors = {n: tensor for n, tensor in _tensors(folder).items() if not n.endswith("embeddings.position_ids")}
    _check(tensors, _to_theirs(pairs, skeleton, kind), folder)
    state: dict[str, Tensor] = {}
    for theirs, ours in pairs.items():
        parts = _joined(tensors, theirs, theirs).split([len(skeleton[n]) for n in ours]) if len(ours) > 1 else None
        for name, part in zip(ours, parts or [_joined(tensors, theirs, theirs)], strict=True):
            state[name] = part.reshape(skeleton[name].shape).contiguous()
    return found, state


def write_huggingface(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write an open_clip config and its tensors as a Hugging Face folder, which is made where there is none.

    The tokenizer goes along if it is open_clip's own, or lies in the folder that `hf_tokenizer_name` names.

    Raises InputError where transformers cannot represent the model, `state` does not fit it, or the folder cannot be
    written; OSError where the disk is full.
    """
    from safetensors.torch import save

    model = json.loads(json.dumps(config.get("model_cfg", config)))  # a copy, in which tuples are lists
    name = str(model["vision_cfg"].get("timm_model_name"))
    kind = "siglip" if re.fullmatch(r"vit_\w+_patch\d+_siglip_\d+(\.\w+)?", name) else "clip"
    theirs = _model_to(model, kind)
    skeleton = _skeleton(model, "model_cfg")
    _check(state, skeleton, "The state")
    tensors = _to_theirs(_pairs(skeleton), state, kind)
    if kind == "siglip":
        tensors.setdefault("logit_bias", torch.zeros(1))  # no bias is a bias of 0
    files: dict[str, Any] = {WEIGHTS: save(tensors, {"format": "pt"})}
    files[PREPROCESSOR] = _processor(config.get("preprocess_cfg", {}), theirs["vision_config"]["image_size"], kind)
    source = model["text_cfg"].get("hf_tokenizer_name")
    if kind == "clip" and not source:
        files |= _tokenizer_files(theirs["text_config"]["max_position_embeddings"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if source:
            copy_tokenizer(Path(source), folder)
        for name, data in {**files, CONFIG: theirs}.items():  # the config last: with it the folder is whole
            _write(folder / name, data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another folder.") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a Hugging Face tokenizer, those that there are, from one folder to another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            _write(folder / name, (source / name).read_bytes())


def _skeleton(model: dict[str, Any], where: Path | str) -> dict[str, Tensor]:
    """The tensors of the model that open_clip would build, without memory: names and shapes."""
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {name: value for name, value in model.items() if name != "custom_text"}
    settings["vision_cfg"] = {**model["vision_cfg"], "timm_model_pretrained": False}
    try:
        with torch.device("meta"):
            return dict((CustomTextCLIP if model.get("custom_text") else CLIP)(**settings).state_dict())
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"{where}: open_clip cannot build this model: {error}.") from None


def _pairs(skeleton: Mapping[str, Tensor]) -> dict[tuple[str, ...], list[str]]:
    """For tensors of transformers, joined along their first axis, those of open_clip that are the same when joined."""
    pairs: dict[tuple[str, ...], list[str]] = {}
    for ours in skeleton:
        theirs = ours.removeprefix("text.")
        for pattern, replacement in _RENAMED:
            theirs = re.sub(pattern, replacement, theirs)
        names = tuple(theirs.replace("?", letter) for letter in ("qkv" if "?" in theirs else "?"))
        pairs.setdefault(names, []).append(ours)
    return pairs


def _to_theirs(pairs: dict[tuple[str, ...], list[str]], state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for theirs, ours in pairs.items():
        whole = _joined(state, ours, theirs)
        if theirs[0].endswith("position_embedding.weight"):
            whole = whole.flatten(0, -2)  # timm's has a batch axis
        elif theirs[0].startswith("logit_"):
            whole = whole.reshape([] if kind == "clip" else [1])
        parts = whole.chunk(len(theirs)) if len(theirs) > 1 else [whole]
        # Clones: safetensors wants each tensor in memory of its own.
        tensors |= {name: part.detach().contiguous().clone() for name, part in zip(theirs, parts, strict=True)}
    return tensors


def _joined(tensors: Mapping[str, Tensor], names: Sequence[str], theirs: tuple[str, ...]) -> Tensor:
    whole = torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
    return whole.T if theirs[0] in ("text_projection.weight", "visual_projection.weight") else whole


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise InputError unless both have the same names and, but for axes of length 1, the same shapes."""
    shapes = [{n: [s for s in t.shape if s != 1] for n, t in tensors.items()} for tensors in (found, wanted)]
    for problem, names in {
        "lacks": wanted.keys() - found.keys(),
        "has besides the model": found.keys() - wanted.keys(),
        "has in another shape than the config says": {n for n in wanted.keys() & found if shapes[0][n] != shapes[1][n]},
    }.items():
        if names:
            first = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise InputError(f"{where} {problem} {len(names)} tensors ({first}): take weights and config of one model.")


def _model_from(config: dict[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """open_clip's model_cfg; for a SiglipModel in the words of open_clip's own ViT-B-16-SigLIP."""
    text, vision = (_fields(config, kind, part, path) for part in ("text_config", "vision_config"))
    words, image = _tower(text, "text_config", path), _tower(vision, "vision_config", path)
    acts = (vision["hidden_act"], text["hidden_act"])
    if len({act == "quick_gelu" for act in acts}) > 1 or (kind == "siglip" and "quick_gelu" in acts):
        raise InputError(f"{path}: hidden_act = {acts[0]!r} for images, {acts[1]!r} for texts: open_clip has no such {kind}.")
    tokenizer = {"hf_tokenizer_name": str(path.parent)}
    if kind == "siglip":
        width, projected = vision["hidden_size"], text.get("projection_size") or text["hidden_size"]
        if not vision["vision_use_head"] or projected != width:
            raise InputError(f"{path}: texts become {projected} numbers and images {width}, or without vision_use_head none.")
        image = {"image_size": vision["image_size"], "timm_model_name": _timm_name(vision, path)}
        image |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        # The tokenizer also where the folder has none: open_clip would take its own, whose tokens are other words.
        words |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"} | tokenizer
        words["tokenizer_kwargs"] = {"clean": "canonicalize"}
        more = {"embed_dim": width, "init_logit_bias": -10, "custom_text": True}
        return more | {"vision_cfg": image, "text_cfg": words}
    own = text["vocab_size"] == VOCABULARY
    if text["eos_token_id"] != LEGACY_EOT and not (own and text["eos_token_id"] == EOT):
        words |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    if not own or not _has_own_tokenizer(path.parent):
        words |= tokenizer
    image["head_width"] = image["width"] // image.pop("heads")
    model = {"embed_dim": config.get("projection_dim", 512), "vision_cfg": image, "text_cfg": words}
    return model | ({"quick_gelu": True} if acts[0] == "quick_gelu" else {})


def _tower(fields: dict[str, Any], part: str, path: Path) -> dict[str, Any]:
    width, hidden, act = fields["hidden_size"], fields["intermediate_size"], fields["hidden_act"]
    if act not in ACTIVATIONS:
        raise InputError(f"{path}: {part}.hidden_act = {act!r}: open_clip has only {', '.join(ACTIVATIONS)}.")
    if width % fields["num_attention_heads"]:
        raise InputError(f"{path}: {part}.num_attention_heads = {fields['num_attention_heads']} does not divide {width}.")
    tower = {ours: fields[theirs] for theirs, ours in _SIZES.items() if theirs in fields}
    if hidden != 4 * width:
        exact = int(width * (hidden / width)) == hidden  # open_clip rounds down
        tower["mlp_ratio"] = hidden / width if exact else math.nextafter(hidden / width, math.inf)
    if fields["layer_norm_eps"] != 1e-5:
        tower["norm_kwargs"] = {"eps": fields["layer_norm_eps"]}
    return tower | ({"act_kwargs": dict(ACTIVATIONS[act])} if ACTIVATIONS[act] else {})


def _timm_name(vision: dict[str, Any], path: Path) -> str:
    """The name under which timm has an image tower of these sizes; open_clip passes nothing but a name to timm."""
    import timm

    for name in timm.list_models(f"vit_*_patch{vision['patch_size']}_siglip_{vision['image_size']}"):
        if all(vision[field] == size for field, size in _timm_tower(name).items() if field != "hidden_act"):
            return str(name)
    sizes = ", ".join(f"{n} = {vision[n]}" for n in ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
    raise InputError(f"{path}: open_clip builds only SigLIPs that timm names, and it names none like this ({sizes}, …).")


def _timm_tower(name: str) -> dict[str, Any]:
    """The sizes of a SigLIP image tower of timm, in the words of transformers."""
    import timm

    with torch.device("meta"):
        trunk = timm.create_model(name, num_classes=0, global_pool="map")
    block, patches = trunk.blocks[0], trunk.patch_embed
    sizes = {"hidden_size": trunk.embed_dim, "intermediate_size": block.mlp.fc1.out_features, "num_channels": 3}
    sizes |= {"num_hidden_layers": len(trunk.blocks), "num_attention_heads": block.attn.num_heads}
    sizes |= {"image_size": patches.img_size[0], "patch_size": patches.patch_size[0], "layer_norm_eps": trunk.norm.eps}
    return sizes | {"hidden_act": "gelu_pytorch_tanh" if "tanh" in repr(block.mlp.act).lower() else "gelu"}


def _fields(config: dict[str, Any], kind: str, part: str, path: Path) -> dict[str, Any]:
    """A tower's part of config.json, with transformers' defaults for what it leaves out."""
    defaults, given, legacy = DEFAULTS[kind, part], config.get(part) or {}, config.get(f"{part}_dict") or {}
    if not isinstance(given, dict) or not isinstance(legacy, dict):
        raise InputError(f"{path}: {part} is not a table of settings: fetch the file again.")
    # In folders of early versions the part with _dict wins, with all its defaults.
    fields = defaults | given | (defaults | legacy if legacy and kind == "clip" else {})
    checked = {"projection_dim": config.get("projection_dim", 512), **{name: fields[name] for name in defaults}}
    for name, value in checked.items():
        default = defaults.get(name, 512)
        alike = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not alike or (type(default) is int and value < 1) or (name == "num_channels" and value != 3):
            raise InputError(f"{path}: {part}.{name} = {value!r} cannot be: a usual value is {default!r}.")
    return fields


def _preprocessing(folder: Path, kind: str) -> dict[str, Any]:
    """open_clip's preprocess_cfg; what the folder leaves out is as transformers has it."""
    path, clip = folder / PREPROCESSOR, kind == "clip"
    found = _json(path) if path.is_file() else {}
    if not found and (path := folder / "processor_config.json").is_file():
        found = _json(path).get("image_processor") or {}
    mean, std = found.get("image_mean", MEAN if clip else [0.5] * 3), found.get("image_std", STD if clip else [0.5] * 3)
    if not found.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    resample, size = found.get("resample", 3), found.get("size", {} if clip else {"height": 224})
    if resample not in INTERPOLATIONS or not all(isinstance(x, list) and len(x) == 3 for x in (mean, std)):
        raise InputError(f"{path}: open_clip needs image_mean and image_std of 3 numbers, and a resample of 2 or 3.")
    mode = "squash" if isinstance(size, dict) and "height" in size else "shortest"
    return {"mean": mean, "std": std, "interpolation": INTERPOLATIONS[resample], "resize_mode": mode}


def _has_own_tokenizer(folder: Path) -> bool:
    """Whether a folder's vocabulary is open_clip's own; a folder without a tokenizer counts as one that has it."""
    own = _tokenizer_files(0)["vocab.json"]
    if (folder / "vocab.json").is_file():
        return bool(_json(folder / "vocab.json") == own)
    if (folder / "tokenizer.json").is_file():
        return bool((_json(folder / "tokenizer.json").get("model") or {}).get("vocab") == own)
    return not any((folder / name).is_file() for name in TOKENIZER_FILES)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        files = {Path(str(name)).name for name in shards.values()} if isinstance(shards, dict) else set()
    elif not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        why = "only a pytorch_model.bin, which could run code when opened" if pickled else f"no {WEIGHTS}"
        raise InputError(f"{folder} holds {why}: save the model again with transformers' save_pretrained.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{folder / name} cannot be read ({str(error)[:200]}): fetch it again.") from None
    return tensors


def _model_to(model: dict[str, Any], kind: str) -> dict[str, Any]:
    """config.json for an open_clip model_cfg; raises InputError where there is none."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    timm_name = {"timm_model_name": model["vision_cfg"].get("timm_model_name")}
    needed = {**_SIGLIP_NEEDS, **timm_name, "init_logit_bias": model.get("init_logit_bias")} if kind == "siglip" else {}
    _settings(model, {}, needed, "model_cfg", kind)
    vision = _settings(model["vision_cfg"], CLIPVisionCfg, needed, "vision_cfg", kind)
    text = _settings(model["text_cfg"], CLIPTextCfg, needed, "text_cfg", kind)
    pool, size = text["pool_type"], vision["image_size"]
    ...
