"""What a run starts from: towers that have learnt already. What they are, the recipe then says too.

`read_start` reads the weights that `model.init`, `model.image.init` and `model.text.init` name, and returns the recipe
with their architecture, pixels and tokenizer filled in. `load_towers` puts the weights into the towers built from it,
with position embeddings fitted to another image size or caption length; `first_weights` are these tensors alone.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from declip.architecture import OURS, ImageTower, TextTower
from declip.errors import InputError, first_line
from declip.model.dual_encoder import NORMALIZATIONS, pixel_statistics
from declip.model.export import FinishedModel, check_tensors, is_open_clip_folder, read_weights
from declip.model.huggingface import is_huggingface_folder, read_tensors
from declip.model.parts import Part, is_projection, part_of
from declip.model.positions import fit_grid, fit_length
from declip.model.pretrained import read_model
from declip.model.released import read_state
from declip.model.towers import CONTEXT_LENGTH, Towers
from declip.recipe import Recipe, parse_recipe

EMBED_DIM = 512
"""Width of the joint embedding where neither the recipe nor a projection among the weights says it."""

# Settings that change no trained tower: for training only, or of where to fetch things.
_FREE = frozenset(
    {"patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained"}
    | {"hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "output_tokens", "pad_id", "eos_id"}
)
_PICKLED = (".pth", ".pt", ".bin", ".tar")
_WEIGHT_FILES = (".safetensors", *_PICKLED)
_CONFIG = "config.json"
_POSITIONS = re.compile(r"(positional_embedding|pos_embed)$")
_UNUSED = {
    "timm": {"layers", "width", "head_width", "patch_size"},
    "huggingface": {"layers", "width", "heads", "vocab_size"},
    "open_clip": set(),
}


class _Facts(NamedTuple):
    """What weights say of the recipe: what must be so, and what is so unless the recipe says otherwise."""

    fixed: dict[str, Any]
    usual: dict[str, Any]


@dataclass
class TowerStart:
    """The weights of one tower.

    where: what messages call it; kind: whose names the tensors have
    tensors: by their names inside the tower: timm's trunk, the Hugging Face model, else open_clip's tower with its
        projection
    classifier: [classes, width], of a timm network that comes with one
    """

    where: str
    kind: Literal["open_clip", "timm", "huggingface"]
    facts: _Facts
    tensors: dict[str, Tensor]
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    classifier: Tensor | None = None
    quick_gelu: bool | None = None
    projected_to: int | None = None
    custom_text: bool = False


@dataclass
class Start:
    """Both towers' weights, None where one starts at random; whole: the model that both come from, with its heads."""

    image: TowerStart | None = None
    text: TowerStart | None = None
    whole: FinishedModel | None = None


def read_start(recipe: Recipe) -> tuple[Recipe, Start]:
    """The weights that a recipe starts from, and the recipe with what follows from them.

    Raises InputError where there are no such weights, or the recipe asks for another architecture than theirs.
    """
    model = recipe.model
    if not (model.init or model.image.init or model.text.init):
        return recipe, Start()
    if model.init:
        if model.image.init or model.text.init:
            raise InputError("model.init gives both towers: leave out model.image.init and model.text.init.")
        finished = read_model(model.init)
        where = f"model.init = {model.init!r}"
        if finished.options["towers"] == "image":
            raise InputError(f"{where} holds an image tower alone: name it as model.image.init.")
        start = Start(_from_finished(finished, "image", where), _from_finished(finished, "text", where), finished)
    else:
        start = Start(
            _read_image(model.image) if model.image.init else None, _read_text(model.text) if model.text.init else None
        )
    return parse_recipe({**recipe.model_dump(exclude_unset=True), "model": _followed(recipe, start)}), start


