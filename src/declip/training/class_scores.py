"""What the image tower's own classifier sees in the pairs as training starts: `terms.class_names` learns from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from declip.data.decoded import Images
from declip.data.kept import ClassScores, Kept, States
from declip.data.sources import Source
from declip.evaluation.embedding import embed_source
from declip.model.classes import TEMPLATE, named_classifier
from declip.model.dual_encoder import DualEncoder
from declip.model.prompts import fill
from declip.model.start import Classifier, Start
from declip.progress import Progress
from declip.recipe import Recipe
from declip.training.locked import hash_of
from declip.training.teacher import Started, copy_of_start, keep_lesson, tensors_of, zeros

_ROWS_AT_ONCE = 4096


@dataclass
class ImageClassifier:
    """The image tower as it starts, with the classifier that its weights come with; a lesson as a `Teacher` is one.

    names: of its classes; count: how many of them take part
    """

    start: Start
    device: torch.device
    classifier: Classifier
    names: list[str]
    count: int

    def learn(self, images: Images, recipe: Recipe, kept: Kept, model: DualEncoder, progress: Progress | None) -> Kept:
        """`kept` with the scores of all pairs, computed where the cache has them not of these pairs."""
        copy, version = copy_of_start(recipe, self.start, self.device)
        seeing = _Seeing(copy, self.device, recipe.engine.precision, self.classifier)
        own = {name: tensor for name, tensor in self.classifier._asdict().items() if tensor is not None}
        version = hash_of(version, *tensors_of(own))
        scores = keep_lesson(
            images.source, recipe, "classes", version, lambda: _scores(seeing, images.source, progress)
        )
        return self._with(kept, model, scores, _most_seen(scores, self.count))

    def nothing(self, images: Images, kept: Kept, model: DualEncoder) -> Kept:
        """`kept` with zeros in the place of scores, for a run that only measures its steps."""
        scores = zeros((len(images.source), len(self.names)))
        return self._with(kept, model, scores, np.arange(self.count))

    def _with(self, kept: Kept, model: DualEncoder, scores: States, chosen: np.ndarray) -> Kept:
        tokens = model.token_ids([fill(TEMPLATE, self.names[place]) for place in chosen.tolist()]).numpy()
        return replace(kept, classes=ClassScores(scores, chosen, tokens))


class _Seeing(Started):
    """The started image tower, asked for probabilities."""

    def __init__(self, model: DualEncoder, device: torch.device, precision: str, classifier: Classifier) -> None:
        super().__init__(model, device, precision)
        self.classifier = classifier

    def encode_prepared(self, images: list[np.ndarray]) -> Tensor:
        weight, bias = self.classifier
        return torch.nn.functional.linear(super().encode_prepared(images), weight, bias).softmax(-1)

    encode_image = encode_prepared


def open_classifier(recipe: Recipe, start: Start, device: torch.device) -> ImageClassifier | None:
    """What the recipe's term on classes' names learns from, where it has one; raises InputError where nothing does."""
    term, classes = recipe.terms.class_names, recipe.model.image.classes
    if term is None or not term.weight or classes is None:
        return None
    classifier, names = named_classifier(start, classes)
    return ImageClassifier(start, device, classifier, list(names), min(term.classes, len(names)))


def _scores(seeing: _Seeing, source: Source, progress: Progress | None) -> States:
    """float16 [pairs, classes]; NaN where an image cannot be read."""
    found = embed_source(seeing, source, f"{source.name}, by the start", progress)
    scores = np.full((len(source), found.images.shape[1]), np.nan, np.float16)
    scores[found.rows.numpy()] = found.images.numpy()
    return scores


def _most_seen(scores: States, count: int) -> np.ndarray:
    """The classes with the highest sum of scores over all pairs, in their order: int64 [count]."""
    total = np.zeros(scores.shape[1])
    for first in range(0, len(scores), _ROWS_AT_ONCE):
        total += np.nan_to_num(scores[first : first + _ROWS_AT_ONCE].astype(np.float64)).sum(0)
    chosen: np.ndarray = np.sort(np.argsort(-total, kind="stable")[:count])
    return chosen
