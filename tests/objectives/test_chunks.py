"""Losses in chunks: against the whole matrix written down, how much they hold and how much they multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from declip.model.chunks import CHUNK_BYTES
from declip.objectives import contrastive
from declip.objectives.contrastive import multi_view_infonce
from declip.objectives.nearest_neighbour import NearestNeighbour
from declip.objectives.sigmoid import sigmoid_loss
from declip.objectives.simclr import nt_xent

BATCH, DIM = 13, 6
IDS = torch.tensor([[1, 2, 3, 1, 4, 5, 2, 1, 6, 7, 8, 9, 7], [0] * 6 + list(range(7)), list(range(13))])


@pytest.fixture(autouse=True)
def no_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "WHOLE", 0)


def vectors(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, batch: int = BATCH) -> list[Tensor]:
    """Two image views, three text views, the logit scale and bias."""
    images, texts = vectors(1, 2, batch, DIM, dtype=dtype), vectors(2, 3, batch, DIM, dtype=dtype)
    numbers = [torch.tensor(number, dtype=dtype) for number in (9.0, -3.0)]
    return [x.requires_grad_() for x in (images, texts, *numbers)]


def dense_infonce(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    all_images: Tensor | None = None,
    all_texts: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The two full matrices of each cell, and targets as full matrices too; mean over the cells."""
    all_images = images if all_images is None else all_images
    all_texts = texts if all_texts is None else all_texts
    rows = slice(first, first + images.shape[1])
    cells = []
    for v in range(len(images)):
        for u in range(len(texts)):
            count = all_texts.shape[1]
            equal = torch.eye(count) if ids is None else (ids[u][:, None] == ids[u]).double()
            targets = (equal / equal.sum(dim=1, keepdim=True))[rows]
            there, back = scale * images[v] @ all_texts[u].T, scale * texts[u] @ all_images[v].T
            both = [(targets * logits.log_softmax(dim=1)).sum(dim=1).mean() for logits in (there, back)]
            cells.append(-sum(both) / 2)
    return torch.stack(cells)


def weighted(cells: Tensor) -> Tensor:
    return cells[0] + 0.3 * cells[1:].mean()


def dense_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(images)) - 1
    return -F.logsigmoid(signs * (scale * images @ texts.T + bias)).sum() / len(images)


def dense_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    anchors = F.normalize(torch.cat([z1, z2]), dim=-1)
    logits = (anchors @ anchors.T / 0.1).masked_fill(torch.eye(len(anchors), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(anchors)).roll(len(z1)))


def neighbours(exclude_own: bool) -> NearestNeighbour:
    """A queue of which some entries belong to samples of the batch."""
    term = NearestNeighbour(DIM, 20, 2, ["caption"], exclude_own).double().eval()
    term.queue.copy_(vectors(3, 20, DIM))
    term.queue_ids.copy_(torch.arange(20) % 15)
    return term


def dense_neighbours(images: Tensor, texts: Tensor, scale: Tensor, exclude_own: bool) -> Tensor:
    term, samples = neighbours(exclude_own), torch.arange(BATCH)
    cells = []
    for text in texts:
        similarity = text @ term.queue.T
        if exclude_own:
            similarity = similarity.masked_fill(samples[:, None] == term.queue_ids, float("-inf"))
        rows = similarity.argmax(dim=1)
        for image in images:
            logits = scale * image @ term.queue[rows].T
            if exclude_own:
                hidden = (term.queue_ids[rows] == samples[:, None]) | (rows == rows[:, None])
                logits = logits.masked_fill(hidden & ~torch.eye(BATCH, dtype=torch.bool), float("-inf"))
            cells.append(F.cross_entropy(logits, samples))
    return torch.stack(cells).mean()


