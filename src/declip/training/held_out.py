"""The score that a run watches: retrieval on pairs that it does not train on."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from declip.data.captions import Tokenizer, tokenize
from declip.data.images import eval_view
from declip.data.loader import Images
from declip.data.sources import BrokenPair
from declip.errors import InputError
from declip.evaluation.retrieval import retrieval_metrics
from declip.model.dual_encoder import DualEncoder
from declip.model.towers import encode_image, encode_text, trim
from declip.recipe import Recipe


class HeldOut:
    """Held-out pairs, prepared once: evaluation views as uint8 and tokens."""

    def __init__(self, images: Images, recipe: Recipe, size: int, context_length: int) -> None:
        count = len(images.source)
        chosen = np.random.default_rng(recipe.seed).permutation(count)[: recipe.evaluation.max_items]
        tokenizer = Tokenizer()
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
        self.tokens = torch.from_numpy(tokenize(ids, context_length))
        self.image_of_text = torch.tensor(owners)

    @torch.inference_mode()
    def score(self, model: DualEncoder, device: torch.device) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways in percent, and `score`, their mean; NaN where the model gives no numbers."""
        was_training = model.training
        model.eval()
        image_parts = [
            encode_image(model.clip, model.pixels(part.to(device))) for part in torch.split(self.images, 256)
        ]
        text_parts = [encode_text(model.clip, trim(part).to(device))[0] for part in torch.split(self.tokens, 512)]
        model.train(was_training)
        images, texts = (F.normalize(torch.cat(parts).float(), dim=-1).cpu() for parts in (image_parts, text_parts))
        metrics = retrieval_metrics(images, texts, self.image_of_text)
        finite = bool(images.isfinite().all() and texts.isfinite().all())
        return {**metrics, "score": sum(metrics.values()) / len(metrics) if finite else math.nan}
