"""The heads of a run's terms, apart from the towers: written beside a finished model, and taken up from one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.export import WEIGHTS, is_open_clip_folder, read_open_clip_folder
from declip.objectives.objective import Objective

LEFT_OUT = ("nearest_neighbour.",)  # a queue of captions seen, nothing learnt


def heads_of(model: DualEncoder, objective: Objective) -> dict[str, Tensor]:
    """What the terms have learnt, by term, and the mask embedding."""
    heads = {name: t for name, t in objective.terms.state_dict().items() if not name.startswith(LEFT_OUT)}
    if model.mask_embedding is not None:
        heads["mask_embedding"] = model.mask_embedding.detach()
    return heads


def start_from(folder: str, model: DualEncoder, objective: Objective) -> None:
    """Load the towers of a finished or converted model, and the heads that the run's terms share with it.

    A head that is not there starts anew, and a line on stderr says so. Raises InputError where the folder holds no
    model, or one of another architecture.
    """
    path = Path(folder.removeprefix("local-dir:"))
    if not is_open_clip_folder(path):
        raise InputError(f"model.start = {folder!r} holds no finished model (no {WEIGHTS}): train or convert one first.")
    finished = read_open_clip_folder(path)
    _load(model.clip, finished.weights, f"model.start = {folder!r}")
    for name, term in objective.terms.items():
        own = {key.removeprefix(f"{name}."): t for key, t in finished.heads.items() if key.startswith(f"{name}.")}
        if own:
            _load(term, own, f"model.start = {folder!r}: {name}")
        elif name not in LEFT_OUT and term.state_dict():
            print(f"model.start: {folder} has no {name}, which starts anew.", file=sys.stderr)
    if model.mask_embedding is not None and "mask_embedding" in finished.heads:
        with torch.no_grad():
            model.mask_embedding.copy_(finished.heads["mask_embedding"])


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