def candidates_of(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `images` and `texts` stand in these from 5 on."""
    found = []
    for seed, rows in ((5, images), (7, texts)):
        before, after = (vectors(seed + i, len(rows), 5 - i, DIM, dtype=rows.dtype) for i in range(2))
        found.append(torch.cat([before, rows, after], dim=1))
    return found[0], found[1]


# A loss and what it should be, of images, texts, logit scale and bias.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "contrastive": (
        lambda i, t, s, b: multi_view_infonce(i, t, s),
        lambda i, t, s, b: dense_infonce(i, t, s).mean(),
    ),
    "multi_view, equal captions": (
        lambda i, t, s, b: multi_view_infonce(i, t, s, 0.3, IDS),
        lambda i, t, s, b: weighted(dense_infonce(i, t, s, IDS)),
    ),
    "contrastive, candidates": (
        lambda i, t, s, b: multi_view_infonce(i, t, s, 0.3, None, candidates_of(i, t), 5),
        lambda i, t, s, b: weighted(dense_infonce(i, t, s, None, *candidates_of(i, t), 5)),
    ),
    "sigmoid": (
        lambda i, t, s, b: sigmoid_loss(i[0], t[0], s, b),
        lambda i, t, s, b: dense_sigmoid(i[0], t[0], s, b),
    ),
    "sigmoid, several views": (
        lambda i, t, s, b: sigmoid_loss(i, t, s, b),
        lambda i, t, s, b: torch.stack([dense_sigmoid(one, other, s, b) for one in i for other in t]).mean(),
    ),
    "simclr": (lambda i, t, s, b: nt_xent(*i), lambda i, t, s, b: dense_nt_xent(*i)),
    "nearest_neighbour": (
        lambda i, t, s, b: neighbours(False).loss(i, t, s, torch.arange(BATCH)),
        lambda i, t, s, b: dense_neighbours(i, t, s, False),
    ),
    "nearest_neighbour, others": (
        lambda i, t, s, b: neighbours(True).loss(i, t, s, torch.arange(BATCH)),
        lambda i, t, s, b: dense_neighbours(i, t, s, True),
    ),
}


def with_gradients(loss: Loss, given: list[Tensor]) -> list[Tensor | None]:
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(2.5 * value, given, allow_unused=True)]


@pytest.mark.parametrize("rows", [1, 4, 13, None])
@pytest.mark.parametrize("name", LOSSES)
def test_like_the_whole_matrix(name: str, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, in even and uneven chunks, and as small batches are computed."""
    if rows is None:
        monkeypatch.setattr(contrastive, "WHOLE", 2**19)
    else:
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * BATCH * rows)
    chunked, dense = LOSSES[name]
    for found, expected in zip(with_gradients(chunked, inputs()), with_gradients(dense, inputs()), strict=True):
        if found is None or expected is None:  # an input that the loss does not look at
            assert found is expected
        else:
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_the_ranks_equal_captions_make_the_whole() -> None:
    """Each rank's own loss takes the shared targets once for both ways; the mean over ranks is exact."""

    def in_parts(i: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
        parts = [(slice(first, first + size), first) for first, size in ((0, 4), (4, 4), (8, 4))]
        i, t, ids = i[:, :12], t[:, :12], IDS[:, :12].contiguous()
        losses = [multi_view_infonce(i[:, part], t[:, part], s, None, ids, (i, t), first) for part, first in parts]
        return torch.stack(losses).mean()

    def whole(i: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return dense_infonce(i[:, :12], t[:, :12], s, IDS[:, :12]).mean()

    for found, expected in zip(
        with_gradients(in_parts, inputs())[:4], with_gradients(whole, inputs())[:4], strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


class Watch(TorchDispatchMode):
    """The largest tensor that any operation gives, and how many products of matrices there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operation(*args, **(kwargs or {}))
        self.products += operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        sizes = [x.numel() for x in (given if isinstance(given, tuple | list) else [given]) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return given


@pytest.mark.parametrize("name", [name for name in LOSSES if "equal" not in name and "neighbour" not in name])
def test_the_matrix_never_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward nor backward: two rows at once, of 200."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 8 * 200 * 2)
    given = inputs(batch=200)
    with Watch() as watch:
        LOSSES[name][0](*given).backward()
    assert watch.largest <= 3 * 209 * DIM < 200 * 200 / 10


def test_how_many_products() -> None:
    """Both ways share one product, made again in backward; whole rows need none twice; judging needs no gradient."""
    images, texts, scale, bias = inputs()
    one = images[:1], texts[:1]
    cases: list[tuple[Callable[[], Tensor], int, int]] = [
        (lambda: multi_view_infonce(*one, scale), 1, 4),
        (lambda: multi_view_infonce(*one, scale, None, None, one), 2, 6),
        (lambda: sigmoid_loss(images[0], texts[0], scale, bias), 1, 3),
        (lambda: nt_xent(images[0], images[1]), 1, 3),
    ]
    for loss, judging, training in cases:
        with Watch() as watch, torch.no_grad():
            loss()
        assert watch.products == judging
        with Watch() as watch:
            loss().backward()
        assert watch.products == training


@pytest.mark.parametrize("whole", [0, 2**19])
@pytest.mark.parametrize("name", ["contrastive", "contrastive, candidates", "sigmoid", "simclr"])
def test_autocast_changes_nothing(name: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are the losses' own, so one precision is computed in, whatever the loop around them does."""
    monkeypatch.setattr(contrastive, "WHOLE", whole)
    found = []
    for enabled in (True, False):
        given = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = LOSSES[name][0](*given)
        found.append([loss, *torch.autograd.grad(loss, given[:1])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["contrastive", "contrastive, candidates", "sigmoid"])
def test_no_second_derivative_is_made_up(name: str) -> None:
    images, texts, scale, bias = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(LOSSES[name][0](images, texts, scale, bias), images, create_graph=True)


def test_small_losses_keep_their_digits() -> None:
    """Pairs told apart almost surely: the loss is a thousandth where its logits are near a hundred."""
    texts = vectors(11, 1, 200, 64)
    images, scale = F.normalize(texts + 1.3 * vectors(12, 1, 200, 64), dim=-1), torch.tensor(100.0)
    found = []
    for dtype in (torch.float32, torch.float64):  # the same numbers in both
        pairs = [x.float().to(dtype).requires_grad_() for x in (images, texts)]
        loss = multi_view_infonce(*pairs, scale.to(dtype))
        found.append([x.double() for x in (loss.detach(), *torch.autograd.grad(loss, pairs))])
    assert found[1][0] < 2e-3
    for one, exact in zip(*found, strict=True):
        assert (one - exact).norm() < 2e-5 * exact.norm()
