"""Cross-modal retrieval: which image belongs to a caption, which caption to an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from declip.model.token_similarity import similarity, similarity_of_pairs

RECALL_AT = (1, 5, 10)

# Two scores this near are a tie: it is what rounding does to a float32 dot product of unit vectors, so without it
# the order of equal items would depend on where the matrix product happened to put them.
TIE = 1e-6

_SCORES_AT_ONCE = 2**24
# Queries and items whose scores exist at once. On a CPU they stay in its cache, where counting costs a thirtieth of the
# product; elsewhere larger ones are faster.
_BLOCK = {"cpu": (1024, 2048)}
_LARGE_BLOCK = (8192, 8192)


def retrieval_metrics(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, chunk: int | None = None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, and the median rank, in both directions.

    Takes what `retrieval_ranks` takes, and raises what it raises. Returns ``text_to_image_r1``, ``_r5``, ``_r10``,
    ``image_to_text_r1``, ``_r5``, ``_r10``, ``text_to_image_median_rank`` and ``image_to_text_median_rank``
    (1 = always first).
    """
    return metrics_of_ranks(retrieval_ranks(image_embeddings, text_embeddings, image_of_text, chunk))


def metrics_of_ranks(ranks: dict[str, Tensor]) -> dict[str, float]:
    """What `retrieval_metrics` returns, of what `retrieval_ranks` returns."""
    recalls = {f"{way}_r{k}": percent_within(rank, k) for way, rank in ranks.items() for k in RECALL_AT}
    return {**recalls, **{f"{way}_median_rank": median_rank(rank) for way, rank in ranks.items()}}


@torch.no_grad()
def retrieval_ranks(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_of_text: Tensor,
    chunk: int | None = None,
    queries: Tensor | None = None,
) -> dict[str, Tensor]:
    """How many wrong items stand above the right one, for every query in both directions (0 = the right one is first).

    Text to image: every caption is a query, and its image is right. Image to text: every image that has a caption is
    a query, and the best of its captions counts (the protocol of Karpathy and Fei-Fei 2015 that Flickr30k and COCO
    results follow). Ties are counted against the model: a wrong item with the same score stands above the right one,
    and so does one whose score is NaN.

    Only blocks of the scores exist at a time, 8 MB on a CPU, whatever the number of images and texts.

    Args:
        image_embeddings: floating ``[images, width]``, normalised; of a model that compares tokens, both are
            ``[n, tokens, width]``, and each direction has its own similarity. Half precision is turned into float32
            block by block.
        text_embeddings: likewise ``[texts, width]``.
        image_of_text: int64 ``[texts]``, the row of each text's image.
        chunk: queries scored at once.
        queries: int64 ``[n]``, rows of images: only these and their captions are queries, among all images and texts.

    Returns int64 ``{"text_to_image": [texts], "image_to_text": [images with captions]}``, in the order of the rows.
    Raises ValueError where there is no text, no query has one, or ``image_of_text`` does not fit.
    """
    texts = len(text_embeddings)
    check_owners(len(image_embeddings), texts, image_of_text)
    owner = image_of_text.to(image_embeddings.device)
    chosen = torch.arange(texts, device=owner.device)
    if queries is not None:
        chosen = torch.isin(owner, queries.to(owner.device)).nonzero()[:, 0]
        if not len(chosen):
            raise ValueError("none of the images that are queries has a text")
    captioned, position = torch.unique(owner[chosen], return_inverse=True)
    if queries is None and image_embeddings.ndim == 2:  # one product serves both directions
        pairs = torch.stack([chosen, owner])
        there, back = _wrong_above(text_embeddings, chosen, image_embeddings, pairs, chunk, both=True)
        return {"text_to_image": there, "image_to_text": back[captioned]}
    own_image = torch.stack([torch.arange(len(chosen), device=owner.device), owner[chosen]])
    own_texts = torch.stack([position, chosen])[:, position.argsort()]
    return {
        "text_to_image": _wrong_above(text_embeddings, chosen, image_embeddings, own_image, chunk)[0],
        "image_to_text": _wrong_above(image_embeddings, captioned, text_embeddings, own_texts, chunk)[0],
    }


def check_owners(images: int, texts: int, image_of_text: Tensor) -> None:
    """Raise ValueError where there is no text, or not the row of an image for each."""
    if not texts or image_of_text.shape != (texts,):
        raise ValueError(f"{texts} texts need one image row each, not {tuple(image_of_text.shape)}")
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(f"image_of_text points outside the {images} images")


