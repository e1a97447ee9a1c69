"""The first hits of a search put in a better order: each text looks into the images for what it speaks of (FLAIR)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.evaluation.retrieval import chunks, not_below
from declip.model.heads import TextPooler


@torch.inference_mode()
def rerank(
    ranks: dict[str, Tensor],
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    patches: Iterable[tuple[int, Tensor]],
    pooler: TextPooler,
    top: int,
) -> dict[str, Tensor]:
    """Ranks as `retrieval_ranks` gives them, with the first `top` hits of every query in a new order.

    A pair's score is the cosine of the text and of what it pools of the image's patches. A query whose right answer is
    not among its first hits keeps its rank; ties count against the model.

    images [images, dim], texts [texts, dim], image_of_text int64 [texts]; patches: of every image its row and its
    patches [patches, width]. Images without a text are no queries.
    """
    found = {"text_to_image": _first(texts, images, top), "image_to_text": _first(images, texts, top)}
    scores = {way: torch.full(hits.shape, -torch.inf) for way, hits in found.items()}
    askers = _askers(found["text_to_image"], len(images))
    for row, own in patches:
        asking, wanted = askers[row], found["image_to_text"][row]
        both, place = torch.unique(torch.cat([asking[0], wanted]), return_inverse=True)
        pooled = pooler(own[None], texts[both][None])[0]
        values = (pooled * F.normalize(texts[both], dim=-1)).sum(dim=-1)[place]
        scores["text_to_image"][asking[0], asking[1]] = values[: len(asking[0])]
        scores["image_to_text"][row] = values[len(asking[0]) :]
    captioned = torch.unique(image_of_text)
    right = {
        "text_to_image": found["text_to_image"] == image_of_text[:, None],
        "image_to_text": image_of_text[found["image_to_text"]] == torch.arange(len(images))[:, None],
    }
    rows = {"text_to_image": torch.arange(len(texts)), "image_to_text": captioned}
    return {way: _ranks(scores[way][rows[way]], right[way][rows[way]], old) for way, old in ranks.items()}


def _first(queries: Tensor, items: Tensor, top: int) -> Tensor:
    """The `top` items most like each query, or all there are: int64 [queries, top]."""
    top = min(top, len(items))
    return torch.cat([(queries[part] @ items.T).topk(top).indices for part in chunks(len(queries), len(items))])


def _askers(hits: Tensor, images: int) -> list[tuple[Tensor, Tensor]]:
    """Of each image the texts that have it among their hits, and at which place."""
    order = hits.flatten().argsort(stable=True)
    counts = torch.bincount(hits.flatten(), minlength=images).tolist()
    return [(part // hits.shape[1], part % hits.shape[1]) for part in torch.split(order, counts)]


def _ranks(scores: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """How many wrong hits do not lie below the best right one; as before where none of the hits is right."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    above = (not_below(scores, best) & ~right).sum(dim=1)
    return torch.where(right.any(dim=1), above, old)
