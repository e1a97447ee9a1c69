"""Which cells a comparison has: fractions, batches, rates, ablations, and when two cells are one."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import pair, write_pairs

from declip.cli import main
from declip.compare.grid import Asked, batch_for, parse_fractions, rate_between, rated, term_changes
from declip.compare.prepare import Prepared, caption_tokens, prepare
from declip.compare.run import grid_cells, plan
from declip.compare.search import rate_of, search_rates
from declip.errors import InputError
from declip.recipe import load_recipe
from declip.training.pairs import open_pairs, pairs_set_aside


@pytest.fixture
def asked(tmp_path: Path, recipe_file: Callable[..., Path]) -> Callable[..., Asked]:
    """CLIP and DeCLIP on 100 pairs, 80 of which are trained on; judged on 20 others."""
    train = write_pairs(tmp_path / "train.parquet", [pair(n) for n in range(100)])
    test = write_pairs(tmp_path / "test.parquet", [pair(n) for n in range(1000, 1020)])
    recipes = tuple(str(recipe_file(method)) for method in ("clip", "declip"))

    def make(**changes: Any) -> Asked:
        given = {"recipes": recipes, "data": (str(train),), "judged": (str(test),), "out": tmp_path / "out", "jobs": 2}
        return Asked(**{**given, "fractions": (Fraction(1), Fraction(1, 2), Fraction(1, 4)), **changes})

    return make


def test_fractions_are_read_largest_first() -> None:
    assert parse_fractions("1/4,1,0.5,1/4") == (1, Fraction(1, 2), Fraction(1, 4))
    for text in ("2", "0", "-1/2", "1/0", "half", "1,,1/2"):
        with pytest.raises(InputError, match="is no fraction of the pairs"):
            parse_fractions(text)


def test_a_batch_shrinks_to_half_of_the_pairs_or_is_none() -> None:
    assert batch_for(128, 128) == 128
    assert batch_for(128, 127) == 32
    assert batch_for(128, 64) == 32
    assert batch_for(128, 16) == 8
    assert batch_for(128, 15) is None


def test_all_learning_rates_are_scaled() -> None:
    recipe = load_recipe("clip", ["optimizer.lr=1e-3", "optimizer.image_lr=4e-4", "optimizer.head_lr=0"])
    scaled = rated(recipe, 0.5).optimizer
    assert (scaled.lr, scaled.image_lr, scaled.head_lr, scaled.text_lr) == (5e-4, 2e-4, 0, None)


def test_rates_between_two_fractions_are_on_a_line_of_logarithms() -> None:
    small, large = (Fraction(1, 16), 2.0), (Fraction(1), 0.5)
    assert rate_between(small, large, Fraction(1, 16)) == pytest.approx(2)
    assert rate_between(small, large, Fraction(1, 4)) == pytest.approx(1)
    assert rate_between(small, large, Fraction(1)) == pytest.approx(0.5)
    assert rate_between(large, large, Fraction(1)) == 0.5


def test_an_ablation_has_each_term_off_and_alone() -> None:
    off = dict(term_changes(load_recipe("declip")))
    assert off["without simsiam"] == ("terms.simsiam.weight=0",)
    assert set(off["contrastive and simsiam alone"]) == {
        "terms.masked_language.weight=0",
        "terms.nearest_neighbour.weight=0",
    }
    assert len(off["contrastive alone"]) == 3
    assert len(off) == 7
    assert term_changes(load_recipe("clip")) == []
    assert [name for name, _ in term_changes(load_recipe("slip"))] == ["without simclr"]
    three = term_changes(load_recipe("declip", ["terms.simsiam.weight=0"]))
    assert [name for name, _ in three] == ["without masked_language", "without nearest_neighbour", "contrastive alone"]


def test_subsets_are_nested_and_held_out_pairs_are_the_same(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked())
    assert prepared.pairs == {Fraction(1): 80, Fraction(1, 2): 40, Fraction(1, 4): 20}
    keys, held = [], []
    for fraction in prepared.pairs:
        train, out = open_pairs(prepared.cell(prepared.base, fraction, 1, 1.0, 1.0).recipe.data)
        assert out is not None
        keys.append({train.key(i) for i in range(len(train))})
        held.append({out.key(i) for i in range(len(out))})
    assert keys[2] < keys[1] < keys[0]
    assert held[0] == held[1] == held[2]
    assert not held[0] & keys[0]
    other, _ = open_pairs(prepared.cell(prepared.base, Fraction(1, 4), 2, 1.0, 1.0).recipe.data)
    assert {other.key(i) for i in range(len(other))} != keys[2]  # a seed has a subset of its own


def test_without_a_judged_set_pairs_are_set_aside(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked(judged=(), aside=0.2))
    assert prepared.judged == {"set aside": 20}
    assert (prepared.pairs[Fraction(1)], prepared.held_out) == (64, 16)
    data = prepared.cell(prepared.base, Fraction(1), 0, 1.0, 1.0).recipe.data
    train, held = open_pairs(data)
    assert held is not None
    aside = pairs_set_aside(data)
    keys = [{source.key(i) for i in range(len(source))} for source in (train, held, aside)]
    assert len(set.union(*keys)) == sum(map(len, keys)) == 100
    with pytest.raises(InputError, match=r"the grid sets data.set_aside itself; use --aside"):
        prepare(asked(changes=("data.set_aside=0.5",)))


def test_a_costlier_method_also_runs_as_long_as_costs_the_same(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked(seeds=2))
    ratio = prepared.flops["tiny_declip"] / prepared.flops["tiny_clip"]
    assert ratio > 1.5
    rates = search_rates_of(prepared)
    cells = grid_cells(prepared, rates)
    assert len(cells) == 2 * 3 * 3  # seeds, fractions; CLIP at one length, DeCLIP at two
    clip, long, short = prepared.seen, *sorted((c.seen for c in cells[:3] if c.method == "tiny_declip"), reverse=True)
    assert long == clip == 64
    assert 0 < short * ratio <= clip
    assert all(cell.recipe.schedule.pairs_seen == cell.seen for cell in cells)
    assert {cell.recipe.seed for cell in cells} == {cell.recipe.data.fraction_seed for cell in cells} == {0, 1}


def test_equal_compute_that_is_less_than_a_step_is_left_out(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked(pairs_seen=8))
    assert [prepared.lengths(method) for method in prepared.methods] == [[1.0], [1.0]]
    assert prepared.notes == ["tiny_declip: as long as costs what the base costs is less than a step: left out."]


def test_operations_are_counted_for_captions_as_long_as_a_batch_has(
    asked: Callable[..., Asked], tmp_path: Path
) -> None:
    """All of a pair's captions are drawn, not the first alone, and what views join is longer still."""
    words = [{**pair(n), "captions": ["one", "one two three four five six", "seven eight"]} for n in range(100)]
    data = str(write_pairs(tmp_path / "long.parquet", words))
    own = {"tiny_declip": ('terms.contrastive.texts=["joined","joined_2"]', "terms.masked_language.weight=0")}
    prepared = prepare(asked(data=(data,), own=own, allow_overlap=True))
    train = open_pairs(prepared.recipes["tiny_clip"].data)[0]
    assert caption_tokens(train, prepared.recipes["tiny_clip"], 8) == 2 + 6
    assert 2 + 6 < caption_tokens(train, prepared.recipes["tiny_declip"], 8) <= 2 + 6 + 2 + 2 + 1


