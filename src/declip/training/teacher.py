"""A teacher goes over the pairs once: what it makes of them is kept on disk, and steps pay nothing for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.decode import Pixels, decode_image
from declip.data.decoded import Images
from declip.data.images import eval_view
from declip.data.kept import Kept, States
from declip.data.sources import Source
from declip.data.storage import Storage
from declip.errors import InputError
from declip.evaluation.embedding import Encoder, embed_source, embed_texts
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import IMAGES_AT_ONCE, encode_image
from declip.model.parts import Part
from declip.model.pretrained import LoadedModel, load
from declip.model.products import by_onednn
from declip.model.start import Start, first_weights
from declip.model.text_tower import encode_text
from declip.model.tuning import LOCKED
from declip.progress import Progress
from declip.recipe import Recipe
from declip.training.embeddings_file import ENDINGS, EmbeddingsFile
from declip.training.locked import hash_of
from declip.training.pairs import digest_of_pairs
from declip.training.step import autocast

START = "start"
_TEACHERS_SCALE = 100.0  # of embeddings in a file, which say none: that of nearly all CLIP models


@dataclass
class Teacher:
    """What a run learns from, opened and not yet asked.

    width: of its embeddings; None of the start, whose features are compared as they are
    parts: the sides that it has, or that are asked of it
    """

    name: str
    width: int | None
    parts: tuple[Part, ...]
    logit_scale: float
    version: str
    embed: Callable[[Source, Part, Progress | None], States]

    def learn(self, images: Images, recipe: Recipe, kept: Kept, progress: Progress | None) -> Kept:
        """`kept` with the embeddings of all pairs, computed where the cache has them not of these pairs."""
        source, found = images.source, {}
        for part in self.parts:
            name = f"teacher's {part}s {hash_of(self.version, part, digest_of_pairs(source, part == 'image'))}"

            def write(place: Path, part: Part = part) -> None:
                with open(place, "wb") as file:  # given a path, numpy adds an ending
                    np.save(file, self.embed(source, part, progress))

            path = Storage.of(recipe.data).kept(name, write, f"what the teacher makes of {source.name}")
            found[f"teacher_{part}s"] = np.load(path, mmap_mode="r")
        return replace(kept, **found)

    def nothing(self, images: Images, kept: Kept, model: DualEncoder) -> Kept:
        """`kept` with zeros in the place of the embeddings, for a run that only measures its steps."""
        counts = {"image": len(images.source), "text": int(images.caption_ends[-1])}
        widths = {"image": model.pooled_width, "text": model.text.width}
        shapes = {part: (counts[part], self.width or widths[part]) for part in self.parts}
        zeros = {f"teacher_{part}s": np.broadcast_to(np.zeros((), np.float16), shape) for part, shape in shapes.items()}
        return replace(kept, **zeros)  # type: ignore[arg-type]


def open_teacher(recipe: Recipe, start: Start, device: torch.device) -> Teacher | None:
    """The teacher of the recipe's distillation term, where it has one; raises InputError where it cannot teach."""
    term = recipe.terms.active().get("distillation")
    if term is None:
        return None
    spec: str = term.teacher  # type: ignore[attr-defined]
    if spec == START:
        return _of_start(recipe, start, device)
    if Path(spec).suffix in ENDINGS and Path(spec).is_file():
        return _of_file(EmbeddingsFile(Path(spec)))
    if Path(spec).suffix == ".npz":
        raise InputError(f"terms.distillation.teacher: there is no file {spec}.")
    model = load(spec, str(device))
    if model.token_wise is not None or model.tokenizer is None:
        lack = "compares tokens" if model.tokenizer is not None else "has no text tower"
        raise InputError(f"terms.distillation.teacher: {spec} {lack} and gives no embeddings to learn from.")
    return _of_model(model)


def _of_model(model: LoadedModel) -> Teacher:
    width = model.encode_text(["a photo"]).shape[1]
    said = (re.sub(r" at 0x\w+", "", repr(part)) for part in (model.preprocess, model.tokenizer))
    facts = [*said, *_tensors(model.clip.state_dict())]
    return Teacher(
        model.name, width, ("image", "text"), model.logit_scale, hash_of(*facts), lambda *asked: _embed(model, *asked)
    )


