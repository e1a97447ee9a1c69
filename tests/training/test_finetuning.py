"""The rules of `declip finetune`: a pure function of the facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from declip.errors import InputError
from declip.finetune.look import sides_named
from declip.recipe import load_recipe
from declip.training.finetuning import (
    CAPTION,
    LAST_LAYERS,
    VIEW,
    batch_for,
    choose,
    epochs_for,
    is_short,
    may_be_short,
    passes_in,
    view_size_for,
)
from declip.training.plan import Choice, Facts, Plan, Speed, override

JOINT = Facts(joint=True, pairs=5400, held_out=600, captions=5.0)
APART = replace(JOINT, joint=False)


def said(plan: Plan) -> dict[str, Any]:
    return {choice.path: choice.value for choice in plan}


def test_every_choice_is_a_field_with_a_reason() -> None:
    starts = {True: ["model.init=x"], False: ["model.image.init=x", "model.text.init=y"]}
    for facts in (JOINT, APART, replace(APART, random=("text",)), replace(JOINT, held_out=0, splits=False)):
        plan = choose(facts)
        load_recipe("clip", [*(choice.override for choice in plan), *starts[facts.joint]])
        assert all(choice.reason for choice in plan)
        assert len(said(plan)) == len(plan)
        assert plan == choose(facts)


def test_a_whole_model_is_bent_and_two_towers_are_joined() -> None:
    joint, apart = said(choose(JOINT)), said(choose(APART))
    assert joint["optimizer.lr"] < apart["optimizer.lr"] < apart["optimizer.projection_lr"]
    assert joint["evaluation.interpolate"] is True
    assert joint["optimizer.start_decay"] > 0
    assert "optimizer.projection_lr" not in joint
    assert not {"evaluation.interpolate", "optimizer.start_decay"} & apart.keys()
    assert (apart["model.embed_dim"], apart["data.text.pool"]) == (512, "turn")
    assert said(choose(replace(APART, embed_dim=768)))["model.embed_dim"] == 768
    assert "data.text.pool" not in said(choose(replace(APART, captions=1.0)))


def timed(facts: Facts, pair_seconds: float) -> Facts:
    """The facts after the steps that say whether all layers can learn."""
    return replace(facts, passes=passes_in(facts, pair_seconds) if may_be_short(facts) else None)


def test_the_last_layers_alone_learn_where_all_would_take_too_long() -> None:
    """Of few pairs, and two towers whose layers are known; what is said counts."""
    short = replace(APART, layers={"image": 16, "text": 6}, minutes=10.0)
    found = said(choose(timed(short, 0.02)))
    assert (found["model.image.tune"], found["model.image.tune_layers"]) == ("last", 5)
    assert (found["model.text.tune"], found["model.text.tune_layers"]) == ("last", 3)
    plan = choose(timed(short, 0.02))
    assert "--minutes 10" in next(choice for choice in plan if choice.path == "model.image.tune").reason
    others = (
        *(replace(short, minutes=None), replace(short, minutes=30.0), replace(short, layers={})),
        *(replace(short, joint=True), replace(short, pairs=10**6)),
        *(replace(short, random=("image",)), replace(short, said={"schedule.epochs": 10})),
    )
    for all_learn in (timed(short, 0.01), *(timed(other, 0.02) for other in others)):
        found = said(choose(all_learn))
        assert found["model.text.tune"] == "all"
        assert "model.text.tune_layers" not in found
    # Seven steps of 112 pairs are timed then, and scores take a tenth: of 900 pairs in 127 s, less than six epochs.
    few = replace(short, pairs=900, minutes=3.0, spent=25.0)
    assert [is_short(timed(few, seconds)) for seconds in (0.022, 0.014)] == [True, False]
    late = timed(replace(short, spent=300.0), 0.01)
    assert said(choose(late))["model.image.tune"] == "last"
    # What was decided stays, whatever the timing of the steps then takes.
    assert said(choose(replace(timed(short, 0.01), spent=300.0)))["model.image.tune"] == "all"


def test_slow_machines_keep_fewer_views() -> None:
    """What goes through the layers that rest takes time that the epochs then lack."""
    apart = replace(APART, layers={"image": 16, "text": 6}, minutes=10.0)
    views = [said(choose(replace(apart, passes=passes)))["model.image.views_kept"] for passes in (0.01, 0.7, 1.1, 2, 5)]
    assert views == [1, 1, 2, 4, 4]
    assert "model.image.views_kept" not in said(choose(replace(apart, passes=20.0)))
    # Two views: keeping them and the captions leaves twice as many epochs and more.
    left = 1.1 - 2 * VIEW - 5 * CAPTION
    assert left / LAST_LAYERS >= 4


def test_views_that_are_made_anew_are_not_said_to_be_kept() -> None:
    """As `kept_parts` keeps none of them; each then goes through all layers, and fewer steps fit into the minutes."""
    apart = replace(APART, layers={"image": 16, "text": 6}, minutes=10.0, passes=1.8)
    assert said(choose(apart))["schedule.batch_size"] == 256
    assert said(choose(apart))["model.image.views_kept"] == 3
    found = said(choose(replace(apart, views_alike=False)))
    assert "model.image.views_kept" not in found
    assert found["schedule.batch_size"] == 128


def test_few_steps_are_of_fewer_pairs() -> None:
    """Of the last layers, in the user's minutes; never of more than otherwise, nor where the user says how many."""
    apart = replace(APART, layers={"image": 16, "text": 6}, minutes=10.0)
    batches = [said(choose(replace(apart, passes=passes)))["schedule.batch_size"] for passes in (0.7, 1.0, 2.0, 20.0)]
    assert batches == [128, 128, 256, 256]
    plan = choose(replace(apart, passes=0.7))
    assert "few steps" in next(choice for choice in plan if choice.path == "schedule.batch_size").reason
    assert said(choose(replace(apart, passes=0.7, pairs=600)))["schedule.batch_size"] == batch_for(600)
    assert "schedule.batch_size" not in said(choose(replace(apart, passes=0.7, said={"schedule.batch_size": 64})))


