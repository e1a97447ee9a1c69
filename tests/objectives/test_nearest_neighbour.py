"""The nearest-neighbour term and its queue against plain loops."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from made import batch, cosine, features
from torch import Tensor
from torch.nn import functional as F

from declip.errors import InputError
from declip.model.dual_encoder import Features
from declip.objectives.nearest_neighbour import EMPTY, NearestNeighbour
from declip.recipe import load_recipe

Queue = list[tuple[Tensor, int]]  # (unit text embedding, sample id)


def entries(term: NearestNeighbour) -> Queue:
    """What the queue holds, oldest row first."""
    pairs = zip(term.queue.clone(), term.queue_ids.tolist(), strict=True)
    return [(entry, sample) for entry, sample in pairs if sample != EMPTY]


def nearest(queue: Queue, text: Tensor, sample: int, exclude_own: bool, place: int = 0) -> int:
    """The row of the most similar entry, or of the one at a later place in that order."""
    allowed = [row for row, (_, owner) in enumerate(queue) if not (exclude_own and owner == sample)]
    return sorted(allowed, key=lambda row: -cosine(queue[row][0], text))[place]


def naive(
    made: Features,
    queue: Queue,
    samples: list[int],
    images: int,
    texts: list[str],
    exclude_own: bool,
    top_k: int = 1,
) -> float:
    """Each image against its text's neighbour (positive) and the other texts' neighbours (negatives)."""
    scale, losses = float(made.logit_scale.detach()), []
    for view, place in product(texts, range(top_k)):
        found = [nearest(queue, made.text[view][i], sample, exclude_own, place) for i, sample in enumerate(samples)]
        for image in made.image[:images]:
            for i, sample in enumerate(samples):
                negatives = [found[j] for j in range(len(samples)) if j != i]
                if exclude_own:
                    negatives = [row for row in negatives if queue[row][1] != sample and row != found[i]]
                logits = [scale * cosine(image[i], queue[row][0]) for row in [found[i], *negatives]]
                losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[0])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("exclude_own", [True, False])
@pytest.mark.parametrize(("images", "texts"), [(2, ["caption", "augmented"]), (1, ["masked"])])
def test_like_naive(images: int, texts: list[str], exclude_own: bool, top_k: int) -> None:
    """Few samples that come back again and again, so that own entries and shared neighbours abound."""
    term = NearestNeighbour(8, 14, images, texts, exclude_own=exclude_own, top_k=top_k)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        samples = torch.randperm(7, generator=generator)[:5].tolist()
        made, queue = features(seed=step), entries(term)
        loss = term(made, batch(samples)).item()
        if step == 0:
            assert loss == 0
        else:
            assert loss == pytest.approx(naive(made, queue, samples, images, texts, exclude_own, top_k), rel=1e-5), step


@pytest.mark.parametrize("exclude_own", [True, False])
def test_a_sample_finds_itself_only_where_that_is_allowed(exclude_own: bool) -> None:
    term = NearestNeighbour(8, 20, 1, ["caption", "masked"], exclude_own=exclude_own)
    made, samples = features(), batch([3, 1, 4, 0, 5])
    term(made, samples)
    # The second caption is the nearest to the first of the same sample, after that one itself.
    texts = torch.cat([F.normalize(made.text[view].detach(), dim=-1) for view in term.texts])
    ids = samples.sample_ids.repeat(2)
    rows, found = (part[:, 0] for part in term._search(texts, ids))
    assert found.all()
    assert (term.queue_ids[rows] == ids).any() == (not exclude_own)
    if not exclude_own:
        torch.testing.assert_close(term.queue[rows], texts)


def test_more_neighbours_than_the_queue_holds_are_refused() -> None:
    with pytest.raises(InputError, match="top_k = 5 are more neighbours than queue_size = 4 holds"):
        load_recipe("declip", ["terms.nearest_neighbour.top_k=5", "terms.nearest_neighbour.queue_size=4"])


def test_where_fewer_are_there_the_others_are_not_found() -> None:
    """Three neighbours wanted; two entries, one of which is the first sample's own."""
    term, samples = NearestNeighbour(8, 4, 1, ["caption"], top_k=3), batch([0, 1, 2])
    term.queue[:2], term.queue_ids[:2] = F.normalize(torch.eye(8)[:2] + 0.1, dim=-1), torch.tensor([0, 7])
    loss = term(features(batch=3), samples)
    assert loss.isfinite()
    assert term.found is not None
    assert term.found[1].tolist() == [[True] * 3, [False, True, True], [False] * 3]


def test_own_other_captions_are_excluded_too() -> None:
    term = NearestNeighbour(2, 4, 1, ["caption"])
    term.queue[:3] = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]), dim=-1)
    term.queue_ids[:3] = torch.tensor([7, 7, 8])
    rows, found = term._search(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([7, 9]))
    assert rows.tolist() == [[2], [0]]
    assert found.tolist() == [[True], [True]]


