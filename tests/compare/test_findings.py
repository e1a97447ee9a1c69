"""What cells say together: outcomes of judged pictures, views of the grid, the ablation."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from declip.compare.findings import Ran, chance, find, kept_score, line_json, outcomes
from declip.compare.grid import Cell, Method
from declip.compare.summary import ABLATED, ablation_rows, headline, said_factor, said_interval, said_quality, views_of
from declip.evaluation.retrieval import metrics_of_ranks
from declip.recipe import Recipe

FRACTIONS = {Fraction(1): 400, Fraction(1, 4): 100}
CLIP, DECLIP = Method("clip", "clip"), Method("declip", "declip")


@dataclass
class Grid:
    """What `find` reads of a `Prepared`."""

    methods: list[Method] = field(default_factory=lambda: [CLIP, DECLIP])
    extras: list[Method] = field(default_factory=list)
    pairs: dict[Fraction, int] = field(default_factory=lambda: dict(FRACTIONS))
    judged: dict[str, int] = field(default_factory=lambda: {"test": 50})
    flops: dict[str, float] = field(default_factory=lambda: {"clip": 1.0, "declip": 2.0})
    seen: int = 1000
    base: Method = CLIP


def ran(
    method: str, fraction: Fraction, seed: int, seen: int = 1000, right: int = 10, held_out: float = 1.0, **found: Any
) -> Ran:
    """A cell that has found the first `right` of 50 pictures."""
    ranks = [0] * right + [100] * (50 - right)
    cell = Cell(method, fraction, seed, seen, 1.0, Recipe(), ("test",), "")
    own = {"metrics": {}, "ranks": {"text_to_image": ranks, "image_to_text": ranks}, "image_of_text": list(range(50))}
    return Ran(
        cell,
        {
            "status": "done",
            "judged": {"test": own},
            "held_out": [{"pairs": seen // 2, "score": held_out}, {"pairs": seen, "score": held_out / 2}],
            "losses": [{"pairs": seen, "loss": 1.0, "terms": {}, "neighbour_matches": 0.25}],
            "flops_per_pair": {"clip": 1.0}.get(method, 2.0),
            "summary": {"seconds": 3.0, "pairs_seen": seen, "held_out_score": held_out},
            **found,
        },
    )


def test_outcomes_of_pictures_average_to_the_metrics() -> None:
    """Five captions a picture: the mean over pictures is the mean of both directions' recalls."""
    rng = np.random.default_rng(0)
    ranks = {"text_to_image": torch.from_numpy(rng.integers(0, 20, 100)), "image_to_text": torch.arange(20)}
    owner = torch.arange(20).repeat_interleave(5)
    found = {
        "judged": {
            "set": {"ranks": {name: own.tolist() for name, own in ranks.items()}, "image_of_text": owner.tolist()}
        }
    }
    metrics = metrics_of_ranks(ranks)
    for name, cuts in (("r1", (1,)), ("r10", (10,)), ("mean", (1, 5, 10))):
        expected = np.mean([metrics[f"{way}_r{k}"] for way in ranks for k in cuts])
        own = outcomes(found, "set", name)
        assert own.shape == (20,)
        assert own.mean() == pytest.approx(expected)
    shuffled = rng.permutation(100)
    found["judged"]["set"]["image_of_text"] = owner[shuffled].tolist()
    found["judged"]["set"]["ranks"]["text_to_image"] = ranks["text_to_image"][shuffled].tolist()
    np.testing.assert_allclose(outcomes(found, "set", "mean"), own)


def test_views_take_the_runs_that_they_say() -> None:
    """DeCLIP's pair costs twice; half the pairs are as much compute, and twice the pairs its best length."""
    cells = [ran("clip", f, s, right=10) for f in FRACTIONS for s in range(2)]
    cells += [ran("clip", f, s, seen=2000, right=12, held_out=0.5) for f in FRACTIONS for s in range(2)]
    for seen, right, score in ((500, 11, 1.0), (1000, 20, 2.0), (2000, 30, 3.0)):
        cells += [ran("declip", f, s, seen, right, score) for f in FRACTIONS for s in range(2)]
    found = find(Grid(), cells, "mean")  # type: ignore[arg-type]
    quality = {(line.method, line.view): line.curve.quality().tolist() for line in found.lines}
    assert quality == {
        ("clip", "pairs seen"): [20, 20],
        ("clip", "compute"): [20, 20],
        ("clip", "best"): [20, 20],  # the longer runs are worse on held-out pairs, whatever the judged ones say
        ("declip", "pairs seen"): [40, 40],
        ("declip", "compute"): [22, 22],
        ("declip", "best"): [60, 60],
    }
    line = found.line("declip", "test", "best")
    assert line is not None
    assert [point.pairs for point in line.points] == [100, 400]
    told = line_json(line)["points"][0]
    assert (told["pairs_seen"], told["flops"], told["by_seed"]) == (2000, 4000, {0: 60, 1: 60})
    assert (told["held_out"], told["best_at"], told["last_of_best"]) == (3, 0.5, 0.5)
    assert told["neighbour_matches"] == 0.25


