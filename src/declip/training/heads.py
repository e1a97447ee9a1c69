"""The heads of a run's terms, apart from the towers: written beside a finished model, and taken up from one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.dual_encoder import NORMALIZATIONS, DualEncoder
from declip.model.export import FinishedModel, load_strictly
from declip.model.pretrained import read_model
from declip.model.towers import model_config
from declip.objectives.objective import Objective
from declip.recipe import Model

# Settings that change no trained model: for training only, or of where to fetch things.
FREE = {"patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained"} | {
    *("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "output_tokens", "context_length"),
    *("pad_id", "eos_id"),
}
LEFT_OUT = ("nearest_neighbour.",)  # a queue of captions seen, nothing learnt


def heads_of(model: DualEncoder, objective: Objective) -> dict[str, Tensor]:
    """What the terms have learnt, by term, and the mask embedding."""
    heads = {name: t for name, t in objective.terms.state_dict().items() if not name.startswith(LEFT_OUT)}
    if model.mask_embedding is not None:
        heads["mask_embedding"] = model.mask_embedding.detach()
    return heads


def start_from(options: Model, model: DualEncoder, objective: Objective) -> None:
    """Load the towers of the model that `options.start` names, and the heads that the run's terms share with it.

    A head that is not there, or that chooses among other words, starts anew, and a line on stderr says so.
    Raises InputError where there is no such model, or it is of another architecture or was trained on pixels of another
    mean and deviation.
    """
    where = f"model.start = {options.start!r}"
    finished = read_model(options.start or "")
    _check_pixels(finished, options, where)
    _check_settings(finished.config["model_cfg"], model_config(options), where)
    load_strictly(model.clip, finished.weights, where)
    for name, term in objective.terms.items():
        own = finished.head(name)
        if own and not _of_other_words(term, own):
            load_strictly(term, own, f"{where}: {name}")
        elif any(True for _ in term.parameters()):
            print(f"{where} has no head for {name} that fits, it starts anew.", file=sys.stderr)
    if model.mask_embedding is not None and "mask_embedding" in finished.heads:
        with torch.no_grad():
            model.mask_embedding.copy_(finished.heads["mask_embedding"])


def _of_other_words(term: nn.Module, own: dict[str, Tensor]) -> bool:
    """Whether a head chooses among other words: those of the captions that it was trained on (vocabulary=used)."""
    here, there = getattr(term, "index", None), own.get("index")
    if here is None or there is None:
        return here is not there
    return not torch.equal(here, there)


def _check_pixels(finished: FinishedModel, options: Model, where: str) -> None:
    stored = finished.config.get("preprocess_cfg", {})
    if "mean" not in stored or "std" not in stored:
        return
    found = torch.tensor([stored["mean"], stored["std"]])
    names = [name for name, pair in NORMALIZATIONS.items() if torch.allclose(found, torch.tensor(pair))]
    if names != [options.normalization]:
        raise InputError(
            f"{where} was trained with model.normalization = {names[0] if names else stored['mean']}, the recipe says "
            f"{options.normalization}: set it likewise."
        )


def _check_settings(stored: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Raise InputError where the same tensors would compute something else: other heads, another activation."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    quick = bool(stored.get("quick_gelu")), bool(asked.get("quick_gelu"))
    pairs: dict[str, tuple[Any, Any]] = {"quick_gelu": quick}
    for part, cfg in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        old, new = ({**asdict(cfg()), **config.get(part, {})} for config in (stored, asked))
        pairs |= {f"{part}.{name}": (old[name], new.get(name)) for name in old.keys() - FREE}
    for name, (there, here) in sorted(pairs.items()):
        if there != here:
            raise InputError(f"{where} is of another architecture: {name} is {there!r} there, {here!r} in the recipe.")
