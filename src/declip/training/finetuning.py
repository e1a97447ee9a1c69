"""The rules of `declip finetune`: from what is known of the weights and the pairs to how they are tuned, and why.

All numbers stand at the top; `choose` is a pure function of the facts. What a user says wins over every rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from declip.architecture import IMAGENET
from declip.errors import InputError
from declip.memory import GB
from declip.training.estimate import TIMED, WARM_UP
from declip.training.plan import Choice, Facts, Plan


@dataclass(frozen=True)
class Way:
    """How towers are tuned.

    epochs: passes over AT_PAIRS training pairs
    last: which share of a tower's layers learns where all would take too long, on few pairs; None: all learn always
    lr: of towers that start from weights; image_lr: of the image tower, where another; projection_lr: of projections
    that start at random (None: as their tower); random_lr: of a tower that starts at random
    start_decay, interpolate: back to the start; plain_views: no changes of colours; pool: of several captions
    smaller_views: than the images that the tower judges, where it takes any size; mix: pictures, as `data.mix` says
    logit_scale_init: as `model` has it
    ema: average of the weights; frozen_norms: batch norms keep their statistics
    two_captions: of each picture in a step, where all layers learn
    """

    epochs: float
    lr: float
    layer_decay: float
    last: Mapping[str, float] | None = None
    image_lr: float | None = None
    projection_lr: float | None = None
    plain_views: bool = False
    smaller_views: bool = False
    mix: float = 0.0
    logit_scale_init: float | None = None
    ema: float = 0.0
    frozen_norms: bool = False
    two_captions: bool = False
    random_lr: float = 1e-3
    start_decay: float = 0.0
    interpolate: bool = False
    pool: str = "random"
    embed_dim: int = 512
    why: Mapping[str, str] = field(default_factory=dict)


JOINT = Way(
    epochs=9,
    lr=1e-5,
    layer_decay=0.75,
    start_decay=1.0,
    interpolate=True,
    why={
        "tune": "image and text share a space already: small steps in all layers fit it to these pairs",
        "lr": "low, so that what the model knows is bent and not broken",
        "layer_decay": "lower layers see edges and word pieces, which these pairs change least",
    },
)
APART = Way(
    epochs=24,
    lr=3e-4,
    layer_decay=0.8,
    last={"image": 1 / 3, "text": 1 / 2},
    image_lr=6e-4,
    projection_lr=1e-3,
    plain_views=True,
    smaller_views=True,
    mix=0.3,
    logit_scale_init=2.3,
    ema=0.98,
    frozen_norms=True,
    two_captions=True,
    pool="turn",
    why={
        "tune": "the towers have never met, and all their layers have something to learn for a space that both share",
        "last": "the top moves for a space that both share; what the rest gives is computed once and kept",
        "lr": "for towers that have learnt already, a third of what the new projections get",
        "image_lr": "pictures are further from captions than captions are",
        "plain_views": "the towers know colours already, and captions name them",
        "layer_decay": "lower layers know pictures and words already",
    },
)

VIEW_SHARE, VIEW_STEP = 6 / 7, 32  # of the judged images' side, to a multiple of so many pixels
SIDES = 0.01  # share of captions that name a side, from which pictures are not mirrored
TWO = 1.9  # captions an image, from which there are two for nearly all
FEW = 50_000
"""Training pairs up to which the last layers of two towers alone may learn: what the others give is kept on disk."""
ENOUGH = 1 / 4
"""Share of the epochs that has to fit into the user's minutes for all layers to learn."""
VIEWS = 4
"""Views of an image that are kept of a tower whose last layers learn, where there is time."""
VIEW, CAPTION, LAST_LAYERS = 0.11, 0.02, 0.17
"""What keeping a view or a caption takes, and a pair in a step of the last layers, of a pair's time where all learn."""
LEAST_PAIRS = 20
"""Pairs below which nothing can be learnt and judged."""
IMAGENET_CLASSES = 1_000  # classifiers of so many classes are ImageNet's
BATCH, BATCH_SHARE = 256, 8  # largest batch; otherwise one of so many parts of the training pairs
STEPS = 150  # of the last layers, below which each takes half of BATCH at most: so more fit into the minutes
AT_PAIRS, POWER = 6_000, 0.5  # a way's epochs are for so many pairs; fewer for more, by this power of their ratio
MOST_EPOCHS, LEAST_EPOCHS = 24, 1
WEIGHT_DECAY = 0.1
MEMORY = 0.7  # share of what is free that a step may take: loaders, and what falls between freed blocks, take the rest
PATIENCE = 5  # held-out scores without a better one
SCORES = (4, 20)  # fewest and most held-out scores of a run
MIXTURES = 11  # that interpolation scores after the last step
USED = 0.9  # of the time that the user gives
LAST = 10  # seconds of it for what opens the finished model and writes the report
AFTER = 4  # held-out scores' time that judging the finished model takes, in float32 and anew
JUDGED = 0.1  # of that time at most for held-out scores


