"""Cross-modal retrieval: which image belongs to a caption, which caption to an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from declip.model.token_similarity import similarity

RECALL_AT = (1, 5, 10)

# Two scores this near are a tie: it is what rounding does to a float32 dot product of unit vectors, so without it
# the order of equal items would depend on where the matrix product happened to put them.
TIE = 1e-6

_SCORES_AT_ONCE = 2**24


def retrieval_metrics(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, chunk: int | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, in percent.

    Text to image: every caption is a query, and a hit when its image is among the k best images. Image to text:
    every image that has a caption is a query, and a hit when *any* of its captions is among the k best captions
    (the protocol of Karpathy and Fei-Fei 2015 that Flickr30k and COCO results follow). Ties are counted against
    the model: a wrong item with the same score stands above the right one, and so does one whose score is NaN.

    Args:
        image_embeddings: float32 ``[images, width]``, normalised; of a model that compares tokens, both are
            ``[n, tokens, width]``, and each direction has its own similarity.
        text_embeddings: float32 ``[texts, width]``, normalised.
        image_of_text: int64 ``[texts]``, the row of each text's image.
        chunk: queries scored at once; by default as many as keep the score matrix below 64 MB.

    Returns ``text_to_image_r1``, ``_r5``, ``_r10`` and ``image_to_text_r1``, ``_r5``, ``_r10``.
    Raises ValueError where there is no text or ``image_of_text`` does not fit.
    """
    images, texts = len(image_embeddings), len(text_embeddings)
    if not texts or image_of_text.shape != (texts,):
        raise ValueError(f"{texts} texts need one image row each, not {tuple(image_of_text.shape)}")
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(f"image_of_text points outside the {images} images")
    image_of_text = image_of_text.to(image_embeddings.device)
    ranks = {
        "text_to_image": _ranks_of_images(image_embeddings, text_embeddings, image_of_text, chunk),
        "image_to_text": _ranks_of_texts(image_embeddings, text_embeddings, image_of_text, chunk),
    }
    return {f"{way}_r{k}": percent_within(rank, k) for way, rank in ranks.items() for k in RECALL_AT}


def percent_within(ranks: Tensor, k: int) -> float:
    """Share of the queries ``[n]`` whose rank (0 = best) is below k, in percent."""
    return 100.0 * int((ranks < k).sum()) / len(ranks)


def chunks(rows: int, columns: int, chunk: int | None = None) -> Iterator[slice]:
    """Slices of the rows, so that a ``[rows, columns]`` score matrix never has to exist as a whole."""
    step = chunk or max(1, _SCORES_AT_ONCE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _compared(items: Tensor) -> int:
    """How many things a query is compared with: embeddings, or all tokens."""
    return items.shape[0] * (items.shape[1] if items.ndim == 3 else 1)


def not_below(scores: Tensor, right: Tensor) -> Tensor:
    """Which scores ``[n, m]`` do not lie clearly below the right item's ``[n, 1]``; NaN never does."""
    return ~(scores < right - TIE)


def _ranks_of_images(images: Tensor, texts: Tensor, image_of_text: Tensor, chunk: int | None) -> Tensor:
    """For each text, how many wrong images stand above its own: int64 ``[texts]``."""
    ranks = []
    for rows in chunks(len(texts), _compared(images), chunk):
        scores = similarity(texts[rows], images)
        right = scores.gather(1, image_of_text[rows, None])
        ranks.append(not_below(scores, right).sum(1) - 1)  # minus the right image itself
    return torch.cat(ranks)


def _ranks_of_texts(images: Tensor, texts: Tensor, image_of_text: Tensor, chunk: int | None) -> Tensor:
    """For each image with a caption, how many wrong texts stand above the best of its own: int64 ``[queries]``."""
    queries = torch.unique(image_of_text)
    ranks = []
    for rows in chunks(len(queries), _compared(texts), chunk):
        scores = similarity(images[queries[rows]], texts)
        own = queries[rows, None] == image_of_text
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append((not_below(scores, best) & ~own).sum(1))
    return torch.cat(ranks)