def test_a_variant_that_changes_nothing_is_run_once_and_shown_beside_its_method(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked(seeds=1, variants=(("tiny_clip", ("data.images.flip=0",)),)))
    cells = grid_cells(prepared, search_rates_of(prepared))
    half = {cell.method: cell for cell in cells if (cell.fraction, cell.seen) == (Fraction(1, 2), prepared.seen)}
    assert half["tiny_clip"].key == half["tiny_clip data.images.flip=0"].key
    assert plan(prepared)["cells"] == plan(prepare(asked(seeds=1)))["cells"]


def test_runs_share_the_cores_unless_told(asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert prepare(asked()).environments == [{"OMP_NUM_THREADS": "4"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert prepare(asked()).environments == [{"OMP_NUM_THREADS": "1"}]


def search_rates_of(prepared: Prepared) -> Any:
    return {m.name: {f: {1.0: 0.0} for f in prepared.searched} for m in prepared.methods}


def test_a_cell_is_known_by_all_that_its_result_depends_on(asked: Callable[..., Asked]) -> None:
    one, same = prepare(asked()), prepare(asked(changes=("engine.threads=2", "data.workers=2", "engine.device=cpu")))
    other = prepare(asked(changes=("optimizer.weight_decay=0.3",)))

    def key(prepared: Prepared, **changes: Any) -> str:
        given = {"fraction": Fraction(1, 2), "seed": 0, "length": 1.0, "rate": 1.0, **changes}
        return prepared.cell(prepared.base, **given).key

    assert key(one) == key(same)
    keys = [key(one), key(other), key(one, seed=1), key(one, fraction=Fraction(1)), key(one, rate=2.0)]
    assert len(set(keys)) == len(keys)


def test_cells_of_other_pairs_are_other_cells(asked: Callable[..., Asked], tmp_path: Path) -> None:
    before = prepare(asked())
    write_pairs(tmp_path / "test.parquet", [pair(n) for n in range(2000, 2020)])
    after = prepare(asked())
    # The same keys and captions, other pictures.
    write_pairs(tmp_path / "test.parquet", [{**pair(n), "image": pair(n + 1)["image"]} for n in range(2000, 2020)])
    pictures = prepare(asked())
    cells = [prepared.cell(prepared.base, Fraction(1), 0, 1.0, 1.0) for prepared in (before, after, pictures)]
    assert cells[0].recipe == cells[1].recipe == cells[2].recipe
    assert len({cell.key for cell in cells}) == 3


def test_small_fractions_shrink_the_batch_or_are_left_out_and_that_is_said(asked: Callable[..., Asked]) -> None:
    prepared = prepare(asked(changes=("schedule.batch_size=32",), fractions=parse_fractions("1,1/4,1/8")))
    assert list(prepared.pairs) == [1, Fraction(1, 4)]
    assert prepared.batches["tiny_clip", Fraction(1, 4)] == 8
    assert "1/8 of the pairs is 10, too few for a batch: left out." in prepared.notes
    assert "tiny_clip: 8 pairs a step with 1/4 of the pairs, as there are 20." in prepared.notes
    with pytest.raises(InputError, match="All fractions leave too few of the 80 pairs"):
        prepare(asked(fractions=parse_fractions("1/16")))


def test_judged_pictures_that_are_trained_on_are_named_and_refused(asked: Callable[..., Asked], tmp_path: Path) -> None:
    write_pairs(tmp_path / "test.parquet", [pair(n) for n in range(90, 110)])
    with pytest.raises(InputError, match=r"test.parquet holds 10 copies .*such as k9.*: judge on other pairs, or say"):
        prepare(asked())
    assert "judged all the same" in prepare(asked(allow_overlap=True)).notes[0]


def test_copies_are_set_aside_together_where_asked(asked: Callable[..., Asked], tmp_path: Path) -> None:
    copies = [{**pair(n), "key": f"copy{n}"} for n in range(0, 100, 5)]
    data = str(write_pairs(tmp_path / "copies.parquet", [*map(pair, range(100)), *copies]))
    with pytest.raises(InputError, match=r"set aside holds .* copies .*: say data.holdout_by=picture, so that copies"):
        prepare(asked(judged=(), data=(data,)))
    prepared = prepare(asked(judged=(), data=(data,), changes=("data.holdout_by=picture",)))
    assert prepared.judged == {"set aside": 12}
    assert not prepared.notes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": "slip"}, "--base slip is not among the recipes compared"),
        ({"own": {"slip": ("seed=1",)}}, "slip:seed=1 changes a recipe that is not compared"),
        ({"changes": ("data.fraction=0.5",)}, "the grid sets data.fraction itself; use --fractions"),
        ({"own": {"tiny_clip": ("seed=3",)}}, "the grid sets seed itself; use --seeds"),
        ({"ablate": ("slip",)}, "--ablate slip is not among the recipes compared"),
        ({"ablate": ("tiny_clip",)}, "--ablate tiny_clip: it has one term"),
        (
            {"pairs_seen": 7},
            "--pairs-seen 7 leaves tiny_clip 7 pairs at its shortest, less than a step of 8: give 8 or",
        ),
        ({"lengths": (0.25, 1.0), "pairs_seen": 16}, "leaves tiny_clip 4 pairs at its shortest, .* give 32 or more"),
        ({"variants": (("slip", ("data.mix=0.1",)),)}, "--variant slip is not among"),
        ({"variants": (("tiny_clip", ("data.fraction=0.1",)),)}, "the grid sets data.fraction itself"),
        ({"changes": ("data.holdout=0",)}, "No pairs are held out"),
        ({"own": {"tiny_declip": ("data.holdout=0.3",)}}, "tiny_declip and tiny_clip differ in data.holdout"),
        ({"changes": ("optimizer.lrr=1",)}, "there is no field optimizer.lrr"),
    ],
)
def test_bad_wishes_are_answered(asked: Callable[..., Asked], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        prepare(asked(**changes))


def test_two_recipes_of_one_name_are_refused(asked: Callable[..., Asked]) -> None:
    one = asked().recipes[0]
    with pytest.raises(InputError, match="Two recipes are called 'tiny_clip'"):
        prepare(asked(recipes=(one, one)))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert main(["compare", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "holds files that are no comparison's" in capsys.readouterr().err


def test_a_plan_counts_cells_and_writes_nothing(asked: Callable[..., Asked], tmp_path: Path) -> None:
    planned = plan(prepare(asked(seeds=1, ablate=("tiny_declip",))))
    search = 2 * 2 * 2  # methods, fractions, rates but the recipe's own, whose cells are the grid's
    assert planned["cells"] == 3 * 3 + 7 + search
    assert planned["finished"] == 0
    assert not (tmp_path / "out").exists()


def test_the_search_goes_beyond_its_ends_and_takes_the_best(asked: Callable[..., Asked]) -> None:
    """Scores made up: the larger the rate the better for CLIP; DeCLIP diverges from 1 on."""
    prepared = prepare(asked())
    rounds = []

    def run(cells: Any) -> dict[str, Any]:
        rounds.append([(cell.method, cell.rate) for cell in cells])
        return {
            cell.key: {"status": "diverged"}
            if cell.method == "tiny_declip" and cell.rate >= 1
            else {"status": "done", "summary": {"held_out_score": cell.rate}, "held_out": [{"score": 99.0}]}
            for cell in cells
        }

    rates = search_rates(prepared, run)
    assert [len(each) for each in rounds] == [12, 4, 2]  # 0.25 is worse than 0.5: DeCLIP is done
    assert rates["tiny_clip"][Fraction(1)] == {0.5: 0.5, 1.0: 1.0, 2.0: 2.0, 4.0: 4.0, 8.0: 8.0}
    assert rate_of(prepared, rates, prepared.base, Fraction(1, 2)) == 8.0
    own = rates["tiny_declip"][Fraction(1)]
    assert own[1.0] == own[2.0] == float("-inf")
    assert rate_of(prepared, rates, prepared.methods[1], Fraction(1)) == 0.5
    lost = search_rates(prepared, lambda cells: {cell.key: {"status": "diverged"} for cell in cells})
    assert rate_of(prepared, lost, prepared.base, Fraction(1, 2)) == 0.5
