"""The three tasks, each on the embeddings of one set of pairs: ranks of the right answers, and what they amount to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from declip.errors import InputError
from declip.evaluation.class_cache import cached_class_embeddings
from declip.evaluation.embedding import Embedded, Encoder, check_finite, embed_texts, patches_of
from declip.evaluation.judged import MISSED, Judged
from declip.evaluation.rerank import rerank
from declip.evaluation.retrieval import metrics_of_ranks, retrieval_ranks
from declip.evaluation.sets import TestSet, check_classes, class_numbers
from declip.evaluation.zero_shot import metrics_of_ranks as accuracies
from declip.evaluation.zero_shot import zero_shot_ranks
from declip.model.prompts import resolve_templates
from declip.progress import Progress


def possible_tasks(test: TestSet, embedded: Embedded) -> tuple[str, ...]:
    """What can be asked of the pairs: retrieval where they have captions, classification where they have two labels.

    A probe where what it would learn from has any of these.
    """
    if test.tasks is not None:
        return test.tasks
    possible = []
    if any(embedded.captions):
        possible.append("retrieval")
    labels = {label for label in embedded.labels if label is not None}
    if len(labels) >= 2:
        possible.append("zero-shot")
        if test.train is not None and any(test.train.source.label(i) in labels for i in range(len(test.train.source))):
            possible.append("linear-probe")
    if not possible:
        raise InputError(
            f"{test.name} has neither captions nor labels of at least two classes: there is nothing to judge."
        )
    return tuple(possible)


@dataclass(frozen=True)
class Texts:
    """The captions of a set's readable images, each different one once: embeddings, and what belongs to what.

    rows: int64 [texts], of each caption the row of its embedding; image: int64 [texts], place among `captioned`;
    captioned: int64 [images], rows of the embedded images that have a caption
    """

    texts: list[str]
    embeddings: Tensor
    rows: Tensor
    image: Tensor
    captioned: Tensor


def embed_captions(model: Encoder, test: TestSet, embedded: Embedded, progress: Progress | None) -> Texts:
    """Equal captions are encoded once: in different batches they might come out different in the last bits."""
    sources = embedded.rows.tolist()
    captioned = [place for place, row in enumerate(sources) if embedded.captions[row]]
    if not captioned:
        raise InputError(
            f"{test.name} has no captions, so retrieval cannot be judged: name their column, or leave it out."
        )
    texts = [text for place in captioned for text in embedded.captions[sources[place]]]
    owner = [new for new, place in enumerate(captioned) for _ in embedded.captions[sources[place]]]
    unique = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    return Texts(
        texts,
        embed_texts(model, list(unique), f"captions of {test.name}", progress),
        torch.tensor([unique[text] for text in texts]),
        torch.tensor(owner),
        torch.tensor(captioned),
    )


def retrieval(test: TestSet, embedded: Embedded, texts: Texts, judged: Judged) -> None:
    """Ranks both ways among the images that can be read; what is asked of the others is missed."""
    images = embedded.images[texts.captioned]
    found: dict[str, list[Tensor]] = {"text_to_image": [], "image_to_text": []}
    for first, last in _folds(len(images), test.folds, test.name):
        own = ((texts.image >= first) & (texts.image < last)).nonzero()[:, 0]
        ranks = retrieval_ranks(images[first:last], texts.embeddings[texts.rows[own]], texts.image[own] - first)
        for way, parts in found.items():
            parts.append(ranks[way])
    lost = [row for row in embedded.unreadable if embedded.captions[row]]
    judged.items, judged.undecodable = len(images) + len(lost), len(lost)
    judged.skipped = len(embedded.captions) - judged.items
    lost_images = torch.arange(len(images), judged.items)
    lost_captions = torch.tensor([len(embedded.captions[row]) for row in lost], dtype=torch.int64)
    judged.asked = torch.cat([texts.image, lost_images.repeat_interleave(lost_captions)])
    for way, queries in (("text_to_image", len(judged.asked)), ("image_to_text", judged.items)):
        missed = torch.full((queries - sum(map(len, found[way])),), MISSED)
        judged.ranks[way] = torch.cat([*found[way], missed])
    judged.metrics = metrics_of_ranks(judged.ranks)


def rerank_retrieval(
    model: Encoder,
    test: TestSet,
    embedded: Embedded,
    texts: Texts,
    judged: Judged,
    top: int,
    progress: Progress | None = None,
) -> None:
    """The ranks of `retrieval` anew, with the first `top` hits of every query put in order.

    Raises InputError where the model has nothing to do that with, or the set is judged in parts.
    """
    pooler = getattr(model, "text_pooler", None)
    if pooler is None:
        raise InputError(f"{model.name} was not trained with terms.text_conditioned: there is nothing to rerank with.")
    if test.folds > 1:
        raise InputError(
            f"{test.name} is judged in {test.folds} parts, and reranking looks at the whole: leave it out."
        )
    captioned = embedded.rows[texts.captioned]
    places = {row: place for place, row in enumerate(captioned.tolist())}
    own = ((places[row], patches) for row, patches in patches_of(model, test.source, test.name, places, progress))
    # What cannot be read stands at the end of the ranks, and is missed whatever the order.
    read = {"text_to_image": len(texts.image), "image_to_text": len(captioned)}
    ranks = {way: judged.ranks[way][:count] for way, count in read.items()}
    images, sentences = embedded.images[texts.captioned], texts.embeddings[texts.rows]
    found = rerank(ranks, images, sentences, texts.image, own, pooler.cpu(), top)
    judged.ranks = {way: torch.cat([found[way], judged.ranks[way][count:]]) for way, count in read.items()}
    judged.metrics, judged.settings = metrics_of_ranks(judged.ranks), {**judged.settings, "reranked": top}


def _folds(images: int, folds: int, whose: str) -> list[tuple[int, int]]:
    if images < folds:
        raise InputError(f"{whose} is judged in {folds} parts, and only {images} of its images can be read.")
    ends = [images * fold // folds for fold in range(folds + 1)]
    return list(pairwise(ends))


@dataclass(frozen=True)
class Labelled:
    """What can be classified of so many pairs.

    sources, rows, classes: int64 [images], places in the source, rows among the embedded images (-1: unreadable), and
    numbers of the classes
    """

    pairs: int
    names: list[str]
    sources: Tensor
    rows: Tensor
    classes: Tensor

    @property
    def readable(self) -> Tensor:
        """Which of the images can be read: bool [images]."""
        return self.rows >= 0


def labelled(test: TestSet, embedded: Embedded) -> Labelled:
    """The pairs with a label, and their classes; raises InputError where there are fewer than two of these."""
    if test.labels is None:
        names, numbers = class_numbers(embedded.labels, test.classes, test.name)
    else:
        names, numbers = list(test.classes or ()), test.labels.tolist()
        check_classes(test.name, names, repeated=True)
    place = torch.full((len(numbers),), -1)
    place[embedded.rows] = torch.arange(len(embedded.rows))
    classes = torch.tensor(numbers)
    sources = (classes >= 0).nonzero()[:, 0]
    return Labelled(len(numbers), names, sources, place[sources], classes[sources])


def zero_shot_classes(
    model: Encoder, test: TestSet, names: Sequence[str], templates: Sequence[str] | None, progress: Progress | None
) -> Tensor:
    """Embeddings of the classes, of prompts as given, else the set's own, else OpenAI's for ImageNet."""
    prompts = resolve_templates(templates or test.templates)
    if progress:
        progress(f"prompts of {test.name}", 0, len(names))
    found = cached_class_embeddings(model, names, prompts)
    check_finite(found, f"{model.name} gives, for the classes of {test.name},")
    if progress:
        progress(f"prompts of {test.name}", len(names), len(names))
    return found


def classification(of: Labelled, ranks_of_readable: Tensor, judged: Judged) -> None:
    """Ranks of the right class, 0 = first, of the images that can be read; the others are missed."""
    ranks = torch.full((len(of.rows),), MISSED)
    ranks[of.readable] = ranks_of_readable
    judged.items, judged.undecodable = len(ranks), int((~of.readable).sum())
    judged.skipped = of.pairs - judged.items
    judged.ranks, judged.asked, judged.choices = {"class": ranks}, of.classes, len(of.names)
    judged.metrics = accuracies(ranks, of.classes, len(of.names))


def zero_shot(embedded: Embedded, of: Labelled, classes: Tensor, judged: Judged) -> None:
    images, truth = embedded.images[of.rows[of.readable]], of.classes[of.readable]
    classification(of, zero_shot_ranks(images, classes, truth), judged)
