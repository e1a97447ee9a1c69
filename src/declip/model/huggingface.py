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
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import InputError
from declip.files import write_atomically
from declip.model.dual_encoder import NORMALIZATIONS
from declip.model.export import read_weights

CONFIG, PREPROCESSOR, VOCAB = "config.json", "preprocessor_config.json", "vocab.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = [VOCAB, "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json", "tokenizer.json"]
TOKENIZER_FILES += ["tokenizer_config.json", "special_tokens_map.json"]
NAMES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
EOT, VOCABULARY = 49407, 49408  # of open_clip's own tokenizer
LEGACY_EOT = 2  # with this, transformers takes the highest token of a caption, as open_clip's argmax does
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

# What transformers takes where config.json leaves a field out.
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP = {**_TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_TOWER, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}
_WORDS, _IMAGE = {"vocab_size": VOCABULARY, "max_position_embeddings": 77}, {"num_channels": 3, "image_size": 224}
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("clip", "text_config"): {**_CLIP, **_TEXT, **_WORDS, "eos_token_id": EOT},
    ("clip", "vision_config"): {**_CLIP, **_IMAGE, "patch_size": 32},
    ("siglip", "text_config"): {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64},
    ("siglip", "vision_config"): {**_SIGLIP, **_IMAGE, "patch_size": 16, "vision_use_head": True},
}
_SIZES = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
_SIZES |= {"max_position_embeddings": "context_length"} | {x: x for x in ("vocab_size", "image_size", "patch_size")}