def test_factors_are_those_of_the_curves() -> None:
    """DeCLIP reaches with a quarter of the pairs what CLIP reaches with all."""
    right = {("clip", 100): 5, ("clip", 400): 10, ("declip", 100): 10, ("declip", 400): 15}
    cells = [
        ran(m, f, s, right=right[m, FRACTIONS[f]]) for m in ("clip", "declip") for f in FRACTIONS for s in range(2)
    ]
    found = find(Grid(), cells, "mean")  # type: ignore[arg-type]
    ((line, factors), *others) = [each for each in found.factors if each[0].view == "pairs seen"]
    assert not others
    assert line.method == "declip"
    top = next(factor for factor in factors if (factor.read_off, factor.pairs) == ("base", 400))
    assert (top.kind, top.factor) == ("exact", pytest.approx(4))
    result = {
        "lines": [line_json(line) for line in found.lines],
        "factors": [
            {"method": line.method, "judged": line.judged, "view": line.view, **factor.as_json()}
            for line, factors in found.factors
            for factor in factors
        ],
    }
    assert headline(result, result["lines"][1])["factor"] == pytest.approx(4)  # type: ignore[index]
    # DeCLIP has no run that costs no more than CLIP's, which alone show nothing; at its best it is as at equal pairs.
    assert views_of(result, "test") == ["pairs seen"]


def test_a_diverged_cell_is_counted_and_not_averaged() -> None:
    cells = [ran(m, f, s, right=10) for m in ("clip", "declip") for f in FRACTIONS for s in range(3)]
    spoilt = {"status": "diverged", "reason": "The loss is not a number after step 3"}
    cells[4] = ran("clip", Fraction(1, 4), 1, **spoilt)
    line = find(Grid(), cells, "mean").line("clip", "test", "pairs seen")  # type: ignore[arg-type]
    assert line is not None
    assert [(len(point.runs), point.diverged) for point in line.points] == [(2, 1), (3, 0)]
    cells[3:6] = [ran("clip", Fraction(1, 4), s, **spoilt) for s in range(3)]
    line = find(Grid(), cells, "mean").line("clip", "test", "pairs seen")  # type: ignore[arg-type]
    assert line is not None
    assert [point.pairs for point in line.points] == [400]


def test_a_run_that_was_stopped_early_has_seen_and_cost_less() -> None:
    """Half of DeCLIP's runs stop at half: on average three quarters of the pairs, at 1.5 times CLIP's cost."""
    stopped = {"seconds": 2.0, "pairs_seen": 500, "held_out_score": 1.0}
    cells = [ran(m, f, s) for m in ("clip", "declip") for f in FRACTIONS for s in range(2)]
    cells = [Ran(one.cell, {**one.found, "summary": stopped}) if i in (4, 6) else one for i, one in enumerate(cells)]
    found = find(Grid(), cells, "mean")  # type: ignore[arg-type]
    line = found.line("declip", "test", "pairs seen")
    assert line is not None
    points = line_json(line)["points"]
    assert [(point["pairs_seen"], point["flops"]) for point in points] == [(750, 1500), (750, 1500)]
    # At a length whose other run costs more than CLIP's, the one that stopped is not within CLIP's compute.
    assert found.line("declip", "test", "compute") is None


def test_the_score_of_a_run_is_that_of_the_weights_it_kept() -> None:
    kept = {"seconds": 3.0, "pairs_seen": 1000, "held_out_score": 1.25}
    assert Ran(ran("clip", Fraction(1), 0).cell, {"status": "done", "summary": kept}).held_out == 1.25
    assert kept_score({"status": "diverged", "held_out": [{"score": 3.0}]}) == float("-inf")


@pytest.mark.parametrize(("images", "captions"), [(50, 1), (30, 5), (4, 2)])
def test_guessing(images: int, captions: int) -> None:
    """Beside random orders of all texts and all images."""
    rng, draws = np.random.default_rng(0), 4000
    owner = np.repeat(np.arange(images), captions)
    found = {"judged": {"test": {"image_of_text": owner.tolist()}}}
    for metric, cutoffs in (("mean", (1, 5, 10)), ("r1", (1,)), ("r10", (10,))):
        back = [np.flatnonzero(rng.permutation(owner) == 0)[0] for _ in range(draws)]
        there = rng.integers(0, images, draws)
        drawn = np.mean([50 * ((np.array(back) < k).mean() + (there < k).mean()) for k in cutoffs])
        assert chance(found, "test", metric) == pytest.approx(drawn, abs=2)


def test_a_variant_that_diverged_is_a_row_without_a_quality() -> None:
    variant = Method("declip lr=1e30", "declip", ("optimizer.lr=1e30",), of="declip")
    cells = [ran(m, f, s) for m in ("clip", "declip") for f in FRACTIONS for s in range(2)]
    cells += [ran(variant.name, Fraction(1, 4), s, status="diverged", reason="") for s in range(2)]
    rows = find(Grid(extras=[variant]), cells, "mean").ablation  # type: ignore[arg-type]
    assert [(row["variant"], row["quality"], row["diverged"]) for row in rows] == [(variant.name, None, 2)]