def first_weights(start: Start, clip: Towers) -> dict[str, Tensor]:
    """The tensors that come from weights, by their names in towers built from the recipe that `read_start` returned.

    A projection that the weights have none for, or one of another width, is not among them: it starts at random.
    Raises InputError, naming the first tensor, where weights do not fit.
    """
    found: dict[str, Tensor] = {}
    if start.image is not None:
        found |= _fitted(start.image, clip, "image", alone=start.whole is None)
    if start.text is not None:
        found |= _fitted(start.text, clip, "text", alone=start.whole is None)
    if start.whole is not None:
        own = clip.state_dict().keys()
        found |= {name: t for name, t in start.whole.weights.items() if part_of(name) is None and name in own}
    return found


def load_towers(start: Start, clip: Towers) -> list[str]:
    """Put the weights into the towers; returns the names, within a tower, of projections that start at random.

    Not of towers that never have one, as timm's and Hugging Face's.
    Raises InputError as `first_weights` does.
    """
    found = first_weights(start, clip)
    clip.load_state_dict(found, strict=False)
    towers = (("image", start.image), ("text", start.text))
    started = {part for part, tower in towers if tower is not None and tower.kind == "open_clip"}
    anew = [
        name for name in clip.state_dict() if part_of(name) in started and is_projection(name) and name not in found
    ]
    return [name.removeprefix("visual.").removeprefix("text.") for name in anew]


# Reading


def _read_image(options: ImageTower) -> TowerStart:
    name, extra = options.init or "", options.model_extra or {}
    where, path = f"model.image.init = {name!r}", Path(name).expanduser()
    architecture = extra.get("timm_model_name")
    if path.is_file() and (architecture or path.suffix == ".safetensors"):
        if architecture is None:
            raise InputError(f"{where} does not say of which network it is: name it, model.image.timm_model_name=NAME.")
        return _from_timm(architecture, _read_file(path), where)
    if path.exists() or ":" in name.removeprefix("timm:"):
        return _from_finished(read_model(name), "image", where)
    return _from_timm(name.removeprefix("timm:"), None, where)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_weights(path)
    if path.suffix not in _PICKLED:
        raise InputError(f"{path} is no weight file: give one that ends in {', '.join(_WEIGHT_FILES)}.")
    return read_state(path)


def _from_timm(name: str, tensors: dict[str, Tensor] | None, where: str) -> TowerStart:
    """A timm network; tensors: of its file, None to have timm fetch them."""
    import timm

    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None:
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.0)
        raise InputError(
            f"{where}: timm knows no network {name!r}; the nearest are {', '.join(near)}. Give a timm name, a weight "
            "file with model.image.timm_model_name, or a model that declip evaluate opens."
        )
    if tensors is None:
        try:
            tensors = timm.create_model(name, pretrained=True).state_dict()
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"{where}: timm cannot fetch its weights: {first_line(error)}.") from None
    classifier = (config.classifier,) if isinstance(config.classifier, str) else tuple(config.classifier or ())
    trunk = {name: t for name, t in tensors.items() if not name.startswith(tuple(f"{one}." for one in classifier))}
    rows = next((tensors[f"{one}.weight"].flatten(1) for one in classifier if f"{one}.weight" in tensors), None)
    usual = {"timm_pool": "", "timm_proj": "linear", "image_size": config.input_size[-1]}
    facts = _Facts({"timm_model_name": name}, usual)
    return TowerStart(where, "timm", facts, trunk, (tuple(config.mean), tuple(config.std)), rows)


def _read_text(options: TextTower) -> TowerStart:
    name = options.init or ""
    where, path = f"model.text.init = {name!r}", Path(name.removeprefix("local-dir:")).expanduser()
    ready = path.is_file() or (path.is_dir() and (is_open_clip_folder(path) or is_huggingface_folder(path)))
    if ready or ":" in name.removeprefix("local-dir:"):
        return _from_finished(read_model(name), "text", where)
    if path.is_dir() and not (path / _CONFIG).is_file():
        raise InputError(f"{where} holds no model: it has neither {_CONFIG} nor open_clip's files.")
    return _from_transformers(str(path) if path.is_dir() else name, where)


