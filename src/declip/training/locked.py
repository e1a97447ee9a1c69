"""What does not learn goes over the pairs once: what it gives is kept on disk, and steps pay nothing for it."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from declip.data.decoded import Images
from declip.data.kept import Kept, States
from declip.data.sources import BrokenPair, Source
from declip.data.storage import Storage
from declip.data.workers import read_ahead
from declip.errors import InputError
from declip.files import write_atomically
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import IMAGES_AT_ONCE, encode_image
from declip.model.layers import names_of_last
from declip.model.parts import Part, is_projection, part_of
from declip.model.products import by_onednn
from declip.model.text_tower import cut_lengths, encode_text
from declip.model.tuning import LOCKED
from declip.progress import Progress
from declip.recipe import Recipe
from declip.training.pairs import digest_of_pairs
from declip.training.step import autocast

_CAPTIONS_AT_ONCE = 256


def kept_parts(recipe: Recipe) -> list[Part]:
    """The towers of which something is kept: of views of one kind, and of locked ones where no term compares tokens."""
    model, engine = recipe.model, recipe.engine
    # What is computed a second time, or by modules that stand in for the towers', cannot begin in a tower's middle.
    whole = engine.micro_batch or engine.grad_checkpointing or engine.compile or engine.shard
    compared = "token_wise" in recipe.terms.active() or recipe.wants_normed_tokens
    resting = {*(() if compared else LOCKED), *(() if whole else ("last",))}
    found: list[Part] = []
    if model.image.tune in resting and model.image.views_kept and recipe.views_alike:
        found.append("image")
    if model.text.tune in resting and model.text.kept and recipe.text_views == ["caption"]:
        found.append("text")
    return found


def keep_features(
    model: DualEncoder, images: Images, recipe: Recipe, device: torch.device, progress: Progress | None = None
) -> Kept:
    """What resting parts of towers give for all pairs; computed where the cache has it not of these weights and pairs.

    Image views are drawn once, by the recipe's seed. What would not fit in the cache is not kept, and that is said.
    Raises InputError where a number is none that float16 holds, or a tower cannot go on from the middle.
    """
    storage = Storage.of(recipe.data)
    found: dict[str, Any] = {}
    for part in kept_parts(recipe):
        if not _fits(model, images, recipe, part):
            continue
        _check_cut(model, part, device)
        of_image = part == "image"
        facts = [
            part,
            model.tune[part] if model.tune[part] == "last" else "",
            _digest_of_weights(model, part),
            digest_of_pairs(images.source, of_image),
            recipe.engine.precision,
        ]
        if of_image:
            views = recipe.data.images.model_dump_json()
            facts += [views, str(recipe.seed), str(recipe.model.image.views_kept), str(model.view_size)]
        else:
            facts += [str(model.context_length)]
        name = f"features of {part}s {hash_of(*facts)}"
        _say_if_stale(storage, images.source, part, name)
        ends = _token_ends(model, images) if model.tune[part] == "last" and not of_image else None
        write = _write_images if of_image else partial(_write_texts, ends)
        path = storage.kept(
            name,
            lambda place, write=write: write(place, model, images, recipe, device, progress),  # type: ignore[misc]
            f"what the {part} tower makes of {images.source.name}",
        )
        found[f"{part}s"] = np.load(path, mmap_mode="r")
        if ends is not None:
            found["text_ends"] = ends
    return Kept(**found)


def empty_features(model: DualEncoder, images: Images, recipe: Recipe) -> Kept:
    """Zeros in the place of `keep_features`, for a run that only measures its steps."""
    found: dict[str, Any] = {}
    for part in kept_parts(recipe):
        if not _fits(model, images, recipe, part):
            continue
        shape: tuple[int, ...] = (int(images.caption_ends[-1]), model.text.width)
        if part == "image":
            shape = (len(images.source), recipe.model.image.views_kept, *_shape_of_image(model))
        elif model.tune["text"] == "last":
            found["text_ends"] = _token_ends(model, images)
            shape = (int(found["text_ends"][-1]), model.text.width)
        found[f"{part}s"] = np.broadcast_to(np.zeros((), np.float16), shape)
    return Kept(**found)


def _fits(model: DualEncoder, images: Images, recipe: Recipe, part: Part) -> bool:
    """Whether what rests of a tower can be kept in the cache; otherwise it is computed at each step, which is said."""
    if part == "image":
        numbers = len(images.source) * recipe.model.image.views_kept * math.prod(_shape_of_image(model))
    else:
        tokens = model.context_length if model.tune["text"] == "last" else 1  # at most
        numbers = int(images.caption_ends[-1]) * tokens * model.text.width
    fits = 2 * numbers <= recipe.data.disk_gb * 1e9
    if not fits:
        print(
            f"What the resting part of the {part} tower gives would take {2 * numbers / 1e9:,.0f} GB, more than "
            f"data.disk_gb = {recipe.data.disk_gb:g}: it is not kept but computed at each step.",
            file=sys.stderr,
        )
    return fits


@torch.no_grad()
def _check_cut(model: DualEncoder, part: Part, device: torch.device) -> None:
    """Raise InputError where a tower whose last layers learn does not give the same when it goes on from the middle."""
    if model.tune[part] != "last":
        return
    was_training = model.training
    model.eval()
    if part == "image":
        count = 6 * model.view_size**2  # no random numbers: a run that goes on has its own from here on
        pixels = torch.linspace(-2, 2, count, device=device).reshape(2, 3, model.view_size, model.view_size).sin()
        whole, cut = encode_image(model.clip, pixels), model.images_above(model.images_below(pixels))
    else:
        ids = model.token_ids(["a red bird", ""]).to(device)
        whole, cut = encode_text(model.clip, ids), model.texts_above(ids, model.texts_below(ids))  # type: ignore[assignment]
    model.train(was_training)
    if not torch.allclose(whole.embedding, cut.embedding, rtol=1e-3, atol=1e-3):
        option = "views_kept=0" if part == "image" else "kept=false"
        raise InputError(
            f"model.{part}.tune = last: this tower cannot go on from its middle, so nothing can be kept of it: set "
            f"model.{part}.{option}."
        )


def _token_ends(model: DualEncoder, images: Images) -> np.ndarray:
    """Where the tokens of each caption end when those of all are counted one after the other: int64 [captions]."""
    source = images.source
    if model.full_captions:  # what stands on the padding counts
        return np.arange(1, int(images.caption_ends[-1]) + 1) * model.context_length
    pad = model.tokenizer.special.pad
    lengths: list[int] = []
    for index in range(len(source)):
        ids = model.token_ids(source.captions(index))
        lengths += cut_lengths(ids, pad).tolist()
    return np.cumsum(lengths)


@torch.no_grad()
def _shape_of_image(model: DualEncoder) -> tuple[int, ...]:
    was_training = model.training
    model.eval()
    nothing = torch.zeros(1, 3, model.view_size, model.view_size, device=model.mean.device)
    shape = model.images_below(nothing).shape[1:]
    model.train(was_training)
    return tuple(shape)


def _write_images(
    place: Path, model: DualEncoder, images: Images, recipe: Recipe, device: torch.device, progress: Progress | None
) -> None:
    reader = _Views(images, recipe, model.view_size)
    shape, count = (reader.count, *_shape_of_image(model)), len(images.source)
    out = np.lib.format.open_memmap(place, mode="w+", dtype=np.float16, shape=(count, *shape))
    with _applied(model, recipe, device):
        for rows, views, readable in _loaded(reader, count, recipe.data.workers):
            out[rows.start : rows.stop] = np.nan
            if len(views):
                pixels = model.pixels(torch.from_numpy(views).flatten(0, 1).to(device))
                states = _in_half(model.images_below(pixels), "image")
                out[np.asarray(rows)[readable]] = states.reshape(len(views), *shape)
            if progress:
                progress("image tower, what rests", rows.stop, count)
    out.flush()


def _write_texts(
    ends: np.ndarray | None,
    place: Path,
    model: DualEncoder,
    images: Images,
    recipe: Recipe,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """ends: where the tokens of each caption end, where they are kept; None of a locked tower."""
    source = images.source
    texts = [caption for index in range(len(source)) for caption in source.captions(index)]
    lengths = np.diff(_token_ends(model, images) if ends is None else ends, prepend=0)
    order = np.argsort(lengths, kind="stable")  # so that little is padded
    out: Any = None
    with _applied(model, recipe, device):
        for start in range(0, len(order), _CAPTIONS_AT_ONCE):
            rows = order[start : start + _CAPTIONS_AT_ONCE]
            tokens = model.token_ids([texts[row] for row in rows]).to(device)
            states = _in_half(model.texts_below(tokens), "text")
            if out is None:
                shape = (len(texts) if ends is None else int(ends[-1]), states.shape[-1])
                out = np.lib.format.open_memmap(place, mode="w+", dtype=np.float16, shape=shape)
            if ends is None:
                out[rows] = states
            else:
                for row, own in zip(rows, states, strict=True):
                    out[ends[row] - lengths[row] : ends[row]] = own[: lengths[row]]
            if progress:
                progress("text tower, what rests", start + len(rows), len(texts))
    out.flush()


@contextmanager
def _applied(model: DualEncoder, recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Within, the model is applied as a finished one."""
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(device, recipe.engine.precision), by_onednn(device):
        yield
    model.train(was_training)