def test_pictures_are_mixed_where_the_terms_know_what_that_is() -> None:
    assert said(choose(APART))["data.mix"] == 0.3
    assert "data.mix" not in said(choose(JOINT))
    mixed = {"terms.contrastive.equal_captions": "positives", "schedule.batch_size": 64}
    assert "data.mix" in said(choose(replace(APART, said=mixed)))
    for other in ({"terms.nearest_neighbour.weight": 0.2}, {"terms": None}, {"schedule.batch_size": 63}):
        assert "data.mix" not in said(choose(replace(APART, said=other)))


def test_two_captions_where_there_are_several_and_none_is_kept() -> None:
    found = said(choose(APART))
    assert found["terms.contrastive.texts"] == ["caption", "augmented"]
    assert found["data.text.synonym"] == found["data.text.swap"] == found["data.text.deletion"] == 0
    short = timed(replace(APART, layers={"image": 16, "text": 6}, minutes=10.0), 1.0)
    own = (replace(APART, said=said) for said in ({"terms": None}, {"model.text.tune": "last"}))
    for facts in (JOINT, replace(APART, captions=1.0), short, *own):
        assert not {"terms.contrastive.texts", "data.text.swap"} & said(choose(facts)).keys()


def test_statistics_of_pretrained_batch_norms_stay() -> None:
    assert said(choose(replace(APART, batch_norms=True)))["model.freeze_batch_norm"] is True
    for facts in (APART, replace(APART, batch_norms=True, random=("image",)), replace(JOINT, batch_norms=True)):
        assert "model.freeze_batch_norm" not in said(choose(facts))


def test_a_batch_comes_in_pieces_where_the_memory_is_small() -> None:
    large = replace(APART, batch_norms=True, pair_bytes=2**25, free_bytes=2**34)  # 8 GB of 16
    assert "engine.micro_batch" not in said(choose(large))
    assert "engine.micro_batch" not in said(choose(replace(large, free_bytes=None)))
    small = replace(large, free_bytes=2**33)
    assert said(choose(small))["engine.micro_batch"] == 179  # 0.7 of 8 GB are for so many
    assert said(choose(replace(small, said={"schedule.batch_size": 64}))).get("engine.micro_batch") is None
    for facts in (
        replace(small, minutes=10.0, passes=1.0),  # what rests is kept, and the rest needs little
        replace(small, said={"model.freeze_batch_norm": False}),  # each piece would have statistics of its own
        replace(small, said={"engine.compile": True}),
    ):
        assert "engine.micro_batch" not in said(choose(facts))


def test_towers_meet_by_the_names_of_imagenets_classes() -> None:
    knows = replace(APART, classes=1000, sides=0.0)
    assert said(choose(knows))["model.image.classes"] == "imagenet"
    for facts in (replace(knows, classes=21841), replace(knows, sides=None), replace(knows, joint=True)):
        assert "model.image.classes" not in said(choose(facts))


def test_pictures_are_mirrored_where_captions_name_no_sides() -> None:
    assert "data.images.flip" not in said(choose(APART))
    assert said(choose(replace(APART, sides=0.004)))["data.images.flip"] == 0.5
    assert said(choose(replace(APART, sides=0.02)))["data.images.flip"] == 0.0
    assert sides_named(["a dog on the left", "a cat"] * 5) == 0.5
    assert sides_named(["Brightness of a copyright"]) == 0.0
    assert sides_named(["ein Hund links im Bild", "eine Katze"]) is None
    assert sides_named([]) is None


def test_views_are_smaller_than_what_is_judged_where_the_tower_takes_any_size() -> None:
    assert [view_size_for(size) for size in (64, 128, 192, 224, 384)] == [64, 96, 160, 192, 320]
    any_size = replace(APART, image_size=224, any_size=True)
    assert said(choose(any_size))["data.view_size"] == 192
    others = (APART, replace(any_size, image_size=64), replace(any_size, joint=True))
    assert not any("data.view_size" in said(choose(facts)) for facts in others)


