"""How a model's embeddings lie: spread out or collapsed, the two kinds together or apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.evaluation.retrieval import check_owners

SAMPLE = 8192
"""Of more embeddings than this, the pairwise figures look at so many, drawn anew for each kind."""

_ROWS_AT_ONCE = 4096  # turned into float64 at once
_DISTANCES_AT_ONCE = 2**22


def embedding_health(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, sample: int = SAMPLE, seed: int = 0
) -> dict[str, float]:
    """Figures of the embeddings of pairs, all on the unit sphere (lengths are taken out first).

    Args:
        image_embeddings: floating ``[images, width]``.
        text_embeddings: floating ``[texts, width]``.
        image_of_text: int64 ``[texts]``, the row of each text's image.
        sample: embeddings of each kind that uniformity looks at; all else is exact.

    Returns ``alignment``, ``image_uniformity``, ``text_uniformity``, ``modality_gap``, ``image_effective_rank``,
    ``text_effective_rank``, ``matched_cosine`` and ``unmatched_cosine``; unmatched are all other pairs of an image and
    a text, NaN where there are none. A uniformity of fewer than two embeddings is NaN.
    Raises ValueError where there is no text, embeddings are of tokens, or ``image_of_text`` does not fit.
    """
    if image_embeddings.ndim != 2 or text_embeddings.ndim != 2:
        raise ValueError("the figures are of one embedding an item, not of tokens")
    images, texts = len(image_embeddings), len(text_embeddings)
    check_owners(images, texts, image_of_text)
    owner = image_of_text.to(image_embeddings.device)
    matched = _matched_cosine(image_embeddings, text_embeddings, owner)
    image_mean, text_mean = mean_direction(image_embeddings), mean_direction(text_embeddings)
    # The sum over all pairs is the product of the sums.
    unmatched = images * texts * float(image_mean @ text_mean) - texts * matched
    others = images * texts - texts
    return {
        "alignment": 2 - 2 * matched,
        "image_uniformity": uniformity(image_embeddings, sample=sample, seed=seed),
        "text_uniformity": uniformity(text_embeddings, sample=sample, seed=seed),
        "modality_gap": float((image_mean - text_mean).norm()),
        "image_effective_rank": effective_rank(image_embeddings),
        "text_effective_rank": effective_rank(text_embeddings),
        "matched_cosine": matched,
        "unmatched_cosine": unmatched / others if others else float("nan"),
    }


def uniformity(embeddings: Tensor, t: float = 2.0, sample: int = SAMPLE, seed: int = 0) -> float:
    """How evenly embeddings ``[n, width]`` cover the sphere: the lower the better, 0 where all lie in one point.

    The logarithm of the mean of exp(-t d²) over all pairs of two different embeddings, d their distance (Wang and Isola
    2020, arXiv:2005.10242, section 4.1).
    """
    if len(embeddings) > sample:
        chosen = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))[:sample]
        embeddings = embeddings[chosen.to(embeddings.device)]
    unit = normalize(embeddings.double(), dim=-1)
    n = len(unit)
    if n < 2:
        return float("nan")
    total = 0.0
    step = max(1, _DISTANCES_AT_ONCE // n)
    for start in range(0, n, step):
        rows = unit[start : start + step]
        # d² = 2 - 2 cos; an embedding with itself has 1, which is taken away again.
        total += float((rows @ unit.T).sub_(1).mul_(2 * t).exp_().sum()) - len(rows)
    return float(torch.tensor(total / (n * (n - 1)), dtype=torch.float64).log())


def effective_rank(embeddings: Tensor) -> float:
    """In how many directions embeddings ``[n, width]`` spread, 1 to width (Roy and Vetterli 2007, definition 1).

    The exponential of the entropy of the singular values, as shares of their sum. Embeddings are not centred, as in
    RankMe (Garrido et al. 2023), so that a common direction, such as the modality gap, counts too.
    """
    width = embeddings.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=embeddings.device)
    for part in _unit_blocks(embeddings):
        gram.addmm_(part.T, part)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())


def mean_direction(embeddings: Tensor) -> Tensor:
    """Mean of the unit vectors: float64 ``[width]``.

    The distance of the two kinds' means is the modality gap (Liang et al. 2022, arXiv:2203.02053).
    """
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    for part in _unit_blocks(embeddings):
        total += part.sum(0)
    return total / len(embeddings)


def _matched_cosine(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    """Mean over texts; the mean squared distance, which Wang and Isola call alignment, is 2 - 2 of it."""
    total = 0.0
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        one, other = (normalize(part.double(), dim=-1) for part in (images[owner[rows]], texts[rows]))
        total += float((one * other).sum())
    return total / len(texts)


def _unit_blocks(embeddings: Tensor) -> Iterator[Tensor]:
    return (normalize(part.double(), dim=-1) for part in torch.split(embeddings, _ROWS_AT_ONCE))
