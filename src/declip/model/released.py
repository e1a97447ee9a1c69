"""The released checkpoints of the public DeCLIP code: CLIP, SLIP, FILIP, DeCLIP and DeFILIP (`.pth.tar`).

They are dictionaries whose `model` holds tensors under `module.*`. Their token table has a row more than OpenAI's, for
the mask token, and it stands before the start and end tokens, which so have other ids than everywhere else.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import InputError, first_line
from declip.model.dual_encoder import NORMALIZATIONS
from declip.model.export import FinishedModel
from declip.model.heads import ContrastiveHead, Predictor, Projector, TokenMappings
from declip.model.towers import build_from_config

VOCABULARY = 49409
# Released row -> ours: words, start, end, mask. Their mask token is 49406, their start and end tokens come after it.
ROWS = torch.cat([torch.arange(49406), torch.tensor([49407, 49408, 49406])])
TEXT = ("encode_text.", "text_encoder.")  # the second is SLIP's
HEADS = {
    "projector.": "simsiam.projector.",
    "predictor.": "simsiam.predictor.",
    "predictor_sim.": "simclr.head.",
    "text_label_predictor.": "masked_language.head.",
    "image_mapping.": "token_wise.mappings.image_mapping.",
    "text_mapping.": "token_wise.mappings.text_mapping.",
    "logit_scale_dense": "token_wise.logit_scale",
}
LINEAR = {"weight", "bias"}
HEAD_TENSORS = {
    "projector.": set(Projector(1, 1).state_dict()),
    "predictor.": set(Predictor(1, 1).state_dict()),
    "predictor_sim.": set(ContrastiveHead(1, 1, 1).state_dict()),
    "text_label_predictor.": LINEAR,
    "image_mapping.": LINEAR,
    "text_mapping.": LINEAR,
    "logit_scale_dense": {""},
}
# Heads that belong together.
TERMS = (
    ("projector.", "predictor."),
    ("predictor_sim.",),
    ("text_label_predictor.",),
    ("image_mapping.", "text_mapping.", "logit_scale_dense"),
)
UNUSED = re.compile(r"predictor_sim\.bn3\.")  # made, saved and never used


def read_released(path: Path, image_heads: int | None = None, text_heads: int | None = None) -> FinishedModel:
    """Read a released file; nothing in it is executed.

    Heads of the attention layers are not in the tensors' shapes: width / 64 unless told.
    Raises InputError for another kind of file, a damaged one, and one with tensors missing or left over.
    """
    return convert_released(read_state(path), str(path), image_heads, text_heads)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth.tar` file by name, without the prefix `module.`; raises InputError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch refuses what asks for code ("Unsupported global …"), and bytes that are no pickle at all.
        if "Unsupported operand" not in str(error) and "Weights only load failed" in str(error):
            raise InputError(f"{path} holds more than tensors: it is refused, loading it could run code.") from None
        raise InputError(f"{path} is damaged or no checkpoint.") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: {first_line(error)}.") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no tensors by name, neither under 'model' nor at the top: it is no checkpoint.")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def convert_released(
    state: dict[str, Tensor], where: str, image_heads: int | None = None, text_heads: int | None = None
) -> FinishedModel:
    """Released tensors (without `module.`) as an open_clip model and the heads of its terms; see `read_released`."""
    try:
        return _convert(state, where, image_heads, text_heads)
    except (ValueError, IndexError, RuntimeError) as error:  # a tensor without the dimensions that its name promises
        raise InputError(f"{where} does not fit together: {first_line(error)}.") from None


def _convert(state: dict[str, Tensor], where: str, image_heads: int | None, text_heads: int | None) -> FinishedModel:
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    prefix = _image_prefix(state, where)
    image = {f"visual.{n.removeprefix(prefix)}": t for n, t in state.items() if n.startswith(prefix)}
    text = {n.removeprefix(p): t for p in TEXT for n, t in state.items() if n.startswith(p)}
    rest = {n: t for n, t in state.items() if not n.startswith((prefix, *TEXT))} if prefix else {}
    vision_cfg, embed_dim = _vision_cfg(image, where, image_heads)
    if isinstance(vision_cfg["layers"], list):
        image = {name: tensor for name, tensor in image.items() if not name.startswith("visual.fc.")}  # dead at 224 px
    mean, std = NORMALIZATIONS["imagenet"]
    config: dict[str, Any] = {
        "model_cfg": {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision_cfg},
        "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bilinear", "resize_mode": "shortest"},
        # The published evaluation: shorter side to 256, then the central 224.
        "declip": {"resize": round(vision_cfg["image_size"] * 256 / 224)},
    }
    if not text:
        config["declip"]["towers"] = "image"
        rest.pop("logit_scale", None)
        _check(image, rest, config["model_cfg"], where)
        return FinishedModel(config, image)
    config["model_cfg"]["text_cfg"] = _text_cfg(text, where, text_heads)
    towers = {**image, **text}
    if "logit_scale" in rest:
        towers["logit_scale"] = rest.pop("logit_scale").reshape([])
    heads = _heads(rest, where)
    embedding = towers["token_embedding.weight"][ROWS]
    towers["token_embedding.weight"], heads["mask_embedding"] = embedding[:-1].clone(), embedding[-1].clone()
    _check(towers, rest, config["model_cfg"], where)
    _check_heads(heads, config["model_cfg"], where)
    if "token_wise.logit_scale" in heads and "simsiam.projector.linear1.weight" not in heads:
        config["declip"] |= {"similarity": "token_wise", "mask_padding": False}  # FILIP: nothing else was trained
    return FinishedModel(config, towers, heads)


def _image_prefix(state: dict[str, Tensor], where: str) -> str:
    """What stands before the image tower's names; files without a text tower may have none."""
    found = [name for name in state if name == "conv1.weight" or name.endswith(".conv1.weight")]
    found = [name for name in found if "layer" not in name]
    if not found:
        raise _refused(where, ["visual.conv1.weight"], sorted(state))
    return min(found, key=len).removesuffix("conv1.weight")