def _from_transformers(name: str, where: str) -> TowerStart:
    """A Hugging Face text model, from its folder or by its name on the hub."""
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise InputError(f"{where} needs transformers: pip install 'declip[huggingface]'.") from None
    try:
        config = AutoConfig.from_pretrained(name)
        if Path(name).is_dir():
            tensors = read_tensors(Path(name))
        else:
            tensors = AutoModel.from_pretrained(name, use_safetensors=True).state_dict()
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be opened: {first_line(error)}.") from None
    prefix = next((p for p in (f"{config.model_type}.", "transformer.") if any(n.startswith(p) for n in tensors)), "")
    inner = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    longest = getattr(config, "max_position_embeddings", None) or CONTEXT_LENGTH
    usual = {
        "hf_tokenizer_name": name,
        "hf_pooler_type": _pooling(Path(name)),
        "hf_proj_type": "linear",
        "context_length": min(CONTEXT_LENGTH, longest),
    }
    return TowerStart(where, "huggingface", _Facts({"hf_model_name": name}, usual), inner)


def _pooling(folder: Path) -> str:
    """How a folder of sentence-transformers pools tokens; the mean where nothing is said."""
    try:
        said = json.loads((folder / "1_Pooling" / _CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        said = {}
    of_first = isinstance(said, dict) and said.get("pooling_mode_cls_token")
    return "cls_last_hidden_state_pooler" if of_first else "mean_pooler"


def _from_finished(finished: FinishedModel, part: Part, where: str) -> TowerStart:
    """A tower of a model that holds both."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    config = finished.config["model_cfg"]
    usual_cfg = asdict(CLIPVisionCfg() if part == "image" else CLIPTextCfg())
    own = config.get("vision_cfg" if part == "image" else "text_cfg", {})
    shown = {"layers", "width", "head_width", "patch_size", "image_size", "heads", "vocab_size", "context_length"}
    settings = {k: v for k, v in usual_cfg.items() if k in shown} | {k: v for k, v in own.items() if v is not None}
    size = "image_size" if part == "image" else "context_length"
    free = {size, *_FREE}
    facts = _Facts(
        {k: v for k, v in settings.items() if k not in free},
        {k: v for k, v in settings.items() if k in free and k != "patch_dropout"},
    )
    if finished.tokenizer and part == "text" and "hf_tokenizer_name" in settings:
        facts.usual["hf_tokenizer_name"] = finished.tokenizer.removeprefix("local-dir:")
    tensors = _image_tensors(finished) if part == "image" else _text_tensors(finished)
    if not tensors:
        raise InputError(f"{where} has no {part} tower.")
    preprocessing = finished.config.get("preprocess_cfg", {})
    pixels = (tuple(preprocessing["mean"]), tuple(preprocessing["std"])) if "mean" in preprocessing else None
    quick = bool(config.get("quick_gelu"))
    found = TowerStart(where, "open_clip", facts, tensors, pixels if part == "image" else None, quick_gelu=quick)
    found.projected_to, found.custom_text = int(config["embed_dim"]), part == "text" and bool(config.get("custom_text"))
    return found


def _image_tensors(finished: FinishedModel) -> dict[str, Tensor]:
    return {name.removeprefix("visual."): t for name, t in finished.weights.items() if name.startswith("visual.")}


def _text_tensors(finished: FinishedModel) -> dict[str, Tensor]:
    """By their names in a text tower, whether the model holds one or is one itself, as open_clip's CLIP."""
    apart = any(name.startswith("text.") for name in finished.weights)
    others = ("visual.", "logit_scale", "logit_bias", "attn_mask")
    return {
        name.removeprefix("text."): tensor
        for name, tensor in finished.weights.items()
        if (name.startswith("text.") if apart else not name.startswith(others))
    }


# What follows for the recipe


def _followed(recipe: Recipe, start: Start) -> dict[str, Any]:
    """The model section with what the weights say filled in; raises InputError where it says something else."""
    model = recipe.model
    values = model.model_dump(exclude_unset=True)
    if model.name is not None:
        raise InputError("model.name says which towers to build, and weights to start from say it too: leave it out.")
    for part, tower, options in (("image", start.image, model.image), ("text", start.text, model.text)):
        if tower is not None:
            values[part] = _filled(tower, options.model_dump(exclude_unset=True), f"model.{part}")
    towers = [tower for tower in (start.image, start.text) if tower is not None]
    widths = [tower.projected_to for tower in towers if tower.projected_to]
    if start.whole is not None:
        _same("model.embed_dim", widths[0], values.get("embed_dim", widths[0]), towers[0].where)
    values.setdefault("embed_dim", widths[0] if widths else EMBED_DIM)
    own = [tower for tower in towers if tower.quick_gelu is not None]
    for tower in own:
        _same("model.quick_gelu", tower.quick_gelu, values.setdefault("quick_gelu", own[0].quick_gelu), tower.where)
    if start.image is not None and start.image.pixels is not None:
        said = values.setdefault("normalization", _normalization(start.image.pixels))
        if not _alike(pixel_statistics(said), start.image.pixels):
            raise InputError(
                f"{start.image.where} was trained with model.normalization = {_normalization(start.image.pixels)}, the "
                f"recipe says {said}: leave it out."
            )
    if start.whole is not None and values.get("logit_bias_init") is None and "logit_bias" in start.whole.weights:
        values["logit_bias_init"] = float(start.whole.weights["logit_bias"])
    for tower in towers:
        if tower.custom_text:
            values["custom_text"] = True
    return values


def _filled(tower: TowerStart, said: Mapping[str, Any], section: str) -> dict[str, Any]:
    for name, value in said.items():
        if name in tower.facts.fixed:
            _same(f"{section}.{name}", tower.facts.fixed[name], value, tower.where)
        elif name not in {*OURS, *tower.facts.usual, *_FREE, *_UNUSED[tower.kind]}:
            raise InputError(f"{tower.where} is of another architecture: {section}.{name} = {value!r} is not its own.")
    filled = {**tower.facts.usual, **tower.facts.fixed, **said}
    for name in ("hf_model_pretrained", "timm_model_pretrained"):  # the weights are at hand
        if name in filled or name.replace("pretrained", "name") in filled:
            filled[name] = False
    return filled


def _same(name: str, there: Any, here: Any, where: str) -> None:
    if there != here:
        raise InputError(f"{where} is of another architecture: {name} is {there!r} there, {here!r} in the recipe.")


def _normalization(pixels: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    """Its name, or the numbers."""
    return next((name for name, numbers in NORMALIZATIONS.items() if _alike(numbers, pixels)), pixels)


def _alike(one: Any, other: Any) -> bool:
    return torch.allclose(torch.tensor(one), torch.tensor(other))


# Loading


def _fitted(start: TowerStart, clip: Towers, part: Part, alone: bool) -> dict[str, Tensor]:
    """A tower's weights by their names in `clip`, positions fitted.

    alone: the other tower is not of the same model, so that a projection of another width is one to be learnt.
    """
    prefix = _prefix(start, clip, part)
    expected = {n: t for n, t in clip.state_dict().items() if part_of(n) == part and n.startswith(prefix)}
    tensors = {prefix + name: tensor for name, tensor in start.tensors.items()}
    if start.kind == "huggingface":  # pooling and heads of other tasks
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    for name, tensor in list(tensors.items()):
        fits = name in expected and tensor.shape == expected[name].shape
        if alone and is_projection(name) and not fits:
            del tensors[name]
        elif name in expected and not fits and _POSITIONS.search(name):
            shape = expected[name].shape
            tensors[name] = fit_grid(tensor, shape) if part == "image" else fit_length(tensor, shape[0])
    if alone:
        expected = {n: t for n, t in expected.items() if n in tensors or not is_projection(n)}
    asked, given = ({name.removeprefix(prefix): t for name, t in some.items()} for some in (expected, tensors))
    check_tensors(asked, given, start.where)
    return tensors


def _prefix(start: TowerStart, clip: Towers, part: Part) -> str:
    """What stands before the names of the tower's tensors in `clip`."""
    if part == "image":
        return "visual.trunk." if start.kind == "timm" else "visual."
    if start.kind == "huggingface":
        return "text.transformer."
    return "" if hasattr(clip, "token_embedding") else "text."
