"""Tokens against open_clip's own tokenizer, and the statistics of masking and augmenting."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import open_clip
import pytest

from declip.data import captions
from declip.data.captions import (
    EOT,
    MASK_ID,
    PAD,
    SOT,
    Synonyms,
    Tokenizer,
    augment,
    load_synonyms,
    mask_tokens,
    tokenize,
    tokenize_masked,
)
from declip.errors import InputError
from declip.pairs import CaptionViews

TEXTS = [
    "a photo of a dog",
    "A Photo of a DOG, running!!  (on the   beach)",
    "  leading and trailing  ",
    "it's the dog's 3rd ball; they've 1,234.56 more & don't care",
    "grinning face with smiling eyes 😄",
    "👩‍🚀 woman astronaut: medium skin tone 🇨🇭",
    "一只猫坐在桌子上",
    "caf\u00e9 na\u00efve \u201cquotes\u201d \u2014 dashes\u2026",
    "Tom &amp; Jerry &lt;b&gt; &amp;amp; &eacute;",
    "<b>bold</b> &lt;i&gt;",
    "schÃ¶n mojibake â€œquotedâ€\x9d",
    "tabs\tand\nnew\r\nlines\x00\x1b[31m",
    "<start_of_text> inside <END_OF_TEXT>",
    "snake_case and/or under_score's --- ... ?!?!",
    "",
    "   ",
    "word " * 200,
    "supercalifragilisticexpialidocious " * 30,
    "ﬁne ligature ｆｕｌｌ ｗｉｄｔｈ",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def open_clip_ids(texts: list[str], context_length: int = 77) -> np.ndarray:
    """open_clip's tokens, cut to the longest."""
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)(texts).numpy()
    return tokens[:, : int((tokens != 0).sum(axis=1).max())]


# Tokens


@pytest.mark.parametrize("context_length", [77, 16, 2])
def test_tokens_are_open_clips(tokenizer: Tokenizer, context_length: int) -> None:
    tokens = tokenize([tokenizer.encode(text) for text in TEXTS], context_length)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, open_clip_ids(TEXTS, context_length))


def test_random_plain_text_is_open_clips(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    printable = np.array([chr(code) for code in range(32, 127)] + [" "] * 20 + ["'s", "'ve", "dog", "<start_of_text>"])
    simple = open_clip.tokenizer.SimpleTokenizer()
    for _ in range(1000):
        text = "".join(rng.choice(printable, rng.integers(1, 30)))
        assert tokenizer.encode(text) == simple.encode(text), text


def test_tokens_are_padded_to_the_longest_only() -> None:
    tokens = tokenize([[5, 6, 7], [], [8]], 77)
    assert tokens.tolist() == [[SOT, 5, 6, 7, EOT], [SOT, EOT, PAD, PAD, PAD], [SOT, 8, EOT, PAD, PAD]]
    assert tokenize([[1, 2, 3, 4]], 4).tolist() == [[SOT, 1, 2, EOT]]
    assert tokenize([], 77).shape == (0, 2)


def test_context_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="context_length = 1 "):
        tokenize([[1]], 1)


def test_encodings_are_kept_within_bounds() -> None:
    small = Tokenizer(cache_size=10)
    for number in range(100):
        small.encode(f"number {number} 😄")
        small.encode(f"number {number}")
    assert small._caption.cache_info().currsize == 10
    assert small._word.cache_info().currsize == 10
    first = small.encode("a cat")
    first.append(1)  # what the caller does with its list is its own business
    assert small.encode("a cat") == first[:-1]


def test_open_clips_own_memory_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Tokenizer(cache_size=1)
    before = fresh._simple
    monkeypatch.setattr(fresh, "_encodings", 2**18 - 1)
    assert fresh.encode("one dog") == tokenizer.encode("one dog")
    assert fresh._simple is not before


def test_tokenizer_can_be_sent_to_a_worker(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(Tokenizer(7)))
    assert copy.cache_size == 7
    assert copy.encode("a cat 😄") == tokenizer.encode("a cat 😄")


