"""Every term in float64: random shapes against double loops, gradients against differences, and what changes nothing.

The loops are written from the equations in the docstrings, one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from declip.model.chunks import CHUNK_BYTES
from declip.model.token_similarity import MeanBestMatch, similarity
from declip.objectives import contrastive
from declip.objectives.contrastive import multi_view_infonce
from declip.objectives.masked_language import MaskedLanguage
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.sigmoid import sigmoid_loss
from declip.objectives.simclr import nt_xent
from declip.objectives.simsiam import negative_cosine
from declip.objectives.token_wise import token_wise_infonce, token_wise_similarity

quick = settings(max_examples=25, deadline=None, derandomize=True)  # a run repeated gives the same shapes
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31 - 1)
SCALE = torch.tensor(7.3, dtype=torch.float64)
BIAS = torch.tensor(-2.1, dtype=torch.float64)


def vectors(seed: int, *shape: int) -> Tensor:
    """Random unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(one: Tensor, other: Tensor) -> float:
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def cross_entropy(logits: Sequence[float], right: int) -> float:
    return math.log(sum(math.exp(logit - logits[right]) for logit in logits))


def infonce(there: list[list[float]], back: list[list[float]]) -> float:
    """Half of each direction; `there` has a row for each image, `back` one for each text."""
    count = len(there)
    rows = [cross_entropy([float(SCALE) * x for x in row], i) for m in (there, back) for i, row in enumerate(m)]
    return sum(rows) / (2 * count)


# Against loops


@quick
@given(seeds, sizes, sizes, st.integers(1, 3), st.integers(1, 3), st.sampled_from([None, 0.0, 0.5]), sizes)
def test_contrastive(
    seed: int, batch: int, dim: int, views: int, texts: int, multi_view: float | None, chunk: int
) -> None:
    images, words = vectors(seed, views, batch, dim), vectors(seed + 1, texts, batch, dim)
    cells = []
    for image in images:
        for text in words:
            there = [[dot(i, t) for t in text] for i in image]
            cells.append(infonce(there, [list(column) for column in zip(*there, strict=True)]))
    expected = sum(cells) / len(cells)
    if multi_view is not None and len(cells) > 1:
        expected = cells[0] + multi_view * sum(cells[1:]) / len(cells[1:])
    for whole in (contrastive.WHOLE, 0):  # the whole matrix, or `chunk` rows at once
        with mock.patch.dict(CHUNK_BYTES, cpu=8 * batch * chunk), mock.patch.object(contrastive, "WHOLE", whole):
            found = multi_view_infonce(images, words, SCALE, multi_view)
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@quick
@given(seeds, sizes, sizes, st.integers(1, 7))
def test_sigmoid(seed: int, batch: int, dim: int, chunk: int) -> None:
    images, texts = vectors(seed, batch, dim), vectors(seed + 1, batch, dim)
    expected = 0.0
    for i in range(batch):
        for j in range(batch):
            sign = 1 if i == j else -1
            expected += math.log(1 + math.exp(-sign * (float(SCALE) * dot(images[i], texts[j]) + float(BIAS))))
    for limit in (2**26, 8 * batch * chunk):  # all images at once, or `chunk` of them
        with mock.patch.dict(CHUNK_BYTES, cpu=limit):
            assert sigmoid_loss(images, texts, SCALE, BIAS).item() == pytest.approx(expected / batch, rel=1e-12)