def percent_within(ranks: Tensor, k: int) -> float:
    """Share of the queries ``[n]`` whose rank (0 = best) is below k, in percent."""
    return 100.0 * int((ranks < k).sum()) / len(ranks)


def median_rank(ranks: Tensor) -> float:
    """Median of ranks ``[n]`` (0 = best), counted from 1; of an even number, the mean of the two in the middle."""
    in_order = ranks.sort().values
    return 1 + (int(in_order[(len(ranks) - 1) // 2]) + int(in_order[len(ranks) // 2])) / 2


def chunks(rows: int, columns: int, chunk: int | None = None) -> Iterator[slice]:
    """Slices of the rows, so that a ``[rows, columns]`` score matrix never has to exist as a whole."""
    return _slices(rows, chunk or max(1, _SCORES_AT_ONCE // max(columns, 1)))


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def not_below(scores: Tensor, right: Tensor) -> Tensor:
    """Which scores ``[n, m]`` do not lie clearly below the right item's ``[n, 1]``; NaN never does."""
    return ~(scores < right - TIE)


def _wrong_above(
    queries: Tensor, rows: Tensor, items: Tensor, pairs: Tensor, chunk: int | None, both: bool = False
) -> tuple[Tensor, Tensor]:
    """For each query how many wrong items do not lie below the best of its own: int64 ``[rows]``.

    rows: int64, which of `queries` are asked; pairs: int64 ``[2, pairs]``, what belongs together: the place in `rows`,
    ascending, and the item.
    With `both`, secondly the same for each item, among the queries: int64 ``[items]``; otherwise nothing.
    """
    own = _own_scores(queries, rows, items, pairs)
    limit = _best(own, pairs[0], len(rows)) - TIE
    limit_back = _best(own, pairs[1], len(items)) - TIE
    below, below_back = (torch.zeros(len(of), dtype=torch.int64, device=own.device) for of in (rows, items))
    height, width = _block(queries, items, chunk)
    for part in _slices(len(rows), height):
        some = _single(queries[rows[part]])
        first, last = torch.searchsorted(pairs[0], torch.tensor([part.start, part.stop], device=own.device)).tolist()
        place, item = pairs[:, first:last]
        for columns in _slices(len(items), width):
            scores = similarity(some, _single(items[columns]))
            here = (item >= columns.start) & (item < columns.stop)
            # What is right takes no part in the count: NaN lies below nothing.
            scores[place[here] - part.start, item[here] - columns.start] = torch.nan
            below[part] += _count_below(scores, limit[part, None], 1)
            if both:
                below_back[columns] += _count_below(scores, limit_back[columns], 0)
    above = len(items) - torch.bincount(pairs[0], minlength=len(rows)) - below
    above_back = len(rows) - torch.bincount(pairs[1], minlength=len(items)) - below_back
    return above, above_back if both else above_back[:0]


def _own_scores(queries: Tensor, rows: Tensor, items: Tensor, pairs: Tensor) -> Tensor:
    """The score of each pair: ``[pairs]``."""
    numbers = queries[:1].numel() + items[:1].numel()
    if queries.ndim == 3:
        numbers += queries.shape[1] * items.shape[1]
    return torch.cat(
        [
            similarity_of_pairs(_single(queries[rows[pairs[0, part]]]), _single(items[pairs[1, part]]))
            for part in chunks(pairs.shape[1], numbers)
        ]
    )


def _best(scores: Tensor, of: Tensor, count: int) -> Tensor:
    """The largest of the scores of each: ``[count]``; NaN where one is, -inf where there is none."""
    return scores.new_full((count,), -torch.inf).scatter_reduce_(0, of, scores, "amax")


def _block(queries: Tensor, items: Tensor, chunk: int | None) -> tuple[int, int]:
    """How many queries and how many items are compared at once."""
    if queries.ndim == 3:  # tokens are best compared with all items, sorted by length
        return chunk or max(1, _SCORES_AT_ONCE // (items.shape[0] * items.shape[1])), len(items)
    height, width = _BLOCK.get(queries.device.type, _LARGE_BLOCK)
    return chunk or height, width


def _count_below(scores: Tensor, limit: Tensor, dim: int) -> Tensor:
    """How many scores are below the limit, along `dim`: int64."""
    # Ones and zeros as floating numbers are made and summed ten times as fast as bool, and exactly up to 2 ** 24.
    return torch.lt(scores, limit, out=torch.empty_like(scores)).sum(dim).long()


def _single(embeddings: Tensor) -> Tensor:
    """In float32 at least."""
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