def test_tokenizer_does_without_the_rest_of_open_clip() -> None:
    code = """
import sys
from declip.data.captions import Tokenizer
assert "torch" not in sys.modules
print(Tokenizer().encode("a cat"), "open_clip" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[320, 2368] False", done.stderr


# Masking


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


# Words

FEW = {"dog": ("hound",), "red": ("ruby", "scarlet"), "face": ("human face",), "i": ("iodine",)}
ONLY_SYNONYM = CaptionViews(synonym=1, swap=0, deletion=0)
ONLY_SWAP = CaptionViews(synonym=0, swap=1, deletion=0)
ONLY_DELETION = CaptionViews(synonym=0, swap=0, deletion=1, deletion_share=0.3)


def many(text: str, views: CaptionViews, count: int = 500) -> Counter[str]:
    rng = np.random.default_rng(8)
    return Counter(augment(text, FEW, views, rng) for _ in range(count))


def test_synonym_replaces_the_word_everywhere() -> None:
    assert many("a Dog, a dog and the (dog)!", ONLY_SYNONYM) == {"a hound, a hound and the (hound)!": 500}


def test_synonym_sees_through_punctuation() -> None:
    assert set(many("face: red, and “red”", ONLY_SYNONYM)) == {
        "human face: red, and “red”",
        "face: ruby, and “ruby”",
        "face: scarlet, and “scarlet”",
    }


def test_words_and_synonyms_are_drawn_evenly() -> None:
    found = many("red red red dog", ONLY_SYNONYM, 4000)
    assert abs(found["red red red hound"] / 4000 - 0.5) < 0.04
    assert abs(found["ruby ruby ruby dog"] / 4000 - 0.25) < 0.04


@pytest.mark.parametrize("text", ["I am the one", "blue cat", "- !", "x"])
def test_without_synonyms_nothing_changes(text: str) -> None:
    assert many(text, ONLY_SYNONYM) == {text: 500}


def test_swap_changes_two_places() -> None:
    assert set(many("a b c", ONLY_SWAP)) == {"b a c", "c b a", "a c b"}
    assert many("a b", ONLY_SWAP) == {"b a": 500}
    assert min(many("a b c", ONLY_SWAP, 3000).values()) > 900


def test_insertion_of_a_synonym_anywhere() -> None:
    views = CaptionViews(synonym=0, swap=0, deletion=0, insertion=1)
    assert set(many("a dog", views)) == {"hound a dog", "a hound dog", "a dog hound"}
    assert many("a", views) == {"a": 500}


def test_deletion_rate() -> None:
    lengths = [len(text.split()) * count for text, count in many("a b c d e f g h i j", ONLY_DELETION, 3000).items()]
    assert abs(sum(lengths) / 3000 - 7) < 0.15


def test_deletion_keeps_order_and_one_word() -> None:
    for text in many("a b c d", ONLY_DELETION):
        assert text.split() == sorted(text.split())
    everything = ONLY_DELETION.model_copy(update={"deletion_share": 1.0})
    assert set(many("a b c", everything)) == {"a", "b", "c"}
    nothing = ONLY_DELETION.model_copy(update={"deletion_share": 0.0})
    assert many("a b c", nothing) == {"a b c": 500}


@pytest.mark.parametrize("views", [ONLY_SWAP, ONLY_DELETION], ids=["swap", "deletion"])
def test_single_words_are_left_alone(views: CaptionViews) -> None:
    assert many("dog", views) == {"dog": 500}


@pytest.mark.parametrize("text", ["", "  ", "\n"])
@pytest.mark.parametrize("views", [ONLY_SYNONYM, ONLY_SWAP, ONLY_DELETION, CaptionViews()])
def test_empty_text_comes_back(text: str, views: CaptionViews) -> None:
    assert many(text, views) == {text: 500}


def test_no_operation_at_all() -> None:
    assert many("a dog", CaptionViews(synonym=0, swap=0, deletion=0)) == {"a dog": 500}


def test_operations_have_their_frequencies() -> None:
    views = CaptionViews(synonym=2, swap=1, deletion=1, deletion_share=1.0)
    found = many("a dog", views, 4000)
    assert abs(found["a hound"] / 4000 - 0.5) < 0.03
    assert abs(found["dog a"] / 4000 - 0.25) < 0.03
    assert abs((found["a"] + found["dog"]) / 4000 - 0.25) < 0.03


def test_augmenting_depends_on_the_generator_alone() -> None:
    text = "a brown dog runs after a red ball on the green grass near a white house"

    def make(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [augment(text, load_synonyms(), CaptionViews(), rng) for _ in range(50)]

    assert make(9) == make(9)
    assert make(9) != make(10)
    assert len(set(make(9))) > 20


def test_packaged_synonyms() -> None:
    captions.load_synonyms.cache_clear()
    start = time.process_time()
    synonyms = load_synonyms()
    assert time.process_time() - start < 1.0  # about 0.06 s; generous, for slow machines
    assert load_synonyms() is synonyms
    assert len(synonyms) > 50_000
    assert "hound" in synonyms["dog"]
    assert synonyms.get("not a word of English") is None
    assert all(word == word.lower() for word in synonyms)
    assert isinstance(pickle.loads(pickle.dumps(synonyms)), Synonyms)