@quick
@given(seeds, st.integers(2, 6), sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_sigmoid_with_equal_captions(seed: int, batch: int, dim: int, images: int, texts: int, kinds: int) -> None:
    """Texts of an image's own id are right; per text, or summed over an image's texts."""
    image, text = vectors(seed, images, batch, dim), vectors(seed + 1, texts, batch, dim)
    ids = torch.randint(kinds, (texts, batch), generator=torch.Generator().manual_seed(seed))
    expected = 0.0
    for v in range(images):
        for u in range(texts):
            for i in range(batch):
                for j in range(batch):
                    sign = 1 if ids[u, i] == ids[u, j] else -1
                    logit = float(SCALE) * dot(image[v, i], text[u, j]) + float(BIAS)
                    expected += math.log(1 + math.exp(-sign * logit)) / (batch * images)
    for limit in (2**26, 8 * batch):
        with mock.patch.dict(CHUNK_BYTES, cpu=limit):
            for per, share in (("texts", texts), ("images", 1)):
                found = sigmoid_loss(image, text, SCALE, BIAS, caption_ids=ids, per=per)  # type: ignore[arg-type]
                assert found.item() == pytest.approx(expected / share, rel=1e-11)


def test_sigmoid_of_captions_that_differ_is_plain() -> None:
    image, text = vectors(3, 2, 5, 4), vectors(4, 2, 5, 4)
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(
        sigmoid_loss(image, text, SCALE, BIAS, caption_ids=ids), sigmoid_loss(image, text, SCALE, BIAS)
    )


@quick
@given(seeds, st.integers(2, 6), sizes)
def test_simclr(seed: int, batch: int, dim: int) -> None:
    z1, z2 = 3 * vectors(seed, batch, dim), 2 * vectors(seed + 1, batch, dim)
    both = [*F.normalize(z1, dim=-1), *F.normalize(z2, dim=-1)]
    losses = []
    for anchor in range(2 * batch):
        others = [j for j in range(2 * batch) if j != anchor]
        logits = [dot(both[anchor], both[j]) / 0.1 for j in others]
        losses.append(cross_entropy(logits, others.index((anchor + batch) % (2 * batch))))
    assert nt_xent(z1, z2, 0.1).item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_simclr_with_the_batches_of_other_processes() -> None:
    """Anchors in parts against all candidates: the mean of the parts is the whole."""
    z1, z2 = vectors(1, 6, 5), vectors(2, 6, 5)
    parts = [nt_xent(z1[i : i + 2], z2[i : i + 2], 0.1, (z1, z2), i) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, nt_xent(z1, z2, 0.1))


def naive_token_wise(
    images: Tensor, texts: Tensor, mask: Tensor, top_k: int | None
) -> tuple[list[list[float]], list[list[float]]]:
    batch, patches, words = images.shape[0], images.shape[1], texts.shape[1]
    kept_patches, kept_words = [], []
    for b in range(batch):
        present = [j for j in range(words) if mask[b, j]]
        own = [[dot(images[b, i], texts[b, j]) for j in range(words)] for i in range(patches)]
        by_patch = sorted(range(patches), key=lambda i: -sum(own[i][j] for j in present))
        by_word = sorted(present, key=lambda j: -sum(own[i][j] for i in range(patches)))
        kept_patches.append(by_patch[:top_k])
        kept_words.append(by_word[:top_k])
    there, back = [], []
    for b in range(batch):
        row = []
        for other in range(batch):
            best = [max(dot(images[b, i], texts[other, j]) for j in kept_words[other]) for i in range(patches)]
            row.append(sum(best) / patches)
        there.append(row)
        row = []
        present = [j for j in range(words) if mask[b, j]]
        for other in range(batch):
            best = [max(dot(texts[b, j], images[other, i]) for i in kept_patches[other]) for j in present]
            row.append(sum(best) / len(present))
        back.append(row)
    return there, back


@quick
@given(
    seeds,
    st.integers(1, 4),
    st.integers(2, 6),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([None, 1, 2, 16]),
    st.data(),
)
def test_token_wise(
    seed: int, batch: int, dim: int, patches: int, words: int, top_k: int | None, data: st.DataObject
) -> None:
    images, texts = vectors(seed, batch, patches, dim), vectors(seed + 1, batch, words, dim)
    lengths = torch.tensor([data.draw(st.integers(1, words)) for _ in range(batch)])
    mask = torch.arange(words) < lengths[:, None]
    padded = bool((~mask).any())
    there, back = naive_token_wise(images, texts, mask, top_k)
    found = token_wise_similarity(images, texts, mask if padded or seed % 2 else None, top_k)
    torch.testing.assert_close(found[0], torch.tensor(there, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], torch.tensor(back, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    loss = token_wise_infonce(images, texts, SCALE, mask, top_k)
    assert loss.item() == pytest.approx(infonce(there, back), rel=1e-10, abs=1e-12)
    # What a finished model compares is the same, with zeros for the padding.
    if top_k is None:
        torch.testing.assert_close(similarity(images, texts * mask[..., None]), found[0])
        torch.testing.assert_close(similarity(texts * mask[..., None], images), found[1])


@quick
@given(seeds, sizes, sizes)
def test_simsiam(seed: int, batch: int, dim: int) -> None:
    one, other = 3 * vectors(seed, batch, dim), 2 * vectors(seed + 1, batch, dim)
    expected = -sum(dot(a, b) / 6 for a, b in zip(one, other, strict=True)) / batch
    assert negative_cosine(one, other).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@quick
@given(seeds, st.integers(1, 5), sizes, st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.booleans())
def test_nearest_neighbour(
    seed: int, batch: int, dim: int, views: int, texts: int, size: int, exclude_own: bool
) -> None:
    """A queue of random directions, some of them of samples of the batch."""
    images, words = vectors(seed, views, batch, dim), vectors(seed + 1, texts, batch, dim)
    term = filled_queue(seed, dim, size, exclude_own)
    queue, owners = term.queue.clone(), term.queue_ids.tolist()
    losses = []
    for text in words:
        found = []
        for i in range(batch):
            allowed = [row for row in range(size) if not (exclude_own and owners[row] == i)]
            found.append(max(allowed, key=lambda row: dot(queue[row], text[i])) if allowed else None)
        for image in images:
            for i, own in enumerate(found):
                if own is None:
                    continue
                others = [row for j, row in enumerate(found) if j != i and row is not None]
                if exclude_own:
                    others = [row for row in others if owners[row] != i and row != own]
                losses.append(cross_entropy([float(SCALE) * dot(image[i], queue[row]) for row in [own, *others]], 0))
    expected = sum(losses) / len(losses) if losses else 0.0
    found_loss = term.loss(images, words, SCALE, torch.arange(batch))
    assert found_loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def filled_queue(seed: int, dim: int, size: int, exclude_own: bool) -> NearestNeighbour:
    term = NearestNeighbour(dim, size, 2, ["caption"], exclude_own).double().eval()
    term.queue.copy_(vectors(seed + 2, size, dim))
    term.queue_ids.copy_(torch.arange(size) % 6)
    return term


@quick
@given(seeds, sizes, sizes, st.integers(1, 9), st.floats(0, 1))
def test_masked_language(seed: int, batch: int, width: int, vocabulary: int, share: float) -> None:
    torch.manual_seed(seed)
    term = MaskedLanguage(width, vocabulary).double()
    tokens = torch.randn(batch, 4, width, dtype=torch.float64)
    labels = torch.randint(vocabulary, (batch, 4)).masked_fill(torch.rand(batch, 4) > share, -100)
    losses = [
        cross_entropy(
            [
                dot(row, tokens[b, j]) + float(bias)
                for row, bias in zip(term.head.weight.detach(), term.head.bias.detach(), strict=True)
            ],
            int(labels[b, j]),
        )
        for b in range(batch)
        for j in range(4)
        if labels[b, j] >= 0
    ]
    expected = sum(losses) / max(len(losses), 1)
    assert term.loss(tokens, labels).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


# Gradients

# Of images [batch, views or patches, dim], texts [batch, views or words, dim] and which words there are.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "contrastive": lambda a, b, mask: multi_view_infonce(a.transpose(0, 1), b.transpose(0, 1), SCALE),
    "multi_view": lambda a, b, mask: multi_view_infonce(a.transpose(0, 1), b.transpose(0, 1), SCALE, 0.5),
    "sigmoid": lambda a, b, mask: sigmoid_loss(a[:, 0], b[:, 0], SCALE, BIAS),
    "sigmoid, equal captions": lambda a, b, mask: sigmoid_loss(
        a[:, 0], b[:, 0], SCALE, BIAS, caption_ids=(mask.sum(dim=1) > 1).long()[None]
    ),
    "simclr": lambda a, b, mask: nt_xent(a[:, 0], b[:, 0]),
    "token_wise": lambda a, b, mask: token_wise_infonce(a, b, SCALE),
    "token_wise, padding": lambda a, b, mask: token_wise_infonce(a, b, SCALE, mask),
    "token_wise, top 2": lambda a, b, mask: token_wise_infonce(a, b, SCALE, mask, 2),
}
MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])