def test_sample_with_nothing_but_its_own_in_the_queue_is_left_out() -> None:
    term = NearestNeighbour(8, 4, 1, ["caption"])
    made = features(batch=2)
    term.queue[0], term.queue_ids[0] = F.normalize(torch.ones(8), dim=0), 7
    loss = term(made, batch([7, 9]))
    loss.backward()
    assert made.image.grad is not None
    assert loss.item() == 0  # the other has its positive, and no negative
    assert made.image.grad[0, 0].abs().sum() == 0

    alone = NearestNeighbour(8, 4, 1, ["caption"])
    alone.queue[0], alone.queue_ids[0] = F.normalize(torch.ones(8), dim=0), 7
    assert alone(features(batch=1), batch([7])).item() == 0


def test_empty_entries_are_never_found() -> None:
    """They are zeros, more like a text than one that points away from it."""
    term = NearestNeighbour(2, 10, 1, ["caption"])
    term.queue[4], term.queue_ids[4] = torch.tensor([-1.0, 0.0]), 3
    rows, found = term._search(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert (rows.item(), found.item()) == (4, True)


def test_random_start_is_searched_at_once() -> None:
    torch.manual_seed(0)
    term = NearestNeighbour(8, 16, 2, ["caption"], random_start=True)
    torch.testing.assert_close(term.queue.norm(dim=-1), torch.ones(16))
    made, queue = features(), entries(term)
    assert len(queue) == 16
    loss = term(made, batch()).item()
    assert loss == pytest.approx(naive(made, queue, list(range(5)), 2, ["caption"], True), rel=1e-5)


def test_search_precedes_enqueue() -> None:
    """Not excluded, each text would find itself if it were in the queue already: the loss would be that of itself."""
    term = NearestNeighbour(8, 10, 1, ["caption"], exclude_own=False)
    term(features(seed=1), batch())
    made, before = features(seed=2), entries(term)
    loss = term(made, batch([5, 6, 7, 8, 9])).item()
    after = entries(term)
    assert loss == pytest.approx(naive(made, before, [5, 6, 7, 8, 9], 1, ["caption"], False), rel=1e-5)
    assert loss != pytest.approx(naive(made, after, [5, 6, 7, 8, 9], 1, ["caption"], False), rel=1e-3)


def test_gradient_to_images_and_scale_alone() -> None:
    term = NearestNeighbour(8, 10, 2, ["caption", "masked"])
    term(features(seed=1), batch())
    made = features(seed=2)
    term(made, batch([5, 6, 7, 8, 9])).backward()
    assert made.image.grad is not None
    assert (made.image.grad.abs().sum((1, 2)) > 0).all()
    assert made.logit_scale.grad is not None
    assert all(text.grad is None for text in made.text.values())
    assert not list(term.parameters())
    assert not term.queue.requires_grad


def test_ring_wraps() -> None:
    """As in the reference, what would pass the end is dropped and the pointer goes back to the start."""
    term = NearestNeighbour(8, 12, 1, ["caption"])
    steps = [features(seed=step) for step in range(4)]
    for step, made in enumerate(steps):
        term(made, batch(range(10 * step, 10 * step + 5)))
        assert int(term.pointer) == [5, 10, 0, 5][step]
    assert term.queue_ids.tolist() == [30, 31, 32, 33, 34, 10, 11, 12, 13, 14, 20, 21]
    torch.testing.assert_close(term.queue[:5], F.normalize(steps[3].text["caption"].detach(), dim=-1))
    torch.testing.assert_close(term.queue[10:], F.normalize(steps[2].text["caption"].detach()[:2], dim=-1))


def test_last_text_view_is_entered_first() -> None:
    term = NearestNeighbour(8, 20, 1, ["caption", "augmented"])
    made = features()
    term(made, batch())
    for view, rows in (("augmented", slice(0, 5)), ("caption", slice(5, 10))):
        torch.testing.assert_close(term.queue[rows], F.normalize(made.text[view].detach(), dim=-1))
    assert term.queue_ids.tolist() == [0, 1, 2, 3, 4] * 2 + [EMPTY] * 10


def test_queue_smaller_than_the_batch() -> None:
    term = NearestNeighbour(8, 3, 1, ["caption"])
    for step in range(3):
        loss = term(features(seed=step), batch(range(5)))
        assert math.isfinite(loss.item())
    assert (term.queue_ids.tolist(), int(term.pointer)) == ([0, 1, 2], 0)


def test_evaluation_leaves_the_queue_alone() -> None:
    term = NearestNeighbour(8, 10, 1, ["caption"]).eval()
    term(features(), batch())
    assert not entries(term)
    assert int(term.pointer) == 0


def test_state_dict_round_trip() -> None:
    term, other = (NearestNeighbour(8, 12, 1, ["caption"]) for _ in range(2))
    for step in range(3):
        term(features(seed=step), batch(range(5 * step, 5 * step + 5)))
    other.load_state_dict(term.state_dict())
    for step in range(3, 6):
        losses = [one(features(seed=step), batch(range(step, step + 5))).item() for one in (term, other)]
        assert losses[0] == losses[1]
    for name, buffer in term.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name]), name