def _vision_cfg(image: dict[str, Tensor], where: str, heads: int | None) -> tuple[dict[str, Any], int]:
    """open_clip's vision_cfg and the width of the joint embedding, from the tensors' shapes."""
    resnet = "visual.layer1.0.conv1.weight" in image
    needed = ["visual.attnpool.positional_embedding", "visual.attnpool.c_proj.weight"] if resnet else []
    needed = needed or ["visual.positional_embedding", "visual.proj"]
    if missing := [name for name in needed if name not in image]:
        raise _refused(where, missing, [])
    grid = math.isqrt(image[needed[0]].shape[0] - 1)
    if resnet:
        layers: Any = [_count(image, rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
        width, size, embed_dim = image["visual.layer1.0.conv1.weight"].shape[0], 32 * grid, image[needed[1]].shape[0]
        head_width = _head_width(width * 32, heads, "--image-heads", where) if heads else 64
        return {"image_size": size, "layers": layers, "width": width, "head_width": head_width}, embed_dim
    width, _, patch, _ = image["visual.conv1.weight"].shape
    fields = {
        "image_size": grid * patch,
        "layers": _count(image, r"visual\.transformer\.resblocks\.(\d+)\."),
        "width": width,
        "head_width": _head_width(width, heads, "--image-heads", where),
        "patch_size": patch,
    }
    return fields, image["visual.proj"].shape[1]


def _text_cfg(text: dict[str, Tensor], where: str, heads: int | None) -> dict[str, Any]:
    needed = ["token_embedding.weight", "positional_embedding", "text_projection.weight"]
    if missing := [name for name in needed if name not in text]:
        raise _refused(where, [TEXT[0] + name for name in missing], [])
    rows, width = text["token_embedding.weight"].shape
    if rows != VOCABULARY:
        raise InputError(
            f"{where} is none of the released files: its token_embedding has {rows} rows, theirs has {VOCABULARY} "
            "(OpenAI's 49408 and a mask token)."
        )
    return {
        "context_length": text["positional_embedding"].shape[0],
        "vocab_size": VOCABULARY - 1,
        "width": width,
        "heads": width // _head_width(width, heads, "--text-heads", where),
        "layers": _count(text, r"transformer\.resblocks\.(\d+)\."),
        "proj_bias": True,
    }


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _head_width(width: int, heads: int | None, option: str, where: str) -> int:
    if heads is None and width % 64:
        raise InputError(
            f"{where}: a width of {width} is not made of heads of 64: say how many there are "
            f"(declip convert … {option} N)."
        )
    if heads is not None and (heads < 1 or width % heads):
        raise InputError(f"{where}: {option} {heads} does not divide the width of {width}.")
    return 64 if heads is None else width // heads


def _heads(rest: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Take the terms' heads out of `rest`, under our names; a term's heads are there whole or not at all."""
    for name in [name for name in rest if UNUSED.match(name)]:
        del rest[name]
    heads = {}
    for term in TERMS:
        names = {theirs + part for theirs in term for part in HEAD_TENSORS[theirs]}
        if names & rest.keys() and (missing := names - rest.keys()):
            raise _refused(where, sorted(missing), [])
    for theirs, ours in HEADS.items():
        for part in HEAD_TENSORS[theirs]:
            if theirs + part in rest:
                tensor = rest.pop(theirs + part)
                heads[ours + part] = tensor[ROWS] if theirs == "text_label_predictor." else tensor
    return heads


def _check_heads(heads: dict[str, Tensor], model_cfg: dict[str, Any], where: str) -> None:
    """Raise InputError unless each head has the shapes that its own width and the towers' ask for."""
    vision, dim, words = model_cfg["vision_cfg"], model_cfg["embed_dim"], model_cfg["text_cfg"]["width"]
    tokens = 32 * vision["width"] if isinstance(vision["layers"], list) else vision["width"]
    expected: dict[str, Tensor] = {}

    def expect(prefix: str, module: nn.Module) -> None:
        expected.update({prefix + name: tensor for name, tensor in module.state_dict().items()})

    with torch.device("meta"):
        if "simsiam.projector.linear3.weight" in heads:
            width, bottleneck = (
                heads[f"simsiam.{part}.weight"].shape[0] for part in ("projector.bn3", "predictor.bn1")
            )
            expect("simsiam.projector.", Projector(dim, width))
            expect("simsiam.predictor.", Predictor(width, bottleneck))
        if "simclr.head.bn2.weight" in heads:
            width, out = (heads[f"simclr.head.{part}"].shape[0] for part in ("bn2.weight", "linear3.bias"))
            expect("simclr.head.", ContrastiveHead(tokens, width, out))
        if "masked_language.head.weight" in heads:
            expect("masked_language.head.", nn.Linear(words, VOCABULARY))
        if "token_wise.logit_scale" in heads:
            out = heads["token_wise.mappings.image_mapping.bias"].shape[0]
            expect("token_wise.mappings.", TokenMappings(tokens, words, out))
            expected["token_wise.logit_scale"] = torch.zeros(())
    for name, tensor in expected.items():
        if heads[name].shape != tensor.shape:
            raise InputError(
                f"{where} does not fit together: {name} has the shape {list(heads[name].shape)}, the other tensors ask "
                f"for {list(tensor.shape)}."
            )


def _check(towers: dict[str, Tensor], rest: dict[str, Tensor], model_cfg: dict[str, Any], where: str) -> None:
    """Raise InputError unless the tensors are exactly those of the architecture."""
    with torch.device("meta"):
        expected = build_from_config(model_cfg).state_dict()
    if "text_cfg" not in model_cfg:
        expected = {name: tensor for name, tensor in expected.items() if name.startswith("visual.")}
    missing, extra = sorted(expected.keys() - towers.keys()), sorted(towers.keys() - expected.keys())
    if missing or extra or rest:
        raise _refused(where, missing, extra + sorted(rest))
    for name, tensor in towers.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{where} does not fit together: {name} has the shape {list(tensor.shape)}, the other tensors ask for "
                f"{list(expected[name].shape)}."
            )


def _refused(where: str, missing: list[str], extra: list[str]) -> InputError:
    def some(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    parts = [f"missing: {some(missing)}"] if missing else []
    parts += [f"left over: {some(extra)}"] if extra else []
    return InputError(f"{where} is none of the released files ({'; '.join(parts)}).")