@pytest.fixture(params=["whole", "chunks"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole matrices, or two rows of three."""
    if request.param == "chunks":
        monkeypatch.setattr(contrastive, "WHOLE", 0)
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * 3 * 2)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    images, texts = vectors(3, 3, 2, 4).requires_grad_(), vectors(4, 3, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: LOSSES[name](a, b, MASK), (images, texts))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("exclude_own", [True, False])
def test_gradcheck_of_neighbours(exclude_own: bool) -> None:
    """To images and scale; the neighbours themselves are constants."""
    term, texts = filled_queue(3, 4, 8, exclude_own), vectors(4, 2, 3, 4)
    images, scale = vectors(3, 2, 3, 4).requires_grad_(), SCALE.clone().requires_grad_()
    ids = torch.arange(3)
    assert torch.autograd.gradcheck(lambda i, s: term.loss(i, texts, s, ids), (images, scale))


def test_gradcheck_of_self_supervision() -> None:
    one, other = vectors(3, 4, 5).requires_grad_(), vectors(4, 4, 5)
    assert torch.autograd.gradcheck(lambda a: negative_cosine(a, other), (one,))


@pytest.mark.usefixtures("at_once")
def test_gradcheck_of_the_scales() -> None:
    images, texts = vectors(3, 3, 2, 4), vectors(4, 3, 3, 4)
    scale, bias = SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: token_wise_infonce(images, texts, s), (scale,))
    assert torch.autograd.gradcheck(lambda s: multi_view_infonce(images[None, :, 0], texts[None, :, 0], s), (scale,))
    assert torch.autograd.gradcheck(lambda s, b: sigmoid_loss(images[:, 0], texts[:, 0], s, b), (scale, bias))


# What changes nothing


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    images, texts = vectors(5, 3, 2, 4), vectors(6, 3, 3, 4)
    loss, order = LOSSES[name], torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss(images[order], texts[order], MASK[order]), loss(images, texts, MASK))


def test_swapping_views_changes_nothing() -> None:
    images, texts = vectors(5, 2, 4, 3), vectors(6, 2, 4, 3)
    loss = multi_view_infonce(images, texts, SCALE)
    torch.testing.assert_close(multi_view_infonce(images.flip(0), texts, SCALE), loss)
    torch.testing.assert_close(multi_view_infonce(texts, images, SCALE), loss)  # the loss is symmetric
    torch.testing.assert_close(nt_xent(images[0], images[1]), nt_xent(images[1], images[0]))


def test_scaling_vectors_or_logits() -> None:
    images, texts = vectors(5, 4, 3), vectors(6, 4, 3)
    torch.testing.assert_close(nt_xent(5 * images, 0.1 * texts), nt_xent(images, texts))
    torch.testing.assert_close(negative_cosine(5 * images, 0.1 * texts), negative_cosine(images, texts))
    half = multi_view_infonce(images[None] / 2, texts[None], 2 * SCALE)
    torch.testing.assert_close(half, multi_view_infonce(images[None], texts[None], SCALE))


@pytest.mark.parametrize("both", [True, False])
def test_chunks_of_token_similarities_change_nothing(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for limit in (2**26, 1):  # all at once, and one item at a time
        monkeypatch.setitem(CHUNK_BYTES, "cpu", limit)
        images, texts = vectors(7, 5, 4, 6).requires_grad_(), vectors(8, 5, 3, 6).requires_grad_()
        loss = token_wise_infonce(images, texts, SCALE, None, None if both else 2)
        loss.backward()
        values.append((loss.detach(), images.grad, texts.grad))
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_many_tokens_need_a_wider_index() -> None:
    """More than 256 tokens: the best one's number does not fit into a byte."""
    queries, items = vectors(9, 2, 2, 4).requires_grad_(), vectors(10, 2, 300, 4).requires_grad_()
    weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    found, _ = MeanBestMatch.apply(queries, items, weights, weights[:0], None, False)
    found.sum().backward()
    gradient = items.grad.clone()
    items.grad = None
    torch.einsum("bnd,cmd->bncm", queries, items).amax(-1).mean(1).sum().backward()
    torch.testing.assert_close(gradient, items.grad)
