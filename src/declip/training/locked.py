"""A locked tower goes over the pairs once: what it pools is kept on disk, and steps pay nothing for it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from declip.data.captions import lengthen, tokenize
from declip.data.decoded import Images
from declip.data.kept import Kept, Pooled
from declip.data.sources import BrokenPair, Source
from declip.data.storage import Storage
from declip.errors import InputError
from declip.files import write_atomically
from declip.model.dual_encoder import DualEncoder
from declip.model.image_tower import before_projection
from declip.model.products import by_onednn
from declip.model.text_tower import encode_text
from declip.model.tuning import LOCKED, Part, is_projection, part_of
from declip.progress import Progress
from declip.recipe import Recipe
from declip.training.pairs import digest_of_pairs
from declip.training.step import autocast

_VIEWS_AT_ONCE = 64  # more go slower on a CPU, as they leave its caches
_CAPTIONS_AT_ONCE = 256


def kept_parts(recipe: Recipe) -> list[Part]:
    """The towers whose features are kept: of views of one kind, where no term compares tokens."""
    model = recipe.model
    found: list[Part] = []
    if "token_wise" in recipe.terms.active():
        return found
    alike = recipe.data.strong_images is None or recipe.image_views == recipe.pair_views
    if model.image.tune in LOCKED and model.image.views_kept and alike:
        found.append("image")
    if model.text.tune in LOCKED and model.text.kept and recipe.text_views == ["caption"]:
        found.append("text")
    return found


def keep_features(
    model: DualEncoder, images: Images, recipe: Recipe, device: torch.device, progress: Progress | None = None
) -> Kept:
    """What locked towers pool of all pairs; computed where the cache has it not of these weights, pairs and views.

    Image views are drawn once, by the recipe's seed. Raises InputError where a feature is no number that float16 holds.
    """
    storage = Storage.of(recipe.data)
    found: dict[str, Pooled] = {}
    for part in kept_parts(recipe):
        of_image = part == "image"
        facts = [
            part,
            _digest_of_weights(model, part),
            digest_of_pairs(images.source, of_image),
            recipe.engine.precision,
        ]
        if of_image:
            views = recipe.data.images.model_dump_json()
            facts += [views, str(recipe.seed), str(recipe.model.image.views_kept), str(model.image_size)]
        else:
            facts += [str(model.context_length)]
        name = f"features of {part}s {_hash(*facts)}"
        _say_if_stale(storage, images.source, part, name)
        write = _write_images if of_image else _write_texts
        path = storage.kept(
            name,
            lambda place, write=write: write(place, model, images, recipe, device, progress),  # type: ignore[misc]
            f"what the {part} tower makes of {images.source.name}",
        )
        found[f"{part}s"] = np.load(path, mmap_mode="r")
    return Kept(**found)


def empty_features(model: DualEncoder, images: Images, recipe: Recipe) -> Kept:
    """Zeros in the place of `keep_features`, for a run that only measures its steps."""
    found: dict[str, Pooled] = {}
    for part in kept_parts(recipe):
        if part == "image":
            shape: tuple[int, ...] = (len(images.source), recipe.model.image.views_kept, *_shape_of_image(model))
        else:
            shape = (int(images.caption_ends[-1]), model.text.width)
        found[f"{part}s"] = np.broadcast_to(np.zeros((), np.float16), shape)
    return Kept(**found)


@torch.no_grad()
def _shape_of_image(model: DualEncoder) -> tuple[int, ...]:
    was_training = model.training
    model.eval()
    nothing = torch.zeros(1, 3, model.image_size, model.image_size, device=model.mean.device)
    shape = before_projection(model.clip, nothing).shape[1:]
    model.train(was_training)
    return tuple(shape)


def _write_images(
    place: Path, model: DualEncoder, images: Images, recipe: Recipe, device: torch.device, progress: Progress | None
) -> None:
    reader = _Views(images, recipe, model.image_size)
    shape, count = (reader.count, *_shape_of_image(model)), len(images.source)
    out = np.lib.format.open_memmap(place, mode="w+", dtype=np.float16, shape=(count, *shape))
    with _applied(model, recipe, device):
        for rows, views, readable in _loaded(reader, count, recipe.data.workers):
            out[rows.start : rows.stop] = np.nan
            if len(views):
                pixels = model.pixels(torch.from_numpy(views).flatten(0, 1).to(device))
                pooled = _in_half(before_projection(model.clip, pixels), "image")
                out[np.asarray(rows)[readable]] = pooled.reshape(len(views), *shape)
            if progress:
                progress("locked image tower", rows.stop, count)
    out.flush()


def _write_texts(
    place: Path, model: DualEncoder, images: Images, recipe: Recipe, device: torch.device, progress: Progress | None
) -> None:
    source, special = images.source, model.tokenizer.special
    texts = [caption for index in range(len(source)) for caption in source.captions(index)]
    ids = [model.tokenizer.encode(text) for text in texts]
    order = np.argsort([len(one) for one in ids], kind="stable")  # so that little is padded
    out: Any = None
    with _applied(model, recipe, device):
        for start in range(0, len(order), _CAPTIONS_AT_ONCE):
            rows = order[start : start + _CAPTIONS_AT_ONCE]
            tokens = tokenize([ids[row] for row in rows], model.context_length, special)
            if model.full_captions:
                tokens = lengthen(tokens, model.context_length, special.pad)
            pooled = _in_half(encode_text(model.clip, torch.from_numpy(tokens).to(device)).pooled, "text")
            if out is None:
                out = np.lib.format.open_memmap(place, mode="w+", dtype=np.float16, shape=(len(texts), pooled.shape[1]))
            out[rows] = pooled
            if progress:
                progress("locked text tower", start + len(rows), len(texts))
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
    step = max(1, _VIEWS_AT_ONCE // reader.count)
    ranges = [range(start, min(start + step, count)) for start in range(0, count, step)]
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=ranges,
        collate_fn=lambda found: found,
        num_workers=workers,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    yield from loader


def _in_half(pooled: Tensor, part: str) -> Pooled:
    with np.errstate(over="ignore"):  # what is too large is said below
        found: Pooled = pooled.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(found).all():
        raise InputError(
            f"The {part} tower gives numbers that are none, or too large to be kept in half precision: set "
            f"model.{part}.{'views_kept=0' if part == 'image' else 'kept=false'}."
        )
    return found


def _digest_of_weights(model: DualEncoder, part: Part) -> str:
    """Of all that a tower's pooled features depend on: its modules, its tensors, and how pixels are normalised."""
    modules = [repr(child) for name, child in model.clip.named_children() if part_of(name) == part]
    facts: list[str | bytes] = [*modules, str(model.mean.flatten().tolist()), str(model.std.flatten().tolist())]
    for name, tensor in model.clip.state_dict().items():
        if part_of(name) == part and not is_projection(name):
            facts += [name, tensor.detach().cpu().numpy().tobytes()]
    return _hash(*facts)


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _say_if_stale(storage: Storage, source: Source, part: Part, name: str) -> None:
    """Say that features of the same pairs are there, but of other weights, views or contents; note these."""
    note = storage.folder / "features" / f"{part} {_hash(source.name)}"
    before = note.read_text("utf-8") if note.is_file() else name
    if before != name:
        print(
            f"What is kept of {source.name} was made by another {part} tower, of other views, or of pairs that have "
            "changed: it is made anew.",
            file=sys.stderr,
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, lambda path: path.write_text(name, encoding="utf-8"))