# Settings that a way there and back may change: for training only, of the tokenizer, idle, or said in other words.
_NEUTRAL = {
    *("vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "nonscalar_logit_scale", "mlp_ratio", "eos_id"),
    *("patch_dropout", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained"),
    *("timm_drop", "timm_drop_path", "pad_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
}

Pairs = dict[tuple[str, ...], list[str]]  # transformers' names of tensors and open_clip's; joined, they are the same
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed
_RENAMED = (  # within a tower; "?" stands for q, k and v, which open_clip has in one tensor
    (r"^(transformer\.resblocks|trunk\.blocks)\.", "encoder.layers."),
    (r"^(positional_embedding|trunk\.pos_embed)$", "embeddings.position_embedding.weight"),
    (r"^(class_embedding|token_embedding)", r"embeddings.\1"),
    (r"^(conv1|trunk\.patch_embed\.proj)\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # the slip is theirs
    (r"^(ln_post|trunk\.norm)\.", "post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^(text_projection|trunk\.attn_pool)\.", "head."),
    (r"^head\.latent$", "head.probe"),
    (r"^head\.(q|kv)\.", "head.attention.in_proj_"),  # one tensor here, two of open_clip
    (r"^head\.proj\.", "head.attention.out_proj."),
    (r"^head\.norm\.", "head.layernorm."),
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

    Where the config has `hf_tokenizer_name`, which is `folder`, a folder for open_clip wants its TOKENIZER_FILES too.
    Images are resized straight to the model's size, whatever sizes the Hugging Face folder resizes and crops to.
    Raises InputError where the folder holds no such model, a file of it is broken, a tensor is missing, left over or
    of another shape, or open_clip cannot represent the model.
    """
    path = folder / CONFIG
    config = _json(path)
    if (kind := config.get("model_type")) not in tuple(NAMES):
        raise InputError(f"{path} is of model_type {kind!r}: give a folder of a CLIPModel or a SiglipModel.")
    model = _model_from(config, kind, path)
    skeleton = _skeleton(model, str(path))
    pairs = _pairs(skeleton)
    tensors = {n: tensor for n, tensor in read_tensors(folder).items() if not n.endswith("embeddings.position_ids")}
    _check(tensors, _to_theirs(pairs, skeleton, kind), str(folder))
    return {"model_cfg": model, "preprocess_cfg": _preprocessing(folder, kind)}, _to_ours(pairs, tensors, skeleton)


def write_huggingface(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write an open_clip config and its tensors as a Hugging Face folder, which is made where there is none.

    The tokenizer goes along if it is open_clip's own, or lies in the folder that `hf_tokenizer_name` names.
    Raises InputError where transformers cannot represent the model, `state` does not fit it, or the folder cannot be
    written; OSError where the disk is full.
    """
    from safetensors.torch import save

    model, options = json.loads(json.dumps([config.get("model_cfg", config), config.get("declip", {})]))
    for name, usual in {"towers": "both", "similarity": "embedding"}.items():
        if options.get(name, usual) != usual:
            raise _refusal("clip", f"declip.{name}", options[name], "which compares embeddings of images and texts")
    if name := model.get("text_cfg", {}).get("hf_model_name"):
        raise _refusal("clip", "text_cfg.hf_model_name", name, "whose text tower is its own")
    skeleton = _skeleton(model, "model_cfg")
    kind = "siglip" if re.search(r"_siglip_\d+$", str(model["vision_cfg"].get("timm_model_name"))) else "clip"
    theirs = _model_to(model, kind)
    size, length = theirs["vision_config"]["image_size"], theirs["text_config"]["max_position_embeddings"]
    processor = _processor(config.get("preprocess_cfg", {}), size, options.get("resize", size), kind)
    _check(state, skeleton, "The state")
    tensors = _to_theirs(_pairs(skeleton), state, kind)
    if kind == "siglip":
        tensors.setdefault("logit_bias", torch.zeros(1))  # no bias is a bias of 0
    files: dict[str, Any] = {WEIGHTS: save(tensors, {"format": "pt"}), PREPROCESSOR: processor}
    if source := model["text_cfg"].get("hf_tokenizer_name"):
        found = [Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
        files |= {path.name: path.read_bytes() for path in found}
    elif kind == "clip":
        files |= _tokenizer_files(length)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in {**files, CONFIG: theirs}.items():  # the config last: with it the folder is whole
            content = data if isinstance(data, bytes) else json.dumps(data, indent=2, ensure_ascii=False).encode()
            write_atomically(folder / name, partial(Path.write_bytes, data=content))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror}): give another folder.") from None


def _skeleton(model: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of the model that open_clip would build, without memory: names and shapes."""
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {name: value for name, value in model.items() if name != "custom_text"}
    try:
        settings["vision_cfg"] = {**model["vision_cfg"], "timm_model_pretrained": False}
        with torch.device("meta"):
            return dict((CustomTextCLIP if model.get("custom_text") else CLIP)(**settings).state_dict())
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        raise InputError(f"{where}: open_clip cannot build this model: {str(error).rstrip('.')}.") from None


def _pairs(skeleton: Mapping[str, Tensor]) -> Pairs:
    pairs: Pairs = {}
    for ours in skeleton:
        inner, theirs = ours.removeprefix("text.").removeprefix("visual."), _PROJECTIONS.get(ours.removeprefix("text."))
        for pattern, replacement in _RENAMED:
            inner = re.sub(pattern, replacement, inner)
        tower = "" if inner.startswith("logit_") else "vision_model." if ours.startswith("visual.") else "text_model."
        names = [(theirs or tower + inner).replace("?", letter) for letter in ("qkv" if "?" in inner else "?")]
        pairs.setdefault(tuple(names), []).append(ours)
    return pairs


def _to_theirs(pairs: Pairs, state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for theirs, ours in pairs.items():
        whole = torch.cat([state[name].detach().reshape(state[name].shape or [1]) for name in ours])
        whole = whole[0] if ours[0].endswith("pos_embed") else whole  # timm's has a batch axis
        whole = whole.T if theirs[0] in _PROJECTIONS.values() else whole
        for name, part in zip(theirs, whole.chunk(len(theirs)), strict=True):
            shape = [] if name == "logit_scale" and kind == "clip" else part.shape
            tensors[name] = part.reshape(shape).clone(memory_format=torch.contiguous_format)  # safetensors wants clones
    return tensors


def _to_ours(pairs: Pairs, tensors: Mapping[str, Tensor], skeleton: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for theirs, ours in pairs.items():
        whole = torch.cat([tensors[name].reshape(tensors[name].shape or [1]) for name in theirs])
        whole = whole.T if theirs[0] in _PROJECTIONS.values() else whole
        rows = [skeleton[name].numel() * len(whole) // whole.numel() for name in ours]
        for name, part in zip(ours, torch.split(whole, rows), strict=True):
            state[name] = part.reshape(skeleton[name].shape).clone(memory_format=torch.contiguous_format)
    return state


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError unless both have the same names and, but for axes of length 1, the same shapes."""
    sizes, others = ({n: [x for x in t.shape if x != 1] for n, t in tensors.items()} for tensors in (found, wanted))
    problems = {"lacks": wanted.keys() - found.keys(), "has besides the model": found.keys() - wanted.keys()}
    problems["has in another shape than its config says"] = {n for n in sizes if sizes[n] != others.get(n)}
    for problem, names in problems.items():
        if names:
            first = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise InputError(f"{where} {problem} {len(names)} tensors ({first}): take weights and config of one model.")


def _model_from(config: dict[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """open_clip's model_cfg; for a SiglipModel in the words of open_clip's own ViT-B-16-SigLIP."""
    (text, words), (vision, image) = (_tower(config, kind, part, path) for part in ("text_config", "vision_config"))
    quick, tokenizer = text["hidden_act"] == "quick_gelu", {"hf_tokenizer_name": str(path.parent)}
    if quick != (vision["hidden_act"] == "quick_gelu") or (quick and kind == "siglip"):
        acts = f"{vision['hidden_act']} and {text['hidden_act']}"
        raise InputError(f"{path}: open_clip's {kind} cannot have the hidden_act of both towers ({acts}).")
    if kind == "siglip":
        width, projected = vision["hidden_size"], text.get("projection_size") or text["hidden_size"]
        if projected != width or not vision["vision_use_head"]:
            raise InputError(f"{path}: it needs vision_use_head, and projection_size = {projected} to be {width}.")
        image = {"image_size": vision["image_size"], "timm_model_name": _timm_name(vision, path)}
        image |= {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        # The tokenizer also where the folder has none: open_clip would take its own, whose tokens are other words.
        words |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"} | tokenizer
        more = {"embed_dim": width, "init_logit_bias": -10, "custom_text": True}
        return more | {"vision_cfg": image, "text_cfg": words | {"tokenizer_kwargs": {"clean": "canonicalize"}}}
    own, end = text["vocab_size"] == VOCABULARY, text["eos_token_id"]
    words |= {} if own else tokenizer
    if end != LEGACY_EOT and not (own and end == EOT):
        words |= {"pool_type": "eos", "eos_id": end}
    image["head_width"] = image["width"] // image.pop("heads")
    model = {"embed_dim": text["projection_dim"], "vision_cfg": image, "text_cfg": words}
    return model | ({"quick_gelu": True} if quick else {})


def _tower(config: dict[str, Any], kind: str, part: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tower's part of config.json with all its defaults, and the same as a text_cfg or vision_cfg."""
    defaults, given, legacy = DEFAULTS[kind, part], config.get(part) or {}, config.get(f"{part}_dict") or {}
    if not isinstance(given, dict) or not isinstance(legacy, dict):
        raise InputError(f"{path}: {part} is not a table of settings: fetch the file again.")
    # In folders of early versions the part with _dict wins, with all its defaults. projection_dim is outside.
    fields = defaults | given | (defaults | legacy if legacy and kind == "clip" else {})
    fields |= {name: config.get(name, 512) for name in ("projection_dim",) if name in defaults}
    for name, default in defaults.items():
        value = fields[name]
        alike = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not alike or (type(default) is int and value < 1) or (name == "num_channels" and value != 3):
            raise InputError(f"{path}: {part}.{name} = {value!r} cannot be: a usual value is {default!r}.")
    width, heads, act = fields["hidden_size"], fields["num_attention_heads"], fields["hidden_act"]
    if act not in ACTIVATIONS:
        raise InputError(f"{path}: {part}.hidden_act = {act!r}: open_clip has only {', '.join(ACTIVATIONS)}.")
    if width % heads:
        raise InputError(f"{path}: {part}.num_attention_heads = {heads} does not divide {width}.")
    tower = {ours: fields[theirs] for theirs, ours in _SIZES.items() if theirs in fields}
    if (ratio := fields["intermediate_size"] / width) != 4:  # open_clip rounds width * ratio down
        tower["mlp_ratio"] = (
            ratio if int(width * ratio) == fields["intermediate_size"] else math.nextafter(ratio, math.inf)
        )
    if fields["layer_norm_eps"] != 1e-5:
        tower["norm_kwargs"] = {"eps": fields["layer_norm_eps"]}
    return fields, tower | ({"act_kwargs": {"approximate": "tanh"}} if act == ACTIVATIONS[2] else {})


def _timm_name(vision: dict[str, Any], path: Path) -> str:
    """The name under which timm has an image tower of these sizes; open_clip passes nothing but a name to timm."""
    import timm

    for name in timm.list_models(f"vit_*_patch{vision['patch_size']}_siglip_{vision['image_size']}"):
        if all(vision[field] == size for field, size in _timm_tower(name).items() if field != "hidden_act"):
            return str(name)
    sizes = ", ".join(f"{n} = {vision[n]}" for n in ("hidden_size", "num_hidden_layers", "patch_size", "image_size"))
    raise InputError(f"{path}: open_clip can build only SigLIPs that timm names, and it names none with {sizes}.")


def _timm_tower(name: str) -> dict[str, Any]:
    """The sizes of a SigLIP image tower of timm, in the words of transformers."""
    import timm

    with torch.device("meta"):
        trunk: Any = timm.create_model(name, num_classes=0, global_pool="map")
    block, patches = trunk.blocks[0], trunk.patch_embed
    sizes = {"hidden_size": trunk.embed_dim, "intermediate_size": block.mlp.fc1.out_features}
    sizes |= {"num_hidden_layers": len(trunk.blocks), "num_attention_heads": block.attn.num_heads}
    sizes |= {"image_size": patches.img_size[0], "patch_size": patches.patch_size[0], "layer_norm_eps": trunk.norm.eps}
    return sizes | {"hidden_act": ACTIVATIONS[1 + ("tanh" in repr(block.mlp.act).lower())]}


def _preprocessing(folder: Path, kind: str) -> dict[str, Any]:
    """open_clip's preprocess_cfg; what the folder leaves out is as transformers has it."""
    files = [folder / PREPROCESSOR, folder / "processor_config.json"]
    found = next((_json(path) for path in files if path.is_file()), {})
    found = inner if isinstance(inner := found.get("image_processor", found), dict) else {}
    usual = NORMALIZATIONS["clip" if kind == "clip" else "half"]
    mean, std = found.get("image_mean", usual[0]), found.get("image_std", usual[1])
    if not found.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    resample, size = found.get("resample", 3), found.get("size", {} if kind == "clip" else {"height": 224})
    numeric = [[type(y) in (int, float) for y in x] if isinstance(x, (list, tuple)) else [] for x in (mean, std)]
    if resample not in tuple(INTERPOLATIONS) or numeric != [[True] * 3] * 2:
        raise InputError(f"{folder}: open_clip needs image_mean and image_std of 3 numbers, and a resample of 2 or 3.")
    mode = "squash" if isinstance(size, dict) and "height" in size else "shortest"
    return {"mean": list(mean), "std": list(std), "interpolation": INTERPOLATIONS[resample], "resize_mode": mode}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; nothing is unpickled."""
    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        shards = _json(folder / INDEX).get("weight_map")
        files = {Path(str(name)).name for name in shards.values()} if isinstance(shards, dict) else set()
    elif not (folder / WEIGHTS).is_file():
        pickled = any(folder.glob("pytorch_model*.bin"))
        why = "only a pytorch_model.bin, which could run code when opened" if pickled else f"no {WEIGHTS}"
        raise InputError(f"{folder} holds {why}: save the model again with transformers' save_pretrained.")
    return {name: tensor for file in sorted(files) for name, tensor in read_weights(folder / file).items()}


def _model_to(model: dict[str, Any], kind: str) -> dict[str, Any]:
    """config.json for an open_clip model_cfg; raises InputError where reading that would give another model."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    usual = {"vision_cfg": dataclasses.asdict(CLIPVisionCfg()), "text_cfg": dataclasses.asdict(CLIPTextCfg())}
    vision, text = (usual[part] | model[part] for part in usual)
    if not isinstance(vision["layers"], int):
        raise _refusal(kind, "vision_cfg.layers", vision["layers"], "whose image tower is no ResNet")
    quick, width = bool(model.get("quick_gelu")), model["embed_dim"]
    vision["heads"] = vision["width"] // vision["head_width"]
    image = _timm_tower(vision["timm_model_name"]) if kind == "siglip" else _tower_to(vision, quick)
    argmax = EOT if text["vocab_size"] == VOCABULARY and not text["hf_tokenizer_name"] else LEGACY_EOT
    end = text["eos_id"] if text["pool_type"] == "eos" else argmax
    words = {**_tower_to(text, quick), "eos_token_id": end, "model_type": f"{kind}_text_model"}
    config = {"architectures": [NAMES[kind]], "model_type": kind, "text_config": words}
    (config if kind == "clip" else words)["projection_dim" if kind == "clip" else "projection_size"] = width
    config["vision_config"] = {**image, "model_type": f"{kind}_vision_model"}
    back = _model_from(config, kind, Path(CONFIG))
    back["init_logit_bias"] = model.get("init_logit_bias") if kind == "siglip" else None
    if text["pool_type"] == "eos" and end != LEGACY_EOT:
        back["text_cfg"]["pool_type"] = "eos"  # read as argmax, which is the same, where that token is the highest
    parts = {part: (fields | model[part], fields | back[part]) for part, fields in usual.items()}
    for part, (given, again) in {"model_cfg": (model, back), **parts}.items():
        for name in sorted(given.keys() - _NEUTRAL):
            if _plain(given[name]) != _plain(again.get(name)):
                raise _refusal(kind, f"{part}.{name}", given[name])
    return config


def _refusal(kind: str, name: str, value: Any, why: str = "which has no setting for that") -> InputError:
    return InputError(f"{name} = {value!r} cannot be written as a {NAMES[kind]}, {why}: keep the open_clip folder.")


def _plain(value: Any) -> Any:
    """A setting in the simplest words that mean the same."""
    value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
    return None if value in (False, {}, {"eps": 1e-5}, {"approximate": "none"}) else value


def _tower_to(tower: dict[str, Any], quick: bool) -> dict[str, Any]:
    act = ACTIVATIONS[0] if quick else ACTIVATIONS[2] if _plain(tower["act_kwargs"]) else ACTIVATIONS[1]
    sizes = {theirs: _plain(tower[ours]) for theirs, ours in _SIZES.items() if ours in tower}
    eps, hidden = (tower["norm_kwargs"] or {}).get("eps", 1e-5), int(tower["width"] * tower["mlp_ratio"])
    return {**sizes, "intermediate_size": hidden, "layer_norm_eps": eps, "hidden_act": act}


def _processor(preprocess: dict[str, Any], size: int, resize: int, kind: str) -> dict[str, Any]:
    """preprocessor_config.json for open_clip's preprocess_cfg, whose defaults are CLIP's."""
    mean, std = NORMALIZATIONS["clip"]
    found = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"} | preprocess
    resample = {name: number for number, name in INTERPOLATIONS.items()}.get(found["interpolation"])
    if resample is None or found["resize_mode"] not in ("shortest", "squash"):
        raise _refusal(kind, "preprocess_cfg", {name: found[name] for name in ("interpolation", "resize_mode")})
    squash, square = found["resize_mode"] == "squash", {"height": size, "width": size}
    name = "SiglipImageProcessor" if kind == "siglip" and squash else "CLIPImageProcessor"
    sizes = {"size": square if squash else {"shortest_edge": resize}, "crop_size": square, "do_center_crop": not squash}
    numbers = {"image_mean": found["mean"], "image_std": found["std"], "resample": resample, "rescale_factor": 1 / 255}
    return {"image_processor_type": name, "do_convert_rgb": True, **numbers, **sizes}


def _tokenizer_files(length: int) -> dict[str, Any]:
    """open_clip's own tokenizer as files that transformers' CLIPTokenizer reads."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {
        VOCAB: {special.get(token, token): number for token, number in tokenizer.encoder.items()},
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks), ""]).encode(),
        "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": length},
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no table of settings")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a folder that save_pretrained wrote.") from None
