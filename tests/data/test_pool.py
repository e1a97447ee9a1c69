"""Text views that sample a pair's captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import pair, write_pairs

from declip.data.decoded import open_images
from declip.data.loader import BatchMaker
from declip.data.pool import joined, sentences, singles
from declip.data.tokenizer import Tokenizer
from declip.recipe import Recipe, load_recipe
from declip.training.pairs import open_pairs

POOL = ("one", "two", "three", "four")
SINGLES = ["single", "single_2", "single_3"]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["A dog runs. It is 3.5 years old! Is it?"], ("A dog runs", "It is 3.5 years old!", "Is it?")),
        (["a dog\nby a tree</s>grass", "a cat"], ("a dog", "by a tree", "grass", "a cat")),
        (["a dog"], ("a dog",)),
        (["...", " . "], ("...", " . ")),  # better than nothing
    ],
)
def test_sentences(captions: list[str], expected: tuple[str, ...]) -> None:
    assert sentences(captions) == expected


def test_joined_views_are_of_every_length_and_hold_nothing_twice() -> None:
    rng = np.random.default_rng(0)
    parts = [joined(POOL, 3, rng).split(". ") for _ in range(3000)]
    assert all(len(set(each)) == len(each) and set(each) <= set(POOL) for each in parts)
    lengths, firsts = Counter(map(len, parts)), Counter(each[0] for each in parts)
    assert set(lengths) == {1, 2, 3}
    assert all(abs(count - 1000) < 120 for count in lengths.values())
    assert all(abs(count - 750) < 120 for count in firsts.values())
    assert joined(["alone"], 5, rng) == "alone"


def test_single_views_repeat_nothing_as_long_as_the_pool_lasts() -> None:
    rng = np.random.default_rng(0)
    assert all(len(set(singles(POOL, 4, rng)[0])) == 4 for _ in range(50))
    drawn, new = singles(POOL, 10, rng)
    assert new == 4
    assert set(drawn[:4]) == set(drawn[4:8]) == set(POOL)
    assert len(set(drawn[8:])) == 2
    starts = Counter(singles(POOL, 2, rng)[0][0] for _ in range(2000))
    assert all(abs(count - 500) < 100 for count in starts.values())


@pytest.fixture
def texts_of(tmp_path: Path, recipe_file: Callable[..., Path]) -> Callable[..., list[dict[str, str]]]:
    """Of every row of the first batch its texts by view."""

    def make(captions: list[str], *overrides: str) -> list[dict[str, str]]:
        rows = [{**pair(number), "captions": captions} for number in range(8)]
        data = [f"data.train={str(write_pairs(tmp_path / 'pool.parquet', rows))!r}", "data.holdout=0"]
        recipe: Recipe = load_recipe(recipe_file(), [*data, *overrides])
        maker = BatchMaker(open_images(open_pairs(recipe.data)[0], 1.0, 0.0), recipe, 16, 77)
        batch, tokenizer = maker.make(0), Tokenizer()
        texts = {tuple(tokenizer.encode(text)): text for text in all_texts(captions)}
        return [
            {
                view: texts.get(ids := tuple(i for i in batch.tokens[number, row].tolist() if 0 < i < 49406), str(ids))
                for number, view in enumerate(batch.text_views)
            }
            for row in range(8)
        ]

    return make


def all_texts(captions: list[str]) -> list[str]:
    """Every text that can be shown of a few captions."""
    from itertools import permutations

    pool = sentences(captions)
    return [
        *captions,
        *(". ".join(order) for n in range(1, len(pool) + 1) for order in permutations(pool, n)),
        *(". ".join(order) for n in range(1, len(captions) + 1) for order in permutations(captions, n)),
    ]


def test_a_batch_shows_what_its_views_say(texts_of: Callable[..., list[dict[str, str]]]) -> None:
    captions = ["a red cat", "two dogs run", "a bird on a tree"]
    rows = texts_of(captions, f"terms.contrastive.texts={['joined', *SINGLES]}")
    assert list(rows[0]) == ["joined", *SINGLES]
    for row in rows:
        assert {row[view] for view in SINGLES} == set(captions)
        assert set(row["joined"].split(". ")) <= set(captions)
    assert len({row["joined"] for row in rows}) > 3
    assert rows == texts_of(captions, f"terms.contrastive.texts={['joined', *SINGLES]}")
    # Views that sample draw after the others: a recipe that has none of them is what it was.
    plain = texts_of(captions, "terms.contrastive.texts=['caption']")
    both = texts_of(captions, "terms.contrastive.texts=['caption', 'joined']")
    assert [row["caption"] for row in both] == [row["caption"] for row in plain]


def test_sentences_are_drawn_from_where_they_are_asked_for(texts_of: Callable[..., list[dict[str, str]]]) -> None:
    captions = ["a cat sleeps. it is red. a dog barks."]
    rows = texts_of(captions, f"terms.contrastive.texts={SINGLES}", "data.text.sentences=true")
    assert all(set(row.values()) == {"a cat sleeps", "it is red", "a dog barks"} for row in rows)
    whole = texts_of(captions, "terms.contrastive.texts=['single']")
    assert all(row["single"] == captions[0] for row in whole)


def test_a_pair_with_too_few_captions_shows_them_with_other_words(
    texts_of: Callable[..., list[dict[str, str]]],
) -> None:
    captions = ["the small house stands beside the big tree near the water"]
    deleting = ["data.text.synonym=0", "data.text.swap=0", "data.text.deletion_share=0.5"]
    rows = texts_of(captions, f"terms.contrastive.texts={SINGLES}", *deleting)
    assert all(row["single"] == captions[0] for row in rows)
    assert sum(row["single_2"] == captions[0] for row in rows) < 3
    same = texts_of(captions, f"terms.contrastive.texts={SINGLES}", "data.text.repeats=same")
    assert all(set(row.values()) == set(captions) for row in same)
    # Of one caption joined views are that caption too: only the first of all shows it as it is.
    views = ["joined", "joined_2", "single"]
    rows = texts_of(captions, f"terms.contrastive.texts={views}", *deleting)
    assert all(row["joined"] == captions[0] for row in rows)
    assert max(sum(row[view] == captions[0] for row in rows) for view in views[1:]) < 3
    same = texts_of(captions, f"terms.contrastive.texts={views}", "data.text.repeats=same")
    assert all(set(row.values()) == set(captions) for row in same)
