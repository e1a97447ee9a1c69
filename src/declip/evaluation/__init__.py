"""Judge a model on pairs: retrieval where there are captions, zero-shot classification where there are labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from declip.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from declip.data.sources import Source
    from declip.model.pretrained import LoadedModel
    from declip.pairs import Data

TASKS = ("retrieval", "zero-shot")

# Images go to the model in groups of at most so many, and of at most so many decoded bytes: photos of twelve
# megapixels must not fill the memory.
_IMAGES_AT_ONCE = 256
_BYTES_AT_ONCE = 2**28
_TEXTS_AT_ONCE = 4096

Progress = Callable[[str, int, int], None]


def evaluate(
    model: LoadedModel | str | Path,
    data: str | Sequence[str],
    tasks: Sequence[str] | None = None,
    data_options: Data | None = None,
    progress: Progress | None = None,
    templates: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Judge a model on each source of pairs by itself.

    Args:
        model: a loaded model, or what ``declip.load`` takes.
        data: one or more sources.
        tasks: ``retrieval``, ``zero-shot``; by default retrieval where pairs have captions and zero-shot where
            they have labels of at least two classes. The classes are the sorted set of the labels.
        data_options: names of the columns, as in a recipe's ``data`` section.
        progress: called with (what, done, total) as the work goes on.
        templates: zero-shot prompts with ``{}`` for the class name, or ``openai`` (the default) or ``simple``.

    Returns ``{"model": name, "results": [{"data", "task", "items", "skipped", "metrics"}]}``: items are the images
    judged, skipped the broken pairs, metrics are in percent.
    Raises InputError where a source cannot be read, a task is unknown, or a source has nothing for it.
    """
    from declip.data.sources import open_sources
    from declip.model.prompts import resolve_templates
    from declip.pairs import Data

    for task in tasks or []:
        if task not in TASKS:
            raise InputError(f"There is no task {task!r}: choose from {', '.join(TASKS)}.")
    specs = [data] if isinstance(data, str) else [str(spec) for spec in data]
    # All input is checked before the model is loaded, and all sources before the first is judged.
    need_captions = "retrieval" in (tasks or [])
    sources = [open_sources([spec], data_options or Data(), need_captions=need_captions) for spec in specs]
    prompts = resolve_templates(templates)
    loaded = _load(model)
    results = []
    for spec, source in zip(specs, sources, strict=True):
        embedded = _embed_images(loaded, spec, source, progress)
        for task in tasks or _possible_tasks(spec, embedded):
            judge = _retrieval if task == "retrieval" else _zero_shot
            items, metrics = judge(loaded, spec, embedded, prompts, progress)
            results.append(
                {"data": spec, "task": task, "items": items, "skipped": embedded.skipped, "metrics": metrics}
            )
    return {"model": loaded.name, "results": results}


@dataclass
class _Embedded:
    """A source's whole pairs: image embeddings ``[pairs, width]`` and what belongs to them, in the same order."""

    images: Tensor
    captions: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    skipped: int = 0

    @property
    def classes(self) -> list[str]:
        return sorted({label for label in self.labels if label is not None})


def _load(model: LoadedModel | str | Path) -> LoadedModel:
    if not isinstance(model, str | Path):
        return model
    from declip.model.pretrained import load

    return load(str(model))


def _embed_images(model: LoadedModel, spec: str, source: Source, progress: Progress | None) -> _Embedded:
    import torch

    embedded = _Embedded(torch.empty(0))
    parts: list[Tensor] = []
    done = 0
    for images, group in _image_groups(spec, source, embedded):
        if images:
            parts.append(torch.as_tensor(model.encode_image(images)).float().cpu())
        done += group
        if progress:
            progress(f"images of {spec}", done, len(source))
    embedded.images = torch.cat(parts)
    return embedded


