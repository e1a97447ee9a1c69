"""The heads of a run's terms, apart from the towers: written beside a finished model, and taken up from one."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.dual_encoder import NORMALIZATIONS, DualEncoder
from declip.model.export import FinishedModel
from declip.model.pretrained import read_model
from declip.objectives.objective import Objective
from declip.recipe import Model

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
    _load(model.clip, finished.weights, where)
    for name, term in objective.terms.items():
        own = {key.removeprefix(f"{name}."): t for key, t in finished.heads.items() if key.startswith(f"{name}.")}
        if own and not _of_other_words(term, own):
            _load(term, own, f"{where}: {name}")
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


def _load(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Strictly; what does not fit is named."""
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise InputError(f"{where} is of another architecture: {name} is missing there.")
        if name not in expected:
            raise InputError(f"{where} is of another architecture: it has {name}, the recipe's has not.")
        if state[name].shape != expected[name].shape:
            shapes = list(state[name].shape), list(expected[name].shape)
            raise InputError(f"{where} is of another architecture: {name} has the shape {shapes[0]}, not {shapes[1]}.")
    module.load_state_dict(state)