class _Views(Dataset[tuple[range, np.ndarray, np.ndarray]]):
    """Drawn views of a range of pairs, uint8 [readable, views, size, size, 3], and which of them are readable."""

    def __init__(self, images: Images, recipe: Recipe, size: int) -> None:
        self.images, self.options, self.size, self.seed = images, recipe.data.images, size, recipe.seed
        self.count = recipe.model.image.views_kept

    def __getitem__(self, rows: range) -> tuple[range, np.ndarray, np.ndarray]:
        found, readable = [], np.zeros(len(rows), bool)
        for place, index in enumerate(rows):
            rng = np.random.default_rng([self.seed, index, 2])
            try:
                drawn = self.images.views(index, self.size, [self.options] * self.count, rng)
            except BrokenPair as broken:
                print(f"skipped: {broken}", file=sys.stderr)
                continue
            found.append(np.stack([pixels for pixels, _ in drawn]))
            readable[place] = True
        return rows, np.stack(found) if found else np.empty(0, np.uint8), readable


def _loaded(reader: _Views, count: int, workers: int) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
    step = max(1, IMAGES_AT_ONCE // reader.count)
    ranges = [range(start, min(start + step, count)) for start in range(0, count, step)]
    yield from read_ahead(reader, ranges, workers, collate_fn=lambda found: found)


def _in_half(states: Tensor, part: str) -> States:
    with np.errstate(over="ignore"):  # what is too large is said below
        found: States = states.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(found).all():
        raise InputError(
            f"The {part} tower gives numbers that are none, or too large to be kept in half precision: set "
            f"model.{part}.{'views_kept=0' if part == 'image' else 'kept=false'}."
        )
    return found


def _digest_of_weights(model: DualEncoder, part: Part) -> str:
    """Of all that what is kept depends on: the tower's modules, its tensors that rest, how pixels are normalised."""
    modules = [repr(child) for name, child in model.clip.named_children() if part_of(name) == part]
    learning = names_of_last(model.clip, part, model.tune_layers[part]) if model.tune[part] == "last" else set()
    facts: list[str | bytes] = [*modules, str(model.mean.flatten().tolist()), str(model.std.flatten().tolist())]
    for name, tensor in model.clip.state_dict().items():
        if part_of(name) == part and not is_projection(name) and name not in learning:
            facts += [name, tensor.detach().cpu().numpy().tobytes()]
    return hash_of(*facts)


def hash_of(*parts: str | bytes) -> str:
    """Of all parts, each with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _say_if_stale(storage: Storage, source: Source, part: Part, name: str) -> None:
    """Say that features of the same pairs are there, but of other weights, views or contents; note these."""
    note = storage.folder / "features" / f"{part} {hash_of(source.name)}"
    before = note.read_text("utf-8") if note.is_file() else name
    if before != name:
        print(
            f"What is kept of {source.name} was made by another {part} tower, of other views, or of pairs that have "
            "changed: it is made anew.",
            file=sys.stderr,
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, lambda path: path.write_text(name, encoding="utf-8"))
