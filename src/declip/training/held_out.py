"""The score that a run watches: retrieval on pairs that it does not train on."""

from __future__ import annotations

import math
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.captions import lengthen, tokenize
from declip.data.decoded import Images
from declip.data.images import eval_view
from declip.data.sources import BrokenPair
from declip.data.tokenizer import CaptionTokenizer
from declip.errors import InputError
from declip.evaluation.retrieval import RECALL_AT, metrics_of_ranks, retrieval_ranks
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import TokenWise, embed_images, embed_texts
from declip.model.image_tower import IMAGES_AT_ONCE
from declip.model.parts import Part
from declip.model.products import by_onednn
from declip.model.text_tower import trim_for
from declip.model.tuning import RESTING
from declip.recipe import Recipe
from declip.training.step import autocast


class HeldOut:
    """Held-out pairs, prepared once: evaluation views as uint8 and tokens."""

    def __init__(
        self, images: Images, recipe: Recipe, size: int, context_length: int, tokenizer: CaptionTokenizer
    ) -> None:
        count = len(images.source)
        chosen = np.random.default_rng(recipe.seed).permutation(count)[: recipe.evaluation.max_items]
        views: list[np.ndarray] = []
        ids: list[list[int]] = []
        owners: list[int] = []
        for index in sorted(chosen.tolist()):
            try:
                view = eval_view(images.get(index), size)
            except BrokenPair:
                continue
            captions = images.source.captions(index)
            owners += [len(views)] * len(captions)
            ids += [tokenizer.encode(caption) for caption in captions]
            views.append(view)
        if not views:
            raise InputError(f"None of the {count} held-out pairs of {images.source.name} can be read.")
        self.images = torch.from_numpy(np.stack(views))
        tokens = tokenize(ids, context_length, tokenizer.special)
        self.tokens = torch.from_numpy(lengthen(tokens, context_length, tokenizer.special.pad))
        self.pad, self.precision = tokenizer.special.pad, recipe.engine.precision
        self.image_of_text = torch.tensor(owners)
        self.below: dict[Part, list[Tensor]] = {}  # of parts of towers that rest, which are asked once

    def first(self, count: int) -> HeldOut:
        """Of its images the first, so many, with their texts."""
        part = copy(self)
        texts = self.image_of_text < count
        part.images, part.tokens, part.image_of_text = (
            self.images[:count],
            self.tokens[texts],
            self.image_of_text[texts],
        )
        part.below = {}
        return part

    @torch.inference_mode()
    def score(self, model: DualEncoder, device: torch.device, token_wise: TokenWise | None = None) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways in percent, `score`, their mean, and `error`, the standard error of that.

        The score is NaN where the model gives no numbers.

        token_wise: how a model that compares tokens does it.
        """
        was_training = model.training
        model.eval()
        with autocast(device, self.precision), by_onednn(device):  # as steps are computed
            images, texts = (self._embed(model, part, device, token_wise) for part in ("image", "text"))
        model.train(was_training)
        ranks = retrieval_ranks(images, texts, self.image_of_text)
        found = metrics_of_ranks(ranks)
        metrics = {name: value for name, value in found.items() if not name.endswith("_median_rank")}
        finite = bool(images.isfinite().all() and texts.isfinite().all())
        score = sum(metrics.values()) / len(metrics) if finite else math.nan
        return {**metrics, "score": score, "error": score_error(ranks, self.image_of_text)}

    def _embed(self, model: DualEncoder, part: Part, device: torch.device, token_wise: TokenWise | None) -> Tensor:
        """Embeddings on the CPU, where comparing them costs nothing; tokens where they are, which may be a GPU."""
        rows = torch.split(self.images, IMAGES_AT_ONCE) if part == "image" else torch.split(self.tokens, 512)
        if token_wise is None and model.tune[part] in RESTING:
            if part not in self.below:
                self.below[part] = [_below(model, part, some.to(device), self.pad) for some in rows]
            above = [
                _above(model, part, some.to(device), states, self.pad).float()
                for some, states in zip(rows, self.below[part], strict=True)
            ]
            return F.normalize(torch.cat(above), dim=-1).cpu()
        if part == "image":
            found = [embed_images(model.clip, model.pixels(some.to(device)), token_wise) for some in rows]
        else:
            found = [embed_texts(model.clip, some.to(device), self.pad, token_wise) for some in rows]
        return torch.cat(found).float().to("cpu" if token_wise is None else device)


def score_error(ranks: dict[str, Tensor], image_of_text: Tensor) -> float:
    """Standard error of the mean recall in percent: over images, as the texts of one are not independent."""
    hits = {way: torch.stack([found.cpu() < k for k in RECALL_AT]).double().mean(0) for way, found in ranks.items()}
    captioned, owner, texts = torch.unique(image_of_text, return_inverse=True, return_counts=True)
    by_text = torch.zeros(len(captioned), dtype=torch.double).index_add_(0, owner, hits["text_to_image"]) / texts
    each = (by_text + hits["image_to_text"]) / 2
    return 100.0 * float(each.std(correction=0)) / math.sqrt(len(each))


def _below(model: DualEncoder, part: Part, rows: Tensor, pad: int) -> Tensor:
    """What comes before all that learns of a tower, a row each."""
    if part == "text":
        return model.texts_below(trim_for(model.clip, rows, pad))
    return model.images_below(model.pixels(rows))


def _above(model: DualEncoder, part: Part, rows: Tensor, states: Tensor, pad: int) -> Tensor:
    """The embeddings [batch, dim] that the rest of the tower makes of that."""
    if part == "text":
        return model.texts_above(trim_for(model.clip, rows, pad), states.float()).embedding
    return model.images_above(states.float()).embedding
