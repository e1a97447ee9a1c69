"""Runs that do not forget the classes that the image tower's own classifier saw in the pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_one_broken
from stopping import stop_after

import declip
from declip.data.decode import decode_image
from declip.data.images import eval_view
from declip.errors import InputError
from declip.model.export import read_weights
from declip.ranks import Ranks
from declip.recipe import Recipe, load_recipe
from declip.training import class_scores, teacher
from declip.training.estimate import estimate
from declip.training.loop import batch_maker, set_up

pytestmark = pytest.mark.usefixtures("cache")

Make = Callable[..., Recipe]


@pytest.fixture
def make(four_classes: list[str], pairs: Path) -> Make:
    """Two pretrained towers on the 40 pairs, with the term; eight steps."""
    usual = [f"data.train={str(pairs)!r}", "data.workers=0", "schedule.batch_size=8", "schedule.pairs_seen=64"]
    usual += ["engine.device=cpu", "engine.precision=float32", "terms.class_names.weight=1"]
    return lambda *overrides: load_recipe("clip", [*usual, *four_classes, *overrides])


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["terms"]["class_names"] for row in rows if "terms" in row]


def test_what_the_classifier_sees(make: Make, tmp_path: Path) -> None:
    """The same as timm's own network sees, of the classes that it sees most."""
    import timm

    recipe = make("terms.class_names.classes=3")
    run = set_up(recipe, tmp_path / "run", False, Ranks())
    network = timm.create_model("resnet10t.c3_in1k", num_classes=len(CLASSES)).eval()
    network.load_state_dict(read_weights(Path(str(recipe.model.image.init))))
    source = run.images.source
    views = np.stack([eval_view(decode_image(source[index].image), 64) for index in range(len(source))])
    with torch.no_grad():
        expected = network(run.model.pixels(torch.from_numpy(views))).softmax(-1)
    most = sorted(expected.sum(0).topk(3).indices.tolist())
    batch = batch_maker(run).make(0)
    assert batch.class_scores is not None
    torch.testing.assert_close(batch.class_scores, expected[batch.sample_ids][:, most], rtol=2e-3, atol=1e-4)
    named = run.model.token_ids([f"a photo of a {CLASSES[place]}" for place in most])
    assert batch.class_tokens is not None
    assert torch.equal(batch.class_tokens, named)
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.model(batch).class_text, run.model.clip.encode_text(named))


@pytest.mark.parametrize("tune", ["all", "last", "projection"])
def test_it_is_learnt_and_kept_once(tune: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    embed = class_scores.embed_source
    monkeypatch.setattr(class_scores, "embed_source", lambda *args: seen.append(args[0]) or embed(*args))
    resting = [f"model.{tower}.{field}" for tower in ("image", "text") for field in (f"tune={tune}", "tune_layers=1")]
    recipe = make("optimizer.lr=3e-3", "schedule.pairs_seen=320", "data.mix=0.3", *resting)
    declip.train(recipe, tmp_path / "run", quiet=True)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.97 * found[0]
    declip.train(recipe, tmp_path / "again", quiet=True)
    assert losses(tmp_path / "again") == found
    assert len(seen) == 1


def test_the_start_as_a_teacher_is_asked_once(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the random projections of its copy, which nobody asks."""
    seen = []
    embed = teacher.embed_source
    monkeypatch.setattr(teacher, "embed_source", lambda *args: seen.append(args[0]) or embed(*args))
    for again in range(2):
        torch.manual_seed(again)
        set_up(
            make("terms.class_names.weight=0", "terms.distillation.teacher=start", f"seed={again}"),
            tmp_path / str(again),
            False,
            Ranks(),
        )
    assert len(seen) == 1


def test_a_run_goes_on_as_if_it_had_not_stopped(make: Make, tmp_path: Path) -> None:
    declip.train(make(), tmp_path / "whole", quiet=True)
    stop_after(make(), tmp_path / "stopped", 4)
    declip.train(make(), tmp_path / "stopped", resume=True, quiet=True)
    assert losses(tmp_path / "stopped")[-1] == losses(tmp_path / "whole")[-1]


def test_an_unreadable_image_is_of_no_class(make: Make, tmp_path: Path) -> None:
    write_one_broken(tmp_path / "pairs.parquet")
    recipe = make("data.holdout=0", "data.broken_limit=0.1", "schedule.pairs_seen=40")
    assert declip.train(recipe, tmp_path / "run", quiet=True)["broken"] == 1
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_an_estimate_asks_nobody_unless_told(make: Make, cache: Path) -> None:
    assert estimate(make())["steps"] == 8
    assert not (cache / "declip" / "files").exists()
    assert estimate(make(), keep=True)["steps"] == 8
    assert len(list((cache / "declip" / "files").glob("*classes*"))) == 1


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("model.image.classes=none", "terms.class_names needs names: say model.image.classes"),
        ("model.image.classes=imagenet", "has 1,000 names, and the classifier that comes with .* has 4 classes"),
        ("terms.class_names.classes=1", "terms.class_names.classes"),
    ],
)
def test_what_is_refused(added: str, message: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        declip.train(make(added), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
