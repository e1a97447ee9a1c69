"""The statistics of augmenting captions, and the packaged synonyms."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from declip.data.words import Synonyms, augment, load_synonyms
from declip.pairs import CaptionViews

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
    synonyms = load_synonyms()
    assert load_synonyms() is synonyms
    assert len(synonyms) > 50_000
    assert "hound" in synonyms["dog"]
    assert synonyms.get("not a word of English") is None
    assert all(word == word.lower() for word in synonyms)
    assert isinstance(pickle.loads(pickle.dumps(synonyms)), Synonyms)


def test_any_mapping_gives_what_the_packaged_kind_gives() -> None:
    """And neither keeps more than a bounded part of what it was asked for."""
    lists = {word: "|".join(choices) for word, choices in FEW.items()}
    views = CaptionViews(insertion=1)
    kept = Synonyms(lists)
    ours, theirs = np.random.default_rng(12), np.random.default_rng(12)
    for number in range(40_000):
        text = f"the red dog{number}, a (Dog) and {'i' * (number % 40)} face{number}"
        assert augment(text, kept, views, ours) == augment(text, FEW, views, theirs)
    assert len(kept._cores) == 2**15
    assert max(map(len, kept._cores)) <= 24
    assert ours.random() == theirs.random()


def test_each_word_is_deleted_by_itself() -> None:
    """Independently, wherever it stands: all eight outcomes of three words have their probabilities."""
    found = many("a b c", ONLY_DELETION, 20_000)
    expected = {"a b c": 0.343, "a b": 0.147, "a c": 0.147, "b c": 0.147, "a": 0.072, "b": 0.072, "c": 0.072}
    assert set(found) == set(expected)
    for text, share in expected.items():
        assert abs(found[text] / 20_000 - share) < 0.01, text


def test_many_words_are_picked_evenly() -> None:
    """The sixteen bits of a choice do for captions of thousands of words."""
    text = " ".join(f"w{number}" for number in range(3000))
    rng = np.random.default_rng(5)
    moved: Counter[int] = Counter()
    for _ in range(3000):
        words = augment(text, {}, ONLY_SWAP, rng).split()
        changed = [place for place, word in enumerate(words) if word != f"w{place}"]
        assert len(changed) == 2
        moved.update(place // 1000 for place in changed)
    assert min(moved.values()) > 1850
    assert max(moved.values()) < 2150