def _embed(model: Encoder, source: Source, part: Part, progress: Progress | None) -> States:
    """float16 [pairs or captions, width]; NaN where an image cannot be read."""
    if part == "text":
        texts = [caption for index in range(len(source)) for caption in source.captions(index)]
        return _in_half(embed_texts(model, texts, f"captions of {source.name}, by the teacher", progress))
    found = embed_source(model, source, f"{source.name}, by the teacher", progress)
    images = torch.full((len(source), found.images.shape[1]), float("nan"))
    images[found.rows] = found.images
    return _in_half(images)


def _in_half(embeddings: Tensor) -> States:
    half: States = F.normalize(embeddings.float(), dim=-1).numpy().astype(np.float16)
    return half


def _tensors(state: dict[str, Tensor]) -> list[str | bytes]:
    return [part for name, tensor in state.items() for part in (name, tensor.detach().cpu().float().numpy().tobytes())]


def _of_file(file: EmbeddingsFile) -> Teacher:
    def embed(source: Source, part: Part, _: Progress | None) -> States:
        return _in_half(torch.from_numpy(file.of(source, part)))

    return Teacher(str(file.path), file.width, file.parts, _TEACHERS_SCALE, hash_of(*file.version), embed)


# --- the start --------------------------------------------------------------------------------------------------------


class _Started:
    """The run's own towers as they started, as something that embeds: what they pool before their projections."""

    name = START

    def __init__(self, model: DualEncoder, device: torch.device, precision: str) -> None:
        self.model, self.device, self.precision = model.eval(), device, precision

    def prepare(self, data: bytes) -> Pixels:
        return eval_view(decode_image(data), self.model.image_size)

    @torch.inference_mode()
    def encode_prepared(self, images: list[Any]) -> Tensor:
        pixels = self.model.pixels(torch.from_numpy(np.stack(images)).to(self.device))
        with autocast(self.device, self.precision), by_onednn(self.device):
            found = [encode_image(self.model.clip, some).pooled for some in torch.split(pixels, IMAGES_AT_ONCE)]
        return torch.cat(found).float().cpu()  # type: ignore[arg-type]

    encode_image = encode_prepared

    @torch.inference_mode()
    def encode_text(self, texts: list[str]) -> Tensor:
        found = []
        for begin in range(0, len(texts), 256):
            ids = self.model.token_ids(texts[begin : begin + 256]).to(self.device)
            with autocast(self.device, self.precision), by_onednn(self.device):
                found.append(encode_text(self.model.clip, ids).pooled)
        return torch.cat(found).float().cpu()


def _of_start(recipe: Recipe, start: Start, device: torch.device) -> Teacher:
    model, learning = recipe.model, []
    for part, tower in (("image", model.image), ("text", model.text)):
        if (model.init or tower.init) and tower.tune not in LOCKED:
            learning.append(part)
    if not learning:
        raise InputError(
            "terms.distillation.teacher = start: no tower that learns starts from weights: set model.init, "
            "model.image.init or model.text.init, or leave the term out."
        )
    with torch.random.fork_rng():  # the run's own towers stay what they would be without it
        copy = DualEncoder(recipe)
    weights = first_weights(start, copy.clip)
    copy.clip.load_state_dict(weights, strict=False)
    if "image" in learning and not copy.pooled_width:
        raise InputError("terms.distillation.teacher = start: this image tower gives no feature before its projection.")
    started = _Started(copy.to(device), device, recipe.engine.precision)
    # Of all in them that comes from weights: random projections come after what is asked.
    version = hash_of(
        START, str(copy.image_size), str(copy.context_length), recipe.engine.precision, *_tensors(weights)
    )
    return Teacher(START, None, tuple(learning), 1.0, version, lambda *asked: _embed(started, *asked))  # type: ignore[arg-type]
