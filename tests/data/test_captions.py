"""Rows of tokens, whole and masked, against loops and by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from declip.data.captions import mask_tokens, tokenize, tokenize_masked
from declip.data.tokenizer import CLIP_TOKENS, EOT, MASK_ID, PAD, SOT, SpecialTokens
from declip.errors import InputError


def test_tokens_are_padded_to_the_longest_only() -> None:
    tokens = tokenize([[5, 6, 7], [], [8]], 77)
    assert tokens.tolist() == [[SOT, 5, 6, 7, EOT], [SOT, EOT, PAD, PAD, PAD], [SOT, 8, EOT, PAD, PAD]]
    assert tokenize([[1, 2, 3, 4]], 4).tolist() == [[SOT, 1, 2, EOT]]
    assert tokenize([], 77).shape == (0, 2)


def test_context_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="context_length = 1 "):
        tokenize([[1]], 1)


def test_masking_rates() -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(SOT, size=100_000).tolist()
    corrupted, labels = mask_tokens(ids, np.random.default_rng(2), 0.15)
    before, after, target = np.array(ids), np.array(corrupted), np.array(labels)
    chosen = target != -100
    assert abs(chosen.mean() - 0.15) < 0.005
    np.testing.assert_array_equal(target[chosen], before[chosen])
    np.testing.assert_array_equal(after[~chosen], before[~chosen])
    masked, kept = after[chosen] == MASK_ID, after[chosen] == before[chosen]
    assert abs(masked.mean() - 0.8) < 0.02
    assert abs(kept.mean() - 0.1) < 0.01
    random = after[chosen][~masked & ~kept]
    assert random.max() < SOT
    assert abs(np.median(random) - SOT / 2) < 0.05 * SOT


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 0), (1.0, 1000)])
def test_mask_nothing_or_all(share: float, wanted: int) -> None:
    ids = list(range(1000))
    corrupted, labels = mask_tokens(ids, np.random.default_rng(3), share)
    assert sum(label != -100 for label in labels) == wanted
    assert (corrupted == ids) == (wanted == 0)
    assert ids == list(range(1000))


def test_special_tokens_are_never_masked() -> None:
    texts = [[SOT, 5, EOT, 6], [7] * 100, []]
    rng = np.random.default_rng(4)
    for _ in range(300):
        tokens, labels = tokenize_masked(texts, 20, 1.0, rng)
        assert tokens.shape == labels.shape == (3, 20)
        assert (tokens[:, 0] == SOT).all()
        assert (labels[:, 0] == -100).all()
        assert labels[0].tolist() == [-100, -100, 5, -100, 6] + [-100] * 15
        assert labels[1].tolist() == [-100] + [7] * 18 + [-100]
        assert (labels[2] == -100).all()
        assert tokens[0, [1, 3, 5]].tolist() == [SOT, EOT, EOT]
        assert tokens[1, -1] == EOT
        assert tokens[2].tolist() == [SOT, EOT] + [PAD] * 18


def test_masked_without_masking_is_plain() -> None:
    texts = [[5, 6, 7], [], [8] * 90]
    tokens, labels = tokenize_masked(texts, 77, 0.0, np.random.default_rng(5))
    np.testing.assert_array_equal(tokens, tokenize(texts, 77))
    assert (labels == -100).all()


def test_each_row_has_its_own_generator() -> None:
    texts = [list(range(100, 130)), list(range(200, 240))]

    def generators() -> list[np.random.Generator]:
        return [np.random.default_rng(6), np.random.default_rng(7)]

    both, labels = tokenize_masked(texts, 77, 0.5, generators())
    alone, alone_labels = tokenize_masked(texts[:1], 77, 0.5, generators()[:1])
    np.testing.assert_array_equal(both[0, :32], alone[0])
    np.testing.assert_array_equal(labels[0, :32], alone_labels[0])
    with pytest.raises(ValueError, match="zip"):
        tokenize_masked(texts, 77, 0.5, generators()[:1])


BERT_LIKE = SpecialTokens(
    start=(101,), end=(102, 102), pad=1, mask=103, vocabulary=200, never=frozenset(range(95, 105))
)


def loop(
    texts: list[list[int]], context_length: int, share: float, rngs: list[np.random.Generator], special: SpecialTokens
) -> tuple[list[list[int]], list[list[int]]]:
    """tokenize_masked, one caption after the other."""
    around = len(special.start) + len(special.end)
    pairs = [
        mask_tokens(ids[: context_length - around], rng, share, special) for ids, rng in zip(texts, rngs, strict=True)
    ]
    longest = max((len(ids) for ids, _ in pairs), default=0)
    tokens = [[*special.start, *ids, *special.end] + [special.pad] * (longest - len(ids)) for ids, _ in pairs]
    labels = [
        [-100] * len(special.start) + labels + [-100] * (len(special.end) + longest - len(labels))
        for _, labels in pairs
    ]
    return tokens, labels


@given(
    st.lists(st.lists(st.integers(0, 199) | st.sampled_from([SOT, EOT, MASK_ID]), max_size=20), max_size=12),
    st.integers(3, 30),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from([CLIP_TOKENS, BERT_LIKE]),
)
def test_batches_are_what_loops_give(
    texts: list[list[int]], context_length: int, share: float, shared: bool, special: SpecialTokens
) -> None:
    def generators() -> list[np.random.Generator]:
        one = np.random.default_rng(11)
        return [one if shared else np.random.default_rng([11, row]) for row in range(len(texts))]

    ours, theirs = generators(), generators()
    tokens, labels = tokenize_masked(texts, context_length, share, ours, special)
    assert (tokens.tolist(), labels.tolist()) == loop(texts, context_length, share, theirs, special)
    assert [rng.random() for rng in ours] == [rng.random() for rng in theirs]  # nothing drawn besides
    whole = loop(texts, context_length, 0.0, generators(), special)[0]
    assert tokenize(texts, context_length, special).tolist() == whole
    if texts:
        with pytest.raises(ValueError, match="zip"):
            tokenize_masked(texts, context_length, share, [*generators(), np.random.default_rng(0)], special)