def test_a_tower_that_starts_at_random_learns_fast() -> None:
    found = said(choose(replace(APART, random=("text",))))
    assert found["optimizer.text_lr"] > found["optimizer.lr"]
    assert "model.text.tune" not in found
    assert "optimizer.layer_decay" not in found


def test_length_and_batch_follow_the_number_of_pairs() -> None:
    assert epochs_for(6000, 9) == 9
    assert [epochs_for(n, 9) for n in (20, 1500, 24_000, 10**7)] == [24, 18, 4, 1]
    assert [batch_for(n) for n in (10, 18, 90, 100, 2048, 10**6)] == [2, 2, 10, 12, 256, 256]
    few = said(choose(replace(JOINT, pairs=90, held_out=10)))
    assert few["schedule.batch_size"] == 10
    assert few["evaluation.every"] == 0.05


def test_what_the_user_says_wins() -> None:
    own = {"optimizer.lr": 1e-3, "schedule.epochs": 2, "data.text": {}}
    found = said(choose(replace(APART, said=own)))
    assert not {"optimizer.lr", "schedule.epochs", "data.text.pool"} & found.keys()
    assert found["evaluation.every"] == 0.25  # of two epochs, not of the rule's own
    assert said(choose(replace(APART, said={"schedule.pairs_seen": 54_000})))["evaluation.every"] == 0.1


@pytest.mark.parametrize("own", [{"model.text.tune": "lora"}, {"engine.shard": True}])
def test_what_does_not_go_with_the_users_choice_is_left_out(own: dict[str, Any]) -> None:
    given = [override(path, value) for path, value in own.items()]
    for facts, init in ((JOINT, ["model.init=x"]), (APART, ["model.image.init=x", "model.text.init=y"])):
        found = choose(replace(facts, said=own))
        assert "evaluation.interpolate" not in said(found)
        load_recipe("clip", [*(choice.override for choice in found), *given, *init])


def test_without_held_out_pairs_nothing_is_chosen_by_them() -> None:
    found = said(choose(replace(JOINT, held_out=0, splits=False)))
    assert not {name for name in found if name.startswith("evaluation.") or name == "data.holdout_by"}
    assert said(choose(replace(JOINT, splits=False))).keys() >= {"evaluation.every", "evaluation.interpolate"}


def test_copies_are_looked_for_where_that_is_possible() -> None:
    assert said(choose(JOINT))["data.holdout_by"] == "picture"
    plan = choose(replace(JOINT, by_picture=False))
    assert next(choice for choice in plan if choice.path == "data.holdout_by").reason.startswith("too many pairs")
    assert said(plan)["data.holdout_by"] == "key"


def test_minutes_shorten_the_run_and_never_make_it_longer() -> None:
    slow = replace(JOINT, minutes=10.0, speed=Speed(3.0, 1.0, 256))
    found = choose(slow)
    epochs, scores = said(found)["schedule.epochs"], round(1 / said(found)["evaluation.every"])
    assert epochs < epochs_for(5400, 9)
    steps = epochs * 5400 / 256
    assert 0.85 * 600 < steps * 3.0 + (scores + 11 + 4) * 1.0 < 600  # eleven mixtures, and judging after
    late = said(choose(replace(slow, spent=300.0)))["schedule.epochs"]
    assert epochs - late == pytest.approx(100 * 256 / 5400, rel=0.02)
    assert "--minutes 10" in next(choice for choice in found if choice.path == "schedule.epochs").reason
    fast = replace(JOINT, minutes=10.0, speed=Speed(0.001, 0.01, 256))
    assert said(choose(fast)) == said(choose(JOINT))
    costly = replace(APART, minutes=10.0, speed=Speed(1.0, 60.0, 256))
    assert said(choose(costly))["evaluation.every"] == 1.0
    with pytest.raises(InputError, match=r"--minutes 0\.01 leaves no time to train: 0 s are gone, a step takes 3 s"):
        choose(replace(slow, minutes=0.01))


def test_too_few_pairs_are_said() -> None:
    with pytest.raises(InputError, match=r"There are 19 pairs, too few .* needs 20 at least"):
        choose(replace(JOINT, pairs=17, held_out=2))
    choose(replace(JOINT, pairs=18, held_out=2))


def test_overrides_are_toml() -> None:
    for value in ("a 'b' \"c\" ä\n", ["x", "y"], True, 1e-5, 3, None):
        changed = load_recipe("clip", [override("about", value)]).about if isinstance(value, str) else value
        assert changed == value
    assert Choice("optimizer.lr", 1e-5, "").override == "optimizer.lr=1e-05"
    assert load_recipe("clip", [override("data.train", ["x's", "y"])]).data.train == ["x's", "y"]
