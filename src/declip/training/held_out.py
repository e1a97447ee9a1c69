"""The score that a run watches: retrieval on pairs that it does not train on."""

from __future__ import annotations

import math

import numpy as np
import torch

from declip.data.captions import tokenize
from declip.data.decoded import Images
from declip.data.images import eval_view
from declip.data.sources import BrokenPair
from declip.data.tokenizer import CaptionTokenizer
from declip.errors import InputError
from declip.evaluation.retrieval import retrieval_metrics
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import TokenWise, embed_images, embed_texts
from declip.recipe import Recipe


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
        self.tokens = torch.full((len(ids), context_length), tokenizer.special.pad)
        self.tokens[:, : tokens.shape[1]] = torch.from_numpy(tokens)
        self.pad = tokenizer.special.pad
        self.image_of_text = torch.tensor(owners)

    @torch.inference_mode()
    def score(self, model: DualEncoder, device: torch.device, token_wise: TokenWise | None = None) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways in percent, and `score`, their mean; NaN where the model gives no numbers.

        token_wise: how a model that compares tokens does it.
        """
        was_training = model.training
        model.eval()
        clip = model.clip
        image_parts = [
            embed_images(clip, model.pixels(part.to(device)), token_wise) for part in torch.split(self.images, 256)
        ]
        text_parts = [
            embed_texts(clip, part.to(device), self.pad, token_wise) for part in torch.split(self.tokens, 512)
        ]
        model.train(was_training)
        # Embeddings are compared on the CPU, which costs nothing; tokens where they are, which may be a GPU.
        images, texts = (
            torch.cat(parts).to("cpu" if token_wise is None else device) for parts in (image_parts, text_parts)
        )
        found = retrieval_metrics(images, texts, self.image_of_text)
        metrics = {name: value for name, value in found.items() if not name.endswith("_median_rank")}
        finite = bool(images.isfinite().all() and texts.isfinite().all())
        return {**metrics, "score": sum(metrics.values()) / len(metrics) if finite else math.nan}