def choose(facts: Facts) -> Plan:
    """What the recipe shall say, in the order of a table; nothing of what `facts.said` says already.

    Raises InputError where there are too few pairs, or too little time for a single step.
    """
    check_enough(facts.pairs + (facts.held_out if facts.splits else 0))
    way = JOINT if facts.joint else APART
    plan = [*_of_pairs(facts), *_of_towers(facts, way), *_of_views(facts, way)]
    plan += [*_of_rates(facts, way), *_of_length(facts, way)]
    return [choice for choice in plan if not _is_said(choice.path, facts.said)]


def check_enough(pairs: int) -> None:
    """Raises InputError where there are too few pairs to learn from and to judge by."""
    if pairs < LEAST_PAIRS:
        raise InputError(
            f"There are {pairs} pairs, too few to learn from and to judge by: fine-tuning needs {LEAST_PAIRS} at "
            "least, and some hundreds to be of use."
        )


def epochs_for(pairs: int, at_pairs: float) -> float:
    """Passes over so many training pairs: `at_pairs` over AT_PAIRS, more over fewer, fewer over more.

    By the root of the ratio: a short run over few pairs is too few steps, a long one learns them by heart.
    """
    found: float = at_pairs * (AT_PAIRS / pairs) ** POWER
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, round(found) if found >= 3 else round(found, 1)))


