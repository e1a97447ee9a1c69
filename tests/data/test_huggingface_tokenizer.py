"""A WordPiece vocabulary made here: ids against open_clip's HFTokenizer, and what the masked view hides of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from declip.data import huggingface_tokenizer as module
from declip.data.captions import mask_tokens, tokenize, tokenize_masked
from declip.data.huggingface_tokenizer import HuggingFaceTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    "a",
    "dog",
    "run",
    "##ning",
    "##s",
    "un",
    "##believ",
    "##able",
    "photo",
    "##graph",
    "of",
    "!",
    ",",
    "&",
    "caf",
    "##e",
]
VOCABULARY = [*SPECIAL, *PIECES]
TEXTS = [
    "A dog  running, unbelievable photographs!",
    "Caf\u00e9 &amp; dogs \u201cof\u201d \u732b \U0001f604",
    "a [MASK] of [SEP] dogs [CLS]",
    "sch\u00c3\u00b6n\n\ta\x00dog",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    transformers.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(folder))


@pytest.fixture(scope="module")
def peer(folder: Path) -> open_clip.tokenizer.HFTokenizer:
    return open_clip.tokenizer.HFTokenizer(str(folder), context_length=64)


def test_rows_are_open_clips(tokenizer: HuggingFaceTokenizer, peer: open_clip.tokenizer.HFTokenizer) -> None:
    assert tokenizer._rust is not None
    ours = tokenize([tokenizer.encode(text) for text in TEXTS], 64, tokenizer.special)
    np.testing.assert_array_equal(ours, peer(TEXTS).numpy()[:, : ours.shape[1]])
    assert tokenizer.encode("running dogs") == [VOCABULARY.index(piece) for piece in ("run", "##ning", "dog", "##s")]


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "whitespace"])
def test_each_way_of_cleaning(folder: Path, clean: str) -> None:
    ours = HuggingFaceTokenizer(str(folder), {"clean": clean})
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=64, clean=clean)
    rows = tokenize([ours.encode(text) for text in TEXTS], 64, ours.special)
    np.testing.assert_array_equal(rows, theirs(TEXTS).numpy()[:, : rows.shape[1]])


@given(st.text(max_size=40) | st.lists(st.sampled_from([*PIECES, "DOG", "\u00e9", "&lt;"]), max_size=20).map(" ".join))
def test_any_text_is_open_clips(
    tokenizer: HuggingFaceTokenizer, peer: open_clip.tokenizer.HFTokenizer, text: str
) -> None:
    ours = tokenize([tokenizer.encode(text)], 64, tokenizer.special)
    np.testing.assert_array_equal(ours, peer([text]).numpy()[:, : ours.shape[1]])


def test_ids_that_python_changes_come_from_python(folder: Path) -> None:
    real = transformers.AutoTokenizer.from_pretrained(folder)

    def changed(text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [*real(text, **options)["input_ids"], 7]}

    assert module._rust(real) is real.backend_tokenizer
    changed.backend_tokenizer = real.backend_tokenizer  # type: ignore[attr-defined]
    assert module._rust(changed) is None
    assert module._rust(SimpleNamespace()) is None


def test_masked_view_of_word_pieces(folder: Path) -> None:
    """Pieces of words are hidden like words, special tokens never, and the labels bring the caption back."""
    tokenizer = pickle.loads(pickle.dumps(HuggingFaceTokenizer(str(folder))))
    special, share, count = tokenizer.special, 0.4, 3000
    assert (special.start, special.end, special.pad, special.mask) == ((2,), (3,), 0, 4)
    ids = tokenizer.encode("a dog running [SEP] unbelievable [MASK] photographs")
    rngs = [np.random.default_rng([1, row]) for row in range(count)]
    tokens, labels = tokenize_masked([ids] * count, 77, share, rngs, special)
    whole = tokenize([ids] * count, 77, special)
    hidden = labels != -100
    np.testing.assert_array_equal(np.where(hidden, labels, tokens), whole)
    never = np.isin(whole, range(len(SPECIAL)))
    assert not hidden[never].any()
    # Each piece, the "##" ones too, at the same rate: four standard deviations of a binomial.
    rates, deviation = hidden[:, ~never[0]].mean(axis=0), np.sqrt(share * (1 - share) / count)
    assert np.abs(rates - share).max() < 4 * deviation
    shown = tokens[hidden]
    assert (shown == special.mask).mean() == pytest.approx(0.8, abs=0.02)
    assert not np.isin(shown[shown != special.mask], range(len(SPECIAL))).any()
    assert mask_tokens(ids, np.random.default_rng([1, 0]), share, special)[0] == tokens[0, 1:-1].tolist()


def test_long_captions_are_cut_and_not_kept(tokenizer: HuggingFaceTokenizer) -> None:
    before = tokenizer._cached.cache_info().currsize
    assert tokenizer.encode("dog " * 250_000) == [VOCABULARY.index("dog")] * 2048
    assert tokenizer._cached.cache_info().currsize == before
