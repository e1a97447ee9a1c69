"""CLIP's linear probe: its search, its splits, few shots, and what it says of sets that do not fit."""

from __future__ import annotations

import io
import itertools
import warnings
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import require_shared
from PIL import Image
from sklearn.linear_model import LogisticRegression

from declip.errors import InputError
from declip.evaluation.linear_probe import STRENGTHS, Features, _draw, few_shot, linear_probe


def clustered(rows: int, seed: int, width: int = 16, classes: int = 4) -> Features:
    means = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    return Features(means[labels] + 3 * torch.randn(rows, width, generator=draw), labels)


@pytest.fixture(scope="module")
def sets() -> tuple[Features, Features, Features]:
    """Train, test and validation."""
    return clustered(200, 1), clustered(400, 2), clustered(120, 3)


def scikit_learn(train: Features, judged: Features, strength: float) -> float:
    """Its accuracy on a set, in percent."""
    model = LogisticRegression(C=1 / strength, max_iter=5000, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(train.embeddings.double().numpy(), train.labels.numpy())
    return 100 * float(model.score(judged.embeddings.double().numpy(), judged.labels.numpy()))


def both(one: Features, other: Features) -> Features:
    return Features(torch.cat([one.embeddings, other.embeddings]), torch.cat([one.labels, other.labels]))


def test_the_search_tries_clips_strengths_and_halves_around_the_peak(sets: Any) -> None:
    train, test, validation = sets
    found = linear_probe(train, test, validation, classes=4)
    steps = [round(8 * (np.log10(strength) + 6)) for strength in found.curve]
    assert set(range(0, 97, 16)) <= set(steps)
    scores = [found.curve[STRENGTHS[step]] for step in range(0, 97, 16)]
    equal = [16 * row for row, score in enumerate(scores) if score == max(scores)]
    first = equal[len(equal) // 2]
    assert {first - 8, first + 8} & set(range(97)) <= set(steps)
    assert len(steps) in (14, 15)
    assert steps == sorted(steps)
    assert min(b - a for a, b in itertools.pairwise(steps)) == 1  # an eighth of a decade
    assert found.curve[found.strength] == max(found.curve.values())
    assert found.converged


def test_the_grid_is_all_strengths_and_agrees_with_the_search(sets: Any) -> None:
    train, test, validation = sets
    grid = linear_probe(train, test, validation, classes=4, sweep="grid")
    search = linear_probe(train, test, validation, classes=4)
    assert list(grid.curve) == list(STRENGTHS)
    assert STRENGTHS[0] == pytest.approx(1e-6)
    assert STRENGTHS[-1] == pytest.approx(1e6)
    one_item = 100 / len(validation) + 1e-6
    assert max(abs(grid.curve[strength] - score) for strength, score in search.curve.items()) <= one_item
    best = [strength for strength, score in grid.curve.items() if score == max(grid.curve.values())]
    assert grid.strength == best[len(best) // 2]


def test_validation_curve_and_test_accuracy_are_scikit_learns(sets: Any) -> None:
    train, test, validation = sets
    found = linear_probe(train, test, validation, classes=4)
    for strength in (1e-2, 1.0, 1e2, 1e6):
        assert found.curve[strength] == pytest.approx(scikit_learn(train, validation, strength), abs=1e-6)
    final = scikit_learn(both(train, validation), test, found.strength)
    assert found.metrics["top1"] == pytest.approx(final, abs=0.26)  # one item of the 400


def test_metrics_by_hand(sets: Any) -> None:
    train, _, validation = sets
    test = clustered(90, 5).take(torch.arange(90)[torch.arange(90) % 4 != 3])
    found = linear_probe(train, test, validation, classes=4)
    assert found.scores.shape == (len(test), 4)
    right = found.predictions == test.labels
    assert found.metrics["top1"] == pytest.approx(100 * float(right.double().mean()))
    per_class = [float(right[test.labels == label].double().mean()) for label in range(3)]
    assert found.metrics["mean_per_class"] == pytest.approx(100 * sum(per_class) / 3)
    assert found.metrics["top5"] == 100


def test_a_class_of_test_that_train_lacks_counts_as_wrong(sets: Any) -> None:
    train, test, validation = (each.take((each.labels != 2).nonzero()[:, 0]) for each in sets)
    full = linear_probe(train, sets[1], validation, classes=4)
    less = linear_probe(train, test, validation, classes=4)
    assert full.scores[:, 2].isneginf().all()
    known = 100 * len(test) / len(sets[1])
    assert full.metrics["top1"] == pytest.approx(less.metrics["top1"] * known / 100)
    assert full.metrics["top5"] == pytest.approx(known)
    # One that only validation has takes part in the final fit.
    assert not linear_probe(train, sets[1], sets[2], classes=4).scores.isinf().any()


def test_without_validation_a_fifth_of_each_class_is_held_out_by_the_seed(sets: Any) -> None:
    train, test, _ = sets
    one, same, other = (linear_probe(train, test, classes=4, seed=seed) for seed in (0, 0, 1))
    assert one.curve == same.curve
    assert torch.equal(one.scores, same.scores)
    assert one.curve != other.curve
    assert all(score / 100 * 40 == pytest.approx(round(score / 100 * 40)) for score in one.curve.values())  # of 200


def test_drawn_items_are_so_many_of_each_class_and_more_with_greater_counts() -> None:
    labels = torch.randint(5, (100,), generator=torch.Generator().manual_seed(0))
    few, rest = _draw(labels, torch.tensor([1, 2, 0, 3, 100]), 0)
    counts = torch.bincount(labels, minlength=5)
    assert torch.bincount(labels[few], minlength=5).tolist() == [1, 2, 0, 3, int(counts[4])]
    assert sorted([*few.tolist(), *rest.tolist()]) == list(range(100))
    more, _ = _draw(labels, torch.tensor([3, 3, 3, 4, 100]), 0)
    assert set(few.tolist()) <= set(more.tolist())
    assert _draw(labels, torch.tensor([1, 2, 0, 3, 0]), 1)[0].tolist() != few.tolist()


def test_few_shots_improve_and_are_the_seeds(sets: Any) -> None:
    train, test, validation = sets
    results = few_shot(train, test, validation, classes=4, shots=(1, 16), seeds=(0, 1))
    again = few_shot(train, test, validation, classes=4, shots=(16,), seeds=(1,))
    assert torch.equal(results[1].runs[1].scores, again[0].runs[0].scores)
    assert [result.shots for result in results] == [1, 16]
    top1 = [[run.metrics["top1"] for run in result.runs] for result in results]
    assert np.mean(top1[1]) > np.mean(top1[0])
    # Chosen on min(k, 4) items of each of the four classes.
    for result, judged in zip(results, (4, 16), strict=True):
        scores = [score * judged / 100 for run in result.runs for score in run.curve.values()]
        assert np.allclose(scores, np.round(scores))


def test_a_few_shot_probe_is_scikit_learns_on_the_drawn_items(sets: Any) -> None:
    train, test, _ = sets
    run = few_shot(train, test, classes=4, shots=(8,), seeds=(3,))[0].runs[0]
    drawn = train.take(_draw(train.labels, torch.full((4,), 8), 3)[0])
    model = LogisticRegression(C=1 / run.strength, max_iter=5000, tol=1e-8)
    model.fit(drawn.embeddings.double().numpy(), drawn.labels.numpy())
    theirs = torch.from_numpy(model.predict(test.embeddings.double().numpy()))
    assert float((run.predictions == theirs).double().mean()) >= 0.99


def test_what_does_not_fit_is_said(sets: Any) -> None:
    train, test, validation = sets
    broken = train.embeddings.clone()
    broken[7, 3], broken[9, 0] = float("nan"), float("inf")
    cases = [
        ((Features(broken, train.labels), test), "2 of the 200 embeddings of train have NaN or infinity.*in row 7"),
        ((train.take((train.labels == 1).nonzero()[:, 0]), test), "All of train is of class 1"),
        ((train, Features(test.embeddings, test.labels[:5])), "test has 400 embeddings and 5 labels"),
        ((train, test, Features(validation.embeddings[:, :3], validation.labels)), r"validation have.*\(120, 3\)"),
        ((train, Features(test.embeddings, test.labels + 1)), "labels of test must be int64 from 0 to 3"),
        ((train, Features(test.embeddings, test.labels.float())), "labels of test must be int64"),
        ((train, test.take(torch.arange(0))), r"embeddings of test have the shape \(0, 16\)"),
        ((train.take(torch.arange(4)), test), "Each class of train has one item only"),
    ]
    for given, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            linear_probe(*given, classes=4)


def test_too_few_items_for_the_shots_name_the_class(sets: Any) -> None:
    train, test, validation = sets
    short = train.take(torch.cat([torch.arange(0, 200, 4)[:18], (train.labels > 0).nonzero()[:, 0]]))
    with pytest.raises(InputError, match=r"Class 0 of train has 18 items, and 16 shots need 20 \(16 to train on and 4"):
        few_shot(short, test, classes=4, shots=(16,))
    assert few_shot(short, test, validation, classes=4, shots=(16,), seeds=(0,))[0].runs[0].converged
    with pytest.raises(InputError, match="Class 0 of train has 18 items, and 32 shots need 32"):
        few_shot(short, test, validation, classes=4, shots=(32,))


def cifar(split: str, rows: int) -> Features:
    """Colours of 8 × 8 squares, through random ReLUs: features that a linear classifier gets some way with."""
    table = pq.read_table(require_shared(f"data/cifar10_{split}.parquet")).slice(0, rows)
    pixels = [
        np.asarray(Image.open(io.BytesIO(image.as_py())).convert("RGB").resize((8, 8), Image.Resampling.BOX))
        for image in table["image"]
    ]
    flat = torch.from_numpy(np.stack(pixels)).flatten(1).float() / 255 - 0.5
    weights = torch.randn(flat.shape[1], 256, generator=torch.Generator().manual_seed(0)) / 8
    return Features((flat @ weights).relu(), torch.tensor(table["label"].to_pylist()))


def test_on_cifar10_accuracy_is_scikit_learns() -> None:
    train, test = cifar("train", 3000), cifar("dev", 2000)
    fitted, validation = train.take(torch.arange(2400)), train.take(torch.arange(2400, 3000))
    found = linear_probe(fitted, test, validation, classes=10)
    assert 35 < found.metrics["top1"] < 60
    assert found.metrics["top1"] == pytest.approx(scikit_learn(train, test, found.strength), abs=0.2)
    for strength in (1.0, 1e2, 1e4):
        assert found.curve[strength] == pytest.approx(scikit_learn(fitted, validation, strength), abs=0.2)