def test_an_ablation_is_beside_its_method_on_the_same_fraction() -> None:
    variant = Method("declip without simsiam", "declip", ("terms.simsiam.weight=0",), of="declip")
    cells = [ran(m, f, s, right=20) for m in ("clip", "declip") for f in FRACTIONS for s in range(2)]
    cells += [ran(variant.name, Fraction(1, 4), s, right=15) for s in range(2)]
    rows = find(Grid(extras=[variant]), cells, "mean").ablation  # type: ignore[arg-type]
    assert [(row["variant"], row["fraction"]) for row in rows] == [(variant.name, "1/4")]
    assert (rows[0]["quality"], rows[0]["of_method"], rows[0]["difference"]) == (30, 40, -10)
    low, high = rows[0]["interval"]
    assert low < -10 < high < 0


def test_an_ablation_compares_runs_of_the_same_seed() -> None:
    """Seeds that differ much hide nothing; a seed with which one has diverged does not count for the other either."""
    variant, part = Method("declip with more", "declip", ("data.mix=0.3",), of="declip"), Fraction(1, 4)
    cells = [ran("declip", part, seed, right=10 + 20 * seed) for seed in range(2)]
    more = [ran(variant.name, part, seed, right=20 + 20 * seed) for seed in range(2)]
    (row,) = find(Grid(extras=[variant]), [*cells, *more], "mean").ablation  # type: ignore[arg-type]
    assert (row["quality"], row["of_method"], row["seeds"]) == (60, 40, 2)
    low, high = row["interval"]
    assert 5 < low < 20 < high < 35
    more[1] = ran(variant.name, part, 1, status="diverged", reason="")
    (row,) = find(Grid(extras=[variant]), [*cells, *more], "mean").ablation  # type: ignore[arg-type]
    assert (row["quality"], row["of_method"], row["difference"]) == (40, 20, 20)
    assert (row["seeds"], row["diverged"]) == (1, 1)
    lost = [cells[0], ran("declip", part, 1, status="diverged", reason="")]
    other = [ran(variant.name, part, 0, status="diverged", reason=""), ran(variant.name, part, 1, right=40)]
    (row,) = find(Grid(extras=[variant]), [*lost, *other], "mean").ablation  # type: ignore[arg-type]
    assert (row["quality"], row["of_method"]) == (80, 20)


def test_an_ablation_in_words() -> None:
    """The whole method comes first; a variant that has diverged says so."""
    variants = [Method(f"declip {name}", "declip", (name,), of="declip") for name in ("better", "lost")]
    part = Fraction(1, 4)
    cells = [ran("declip", part, 0, right=20), ran("declip better", part, 0, right=30, held_out=2.0)]
    cells.append(ran("declip lost", part, 0, status="diverged", reason=""))
    rows = find(Grid(extras=variants), cells, "mean").ablation  # type: ignore[arg-type]
    said = ablation_rows({"ablation": rows, "pairs": {"1/4": 1250}})
    low, high = rows[0]["interval"]
    assert said == [
        ["declip", "test", "1,250", "40.0", "", "", "1.0", "×1.00"],
        ["better", "test", "1,250", "60.0", "+20.0", f"{low:+.1f} to {high:+.1f}", "2.0", "×1.00"],
        ["lost", "test", "1,250", "diverged", "", "", "", ""],
    ]
    assert {len(row) for row in said} == {len(ABLATED)}


def test_factors_in_words() -> None:
    def said(kind: str, factor: float | None, low: float = 0.0, high: float | None = None) -> str:
        return said_factor({"kind": kind, "factor": factor, "low": low, "high": high})

    assert said("exact", 2.04, 1.5, 3.2) == "×2.0 (1.5 to 3.2)"
    assert said("exact", 2.04, 1.5) == "×2.0 (1.5 or more)"
    assert said("more", 4.0, 2.5) == "more than ×4.0 (at least 2.5)"
    assert said("more", 1.0) == "more than ×1.0 (not sure)"
    assert said("less", 0.8) == "less than ×0.80"
    assert said("unknown", None) == "–"
    assert said("exact", 1.47, 0.0, 2.3) == "×1.5 (up to 2.3)"
    assert said("exact", 1.47, 0.0, None) == "×1.5 (not sure)"
    assert said_factor(None) == "–"
    assert [said_interval(0.5, 2.0, 2), said_interval(0.0, 2.0, 2)] == ["0.50 to 2.00", "up to 2.00"]


def test_qualities_in_words() -> None:
    """How many of the runs say so where others diverged; nothing where none was run."""
    result = {"diverged": [{"method": "declip", "fraction": "1/4"}]}
    points = {"1": {"quality": 20.0, "by_seed": {0: 20, 1: 20}, "diverged": 1}}
    said = [said_quality(result, *of, points) for of in (("declip", "1"), ("declip", "1/4"), ("clip", "1/4"))]
    assert said == ["20.0 (2 of 3 runs)", "diverged", "–"]
    points["1"]["diverged"] = 0
    assert said_quality(result, "declip", "1", points) == "20.0"