def _image_groups(spec: str, source: Source, embedded: _Embedded) -> Iterator[tuple[list[np.ndarray], int]]:
    """Decoded images in bounded groups, each with the number of pairs it took; notes captions, labels and breakage."""
    from declip.data.decode import decode_image
    from declip.data.sources import BrokenPair

    images: list[np.ndarray] = []
    group = size = 0
    first_broken = ""
    for index in range(len(source)):
        group += 1
        try:
            pair = source[index]
        except BrokenPair as error:
            embedded.skipped += 1
            first_broken = first_broken or str(error)
            continue
        try:
            image = decode_image(pair.image)
        except ValueError as error:
            embedded.skipped += 1
            first_broken = first_broken or f"{pair.where}: {error}"
            continue
        images.append(image)
        size += image.nbytes
        embedded.captions.append(pair.captions)
        embedded.labels.append(pair.label)
        if len(images) == _IMAGES_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield images, group
            images, group, size = [], 0, 0
    if not embedded.captions:
        raise InputError(f"{spec}: all {len(source)} pairs are broken; the first: {first_broken.rstrip('.')}.")
    yield images, group


def _possible_tasks(spec: str, embedded: _Embedded) -> list[str]:
    possible = []
    if any(embedded.captions):
        possible.append("retrieval")
    if len(embedded.classes) >= 2:
        possible.append("zero-shot")
    if not possible:
        raise InputError(f"{spec} has neither captions nor labels of at least two classes: there is nothing to judge.")
    return possible


def _retrieval(
    model: LoadedModel, spec: str, embedded: _Embedded, prompts: list[str], progress: Progress | None
) -> tuple[int, dict[str, float]]:
    """Retrieval among the pairs that have captions; prompts are not used. Returns (images, metrics)."""
    import torch

    from declip.evaluation.retrieval import retrieval_metrics

    captioned = [row for row, captions in enumerate(embedded.captions) if captions]
    if not captioned:
        raise InputError(f"{spec} has no captions, so retrieval cannot be judged: name their column, or leave it out.")
    texts = [text for row in captioned for text in embedded.captions[row]]
    image_of_text = [new for new, row in enumerate(captioned) for _ in embedded.captions[row]]
    # Equal captions are encoded once: in different batches they might come out different in the last bits.
    unique = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    embeddings = _embed_texts(model, spec, list(unique), progress)
    metrics = retrieval_metrics(
        embedded.images[captioned],
        embeddings[[unique[text] for text in texts]],
        torch.tensor(image_of_text),
    )
    return len(captioned), metrics


def _embed_texts(model: LoadedModel, spec: str, texts: list[str], progress: Progress | None) -> Tensor:
    import torch

    parts = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        group = texts[start : start + _TEXTS_AT_ONCE]
        parts.append(torch.as_tensor(model.encode_text(group)).float().cpu())
        if progress:
            progress(f"captions of {spec}", start + len(group), len(texts))
    return torch.cat(parts)


def _zero_shot(
    model: LoadedModel, spec: str, embedded: _Embedded, prompts: list[str], progress: Progress | None
) -> tuple[int, dict[str, float]]:
    """Zero-shot classification of the pairs that have a label. Returns (images, metrics)."""
    import torch

    from declip.evaluation.zero_shot import zero_shot_metrics
    from declip.model.class_embeddings import class_embeddings

    classes = embedded.classes
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no labels"
        raise InputError(f"{spec} has {found}, so zero-shot cannot be judged: name the label column, or leave it out.")
    if progress:
        progress(f"prompts of {spec}", 0, len(classes))
    labelled = [(row, label) for row, label in enumerate(embedded.labels) if label is not None]
    position = {name: number for number, name in enumerate(classes)}
    metrics = zero_shot_metrics(
        embedded.images[[row for row, _ in labelled]],
        class_embeddings(model, classes, prompts),
        torch.tensor([position[label] for _, label in labelled]),
    )
    if progress:
        progress(f"prompts of {spec}", len(classes), len(classes))
    return len(labelled), metrics