def batch_for(pairs: int) -> int:
    """Pairs of a step; even, so that they can be mixed two by two."""
    return max(2, min(BATCH, pairs // BATCH_SHARE) // 2 * 2)


def view_size_for(image_size: int) -> int:
    """Side of the training views of a tower that judges images of `image_size`; the same where that is small."""
    return min(image_size, max(VIEW_STEP, VIEW_STEP * round(VIEW_SHARE * image_size / VIEW_STEP)))


def _is_said(path: str, said: Mapping[str, Any]) -> bool:
    """Whether the user says it: by its path or by that of a section around it."""
    parts = path.split(".")
    return any(".".join(parts[:length]) in said for length in range(1, len(parts) + 1))


def _of_pairs(facts: Facts) -> Iterator[Choice]:
    if not facts.splits:
        return
    if facts.by_picture:
        yield Choice("data.holdout_by", "picture", "copies stay on one side: no picture is judged that was trained on")
    else:
        yield Choice("data.holdout_by", "key", "too many pairs to look at every picture: copies may be on both sides")


def _of_towers(facts: Facts, way: Way) -> Iterator[Choice]:
    yield Choice(
        "terms.contrastive.weight", 1.0, "picture against caption alone: what the towers see they know already"
    )
    for tower in ("image", "text"):
        if tower in facts.random:
            continue
        layers = facts.layers.get(tower, 0)
        if not is_short(facts) or way.last is None or layers < 2:
            yield Choice(f"model.{tower}.tune", "all", way.why["tune"])
            continue
        why = f"--minutes {facts.minutes:g} are too few for all layers: {way.why['last']}"
        yield Choice(f"model.{tower}.tune", "last", why)
        count = max(1, round(way.last[tower] * layers))
        yield Choice(f"model.{tower}.tune_layers", count, f"of {layers}")
        if tower == "image" and (views := _views_kept(facts)):
            why = "as many as are each seen twice at least" if views < VIEWS else "each is seen in several epochs"
            yield Choice("model.image.views_kept", views, why)
    if not facts.joint:
        own = facts.embed_dim is not None
        why = "the projection that comes with the weights" if own else "wide enough for towers of any usual size"
        yield Choice("model.embed_dim", facts.embed_dim or way.embed_dim, why)
        if facts.classes == IMAGENET_CLASSES and facts.sides is not None:  # captions in English, as the names are
            why = "what the image tower knows has names, which the text tower knows: they meet before the first pair"
            yield Choice("model.image.classes", IMAGENET, why)
    if way.logit_scale_init is not None:
        why = "a factor of 10 on similarities, where open_clip starts at 14: few pairs are learnt by heart less soon"
        yield Choice("model.logit_scale_init", way.logit_scale_init, why)
    if way.frozen_norms and facts.batch_norms and "image" not in facts.random:
        why = "statistics of the pictures that the weights come from, which were far more"
        yield Choice("model.freeze_batch_norm", True, why)


def _of_views(facts: Facts, way: Way) -> Iterator[Choice]:
    view_size = view_size_for(facts.image_size)
    if way.smaller_views and facts.any_size and view_size < facts.image_size:
        why = f"crops show things larger than the images of {facts.image_size} px do that it then judges"
        yield Choice("data.view_size", view_size, why)
    # Two by two; and of terms, not all but the rules' own know mixed pictures.
    if way.mix and not _own_terms(facts.said) and facts.said.get("schedule.batch_size", 2) % 2 == 0:
        yield Choice("data.mix", way.mix, "what lies between two pictures cannot be learnt by heart: more epochs pay")
    if way.plain_views:
        yield Choice("data.images.jitter", 0.0, way.why["plain_views"])
    if facts.sides is not None:
        few = facts.sides < SIDES
        yield Choice(
            "data.images.flip",
            0.5 if few else 0.0,
            f"{facts.sides:.1%} of the captions name left or right, east or west",
        )
    if facts.captions > 1:
        several = f"{facts.captions:.1f} captions an image: "
        if way.two_captions and facts.captions >= TWO and _can_see_two(facts):
            yield Choice("terms.contrastive.texts", ["caption", "augmented"], several + "two in each step say more")
            for change in ("synonym", "swap", "deletion"):
                yield Choice(f"data.text.{change}", 0.0, "the second is another caption, not a changed one")
        turn = several + ("each is seen equally often" if way.pool == "turn" else "one is drawn each time")
        yield Choice("data.text.pool", way.pool, turn)


def _of_rates(facts: Facts, way: Way) -> Iterator[Choice]:
    yield Choice("optimizer.lr", way.lr, way.why["lr"])
    if way.projection_lr is not None:
        yield Choice("optimizer.projection_lr", way.projection_lr, "neither projection has learnt anything yet")
    if way.image_lr is not None and "image" not in facts.random:
        yield Choice("optimizer.image_lr", way.image_lr, way.why["image_lr"])
    for tower in facts.random:
        yield Choice(f"optimizer.{tower}_lr", way.random_lr, f"the {tower} tower starts at random")
    if not facts.random:  # a tower that starts at random has to learn in its lowest layers too
        yield Choice("optimizer.layer_decay", way.layer_decay, way.why["layer_decay"])
    yield Choice("optimizer.lr_batch", BATCH, f"rates are for {BATCH} pairs a step, and lowered for fewer")
    yield Choice("optimizer.weight_decay", WEIGHT_DECAY, "few pairs are learnt by heart without")
    if way.ema and _is_whole(facts):
        why = "held-out scores of an average of the last steps say sooner how good the end will be"
        yield Choice("optimizer.ema", way.ema, why)
    if _is_whole(facts) and way.start_decay:
        yield Choice(
            "optimizer.start_decay", way.start_decay, "what these pairs do not ask for stays as it was (L2-SP)"
        )
    if _mixes(facts, way):
        yield Choice(
            "evaluation.interpolate",
            True,
            "start and end are mixed as does best on the held-out pairs, so that less is forgotten (WiSE-FT)",
        )


def _own_terms(said: Mapping[str, Any]) -> bool:
    """Whether the user or the recipe says which terms there are."""
    return not all(path.startswith("terms.contrastive.") for path in said if path.partition(".")[0] == "terms")


def _can_see_two(facts: Facts) -> bool:
    """Whether two captions of a picture may be seen: the terms are ours, and nothing of the text tower is kept."""
    whole = facts.said.get("model.text.tune", "last" if is_short(facts) else "all") == "all"
    return whole and not _own_terms(facts.said)


def may_be_short(facts: Facts) -> bool:
    """Whether the time that all layers take decides about which of them learn."""
    asked = all(_is_said(f"model.{tower}.tune", facts.said) for tower in ("image", "text"))
    return facts.minutes is not None and not facts.joint and not facts.random and facts.pairs <= FEW and not asked


def passes_in(facts: Facts, pair_seconds: float) -> float:
    """Epochs of all layers, with which a pair takes so many seconds, that fit into the user's minutes."""
    batch: int = facts.said.get("schedule.batch_size", batch_for(facts.pairs))
    seconds = (1 - JUDGED) * (_left(facts) - (WARM_UP + TIMED) * pair_seconds * batch)
    return seconds / (pair_seconds * facts.pairs)


def is_short(facts: Facts) -> bool:
    """Whether the user's minutes are too few for all layers."""
    wanted = _said_epochs(facts) or epochs_for(facts.pairs, APART.epochs)
    return facts.passes is not None and facts.passes < ENOUGH * wanted


def _views_kept(facts: Facts) -> int:
    """Views of an image that are kept of what rests of its tower: few enough that the epochs left see each twice."""
    if not facts.views_alike:
        return 0
    return next((views for views in range(VIEWS, 1, -1) if _epochs_left(facts, views) >= 2 * views), 1)


def _epochs_left(facts: Facts, views: int) -> float:
    """Of the last layers, once so many views of each image, and its captions, have gone through what rests.

    Where no views are kept, one goes through it in each epoch.
    """
    assert facts.passes is not None
    left = facts.passes - VIEW * views - CAPTION * facts.captions
    return left / (LAST_LAYERS if views else LAST_LAYERS + VIEW)


def _batch(facts: Facts) -> int:
    """Pairs of a step; half of BATCH at most where the user's minutes leave few steps of the last layers."""
    batch = batch_for(facts.pairs)
    if not is_short(facts) or _epochs_left(facts, _views_kept(facts)) * facts.pairs / batch >= STEPS:
        return batch
    return min(batch, BATCH // 2)


def _is_whole(facts: Facts) -> bool:
    """Whether each process holds all weights: nothing else can average them or go back to their start."""
    return not facts.said.get("engine.shard")


def _mixes(facts: Facts, way: Way) -> bool:
    adapted = "lora" in (facts.said.get("model.image.tune"), facts.said.get("model.text.tune"))
    return way.interpolate and _is_whole(facts) and facts.held_out > 0 and not adapted


def _of_length(facts: Facts, way: Way) -> Iterator[Choice]:
    batch = _batch(facts)
    why = f"fewer than {BATCH}, so that an epoch has {BATCH_SHARE} steps at least"
    if batch < batch_for(facts.pairs):
        why = f"--minutes {facts.minutes:g} leave few steps: more of fewer pairs learn more"
    yield Choice("schedule.batch_size", batch, "as many pairs to tell apart as usual" if batch == BATCH else why)
    yield from _of_memory(facts, way, facts.said.get("schedule.batch_size", batch))
    epochs = _said_epochs(facts) or epochs_for(facts.pairs, way.epochs)
    why = f"for {facts.pairs:,} pairs"
    fewest, most = SCORES
    scores = min(most, max(fewest, ceil(epochs))) if facts.held_out else 0
    if facts.minutes is not None and facts.speed is not None and not _said_epochs(facts):
        within, scores = _within(facts, way, scores)
        if within < epochs:
            why += f" it would be {epochs:g}, but --minutes {facts.minutes:g} allow so many"
            epochs = within
    if "schedule.pairs_seen" not in facts.said:
        yield Choice("schedule.epochs", epochs, why)
    if not facts.held_out:
        return
    yield Choice(
        "evaluation.every",
        round(1 / max(1, scores), 4),
        "one held-out score" if scores == 1 else f"{scores} held-out scores in the run",
    )
    if scores > PATIENCE:
        yield Choice("evaluation.patience", PATIENCE, f"stop after {PATIENCE} scores without a better one")


def _of_memory(facts: Facts, way: Way, batch: int) -> Iterator[Choice]:
    """A batch in pieces where it is too large for the memory at once, and that computes the same."""
    frozen = facts.said.get("model.freeze_batch_norm", way.frozen_norms and "image" not in facts.random)
    if facts.pair_bytes is None or facts.free_bytes is None or is_short(facts) or (facts.batch_norms and not frozen):
        return
    wanted, there = batch * facts.pair_bytes, MEMORY * facts.free_bytes
    if wanted > there and not facts.said.get("engine.compile"):
        why = f"{batch} pairs at once would take {wanted / GB:.3g} GB of memory, {facts.free_bytes / GB:.3g} are free"
        yield Choice("engine.micro_batch", max(1, int(batch * there / wanted)), why)


def _said_epochs(facts: Facts) -> float | None:
    """Passes that the user asks for; None where nothing is said."""
    if seen := facts.said.get("schedule.pairs_seen"):
        return float(seen / facts.pairs)
    said: float | None = facts.said.get("schedule.epochs")
    return said


def _left(facts: Facts) -> float:
    """Seconds that are left to time steps, to train and to judge."""
    assert facts.minutes is not None
    return USED * 60 * facts.minutes - LAST - facts.spent


def _within(facts: Facts, way: Way, scores: int) -> tuple[float, int]:
    """Epochs, and held-out scores of `scores` at most, for which the user's minutes are enough."""
    assert facts.speed is not None
    speed = facts.speed
    seconds = _left(facts) - AFTER * speed.seconds_per_score
    mixtures = MIXTURES if facts.said.get("evaluation.interpolate", _mixes(facts, way)) else 0
    if scores and speed.seconds_per_score:
        scores = max(1, min(scores, int(JUDGED * seconds / speed.seconds_per_score) - mixtures))
    steps = int((seconds - (scores + mixtures * bool(scores)) * speed.seconds_per_score) / speed.seconds_per_step)
    if steps < 1:
        raise InputError(
            f"--minutes {facts.minutes:g} leaves no time to train: {facts.spent:.0f} s are gone, a step takes "
            f"{speed.seconds_per_step:.2g} s and a held-out score {speed.seconds_per_score:.2g} s; give more, or leave "
            "it out."
        )
    return float(f"{steps * speed.batch_size / facts.pairs:.3g}"), scores
