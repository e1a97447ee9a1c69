"""Runs that learn from a teacher: a model of another width and other pixels, a file of embeddings, their own start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_one_broken
from safetensors.numpy import save_file
from stopping import stop_after

import declip
from declip.data.sources import open_sources
from declip.errors import InputError
from declip.pairs import Data
from declip.ranks import Ranks
from declip.recipe import Recipe
from declip.training.estimate import estimate
from declip.training.loop import batch_maker, set_up

pytestmark = pytest.mark.usefixtures("cache")

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def teacher(tiny: MakeRecipe, tmp_path: Path) -> Path:
    """A finished run with other pixels, another size and another width."""
    recipe = tiny("clip", "model.embed_dim=24", "model.image.image_size=24", "model.normalization=half", "seed=5")
    declip.train(recipe, tmp_path / "teacher", quiet=True)
    return tmp_path / "teacher"


def term(teacher: Path | str, *options: str) -> list[str]:
    return [f"terms.distillation.teacher={str(teacher)!r}", *(f"terms.distillation.{option}" for option in options)]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["terms"]["distillation"] for row in rows if "terms" in row]


def test_a_model_teaches(teacher: Path, tiny: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny("clip", *term(teacher, "weight=5"), "optimizer.lr=0.01", "schedule.pairs_seen=320")
    run = set_up(recipe, tmp_path / "looked-at", False, Ranks())
    batch = batch_maker(run).make(0)
    model, source = declip.load(teacher), run.images.source
    expected = model.encode_image([run.images.get(index) for index in batch.sample_ids.tolist()])
    assert batch.teacher_images is not None
    assert batch.teacher_texts is not None
    torch.testing.assert_close(batch.teacher_images, expected, rtol=1e-2, atol=2e-3)
    ids = [model.encode_text(list(source.captions(index))) for index in batch.sample_ids.tolist()]
    for row, own in zip(batch.teacher_texts, ids, strict=True):
        assert ((own - row).abs().amax(-1) < 2e-3).any()
    declip.train(recipe, tmp_path / "run", quiet=True)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.8 * found[0]
    heads = declip.model.export.read_open_clip_folder(tmp_path / "run").head("distillation")
    assert heads["image.weight"].shape == (24, 16)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_file_teaches(held_out: bool, tiny: MakeRecipe, tmp_path: Path) -> None:
    """With rows for the training pairs alone, or for all pairs of data.train."""
    looked_at = set_up(tiny("clip"), None, False, Ranks()).images.source
    whole = open_sources(tiny("clip").data.train, Data())
    source = whole if held_out else looked_at
    place = {source.key(index): index for index in range(len(source))}
    images = np.random.default_rng(0).standard_normal((len(source), 5)).astype(np.float32)
    counts = [len(source.captions(index)) for index in range(len(source))]
    texts = np.random.default_rng(1).standard_normal((sum(counts), 5)).astype(np.float32)
    save_file({"images": images, "texts": texts}, tmp_path / "both.safetensors")
    recipe = tiny("clip", *term(tmp_path / "both.safetensors"))
    run = set_up(recipe, tmp_path / "looked-at", False, Ranks())
    batch = batch_maker(run).make(0)
    assert batch.teacher_images is not None
    assert batch.teacher_texts is not None
    rows = [place[run.images.source.key(index)] for index in batch.sample_ids.tolist()]
    np.testing.assert_allclose(batch.teacher_images, unit(images[rows]), atol=1e-3)
    starts = np.cumsum([0, *counts])
    for row, said in zip(rows, batch.teacher_texts, strict=True):
        own = unit(texts[starts[row] : starts[row + 1]])
        assert (np.abs(own - said.numpy()).max(-1) < 1e-3).any()
    declip.train(recipe, tmp_path / "run", quiet=True)
    # With keys, in any order.
    order = np.random.default_rng(2).permutation(len(source))
    keys = np.array([source.key(int(index)) for index in order])
    text_rows = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in order])
    np.savez(tmp_path / "keyed.npz", images=images[order], texts=texts[text_rows], keys=keys)
    other = batch_maker(set_up(tiny("clip", *term(tmp_path / "keyed.npz")), tmp_path / "other", False, Ranks())).make(0)
    assert other.teacher_images is not None
    assert other.teacher_texts is not None
    assert torch.equal(other.teacher_images, batch.teacher_images)
    assert torch.equal(other.teacher_texts, batch.teacher_texts)


def unit(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def test_the_start_teaches(tiny: MakeRecipe, tmp_path: Path) -> None:
    declip.train(tiny("clip"), tmp_path / "start", quiet=True)
    init = [f"model.init={str(tmp_path / 'start')!r}", "data.images.crop_scale=[1.0,1.0]", "data.images.flip=0"]
    rate = ["optimizer.lr=0.01", "schedule.pairs_seen=160", "engine.explosion=0"]  # a weight of 30 begins with a jump
    ends = {}
    for weight in (0.01, 30.0):
        recipe = tiny("clip", *init, *rate, *term("start", f"weight={weight}"))
        declip.train(recipe, tmp_path / str(weight), quiet=True)
        found = losses(tmp_path / str(weight))
        assert found[0] < 0.02  # at first it is what it was, but for the view
        ends[weight] = found[-1]
    assert ends[30.0] < 0.5 * ends[0.01]


def test_what_is_kept_of_a_teacher_is_of_its_weights(
    teacher: Path, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    embed = declip.training.teacher.embed_source
    monkeypatch.setattr(
        declip.training.teacher, "embed_source", lambda *args: asked.append(args[0].name) or embed(*args)
    )
    recipe = tiny("clip", *term(teacher))
    for again in range(2):
        declip.train(recipe, tmp_path / f"run{again}", quiet=True)
    assert len(asked) == 1
    declip.train(
        tiny("clip", "model.embed_dim=24", "model.image.image_size=24", "seed=6"), tmp_path / "other", quiet=True
    )
    (teacher / "open_clip_model.safetensors").write_bytes(
        (tmp_path / "other" / "open_clip_model.safetensors").read_bytes()
    )
    declip.train(recipe, tmp_path / "run2", quiet=True)
    assert len(asked) == 2


def test_an_unreadable_image_has_no_teacher(teacher: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    write_one_broken(tmp_path / "pairs.parquet")
    recipe = tiny("clip", *term(teacher), "data.holdout=0", "data.broken_limit=0.1", "schedule.pairs_seen=40")
    assert declip.train(recipe, tmp_path / "run", quiet=True)["broken"] == 1
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_a_run_goes_on_as_if_it_had_not_stopped(teacher: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("clip", *term(teacher))
    declip.train(recipe, tmp_path / "whole", quiet=True)
    stop_after(recipe, tmp_path / "stopped", 4)
    declip.train(recipe, tmp_path / "stopped", resume=True, quiet=True)
    assert losses(tmp_path / "stopped")[-1] == losses(tmp_path / "whole")[-1]


def test_a_dry_run_asks_no_teacher(teacher: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    run = set_up(tiny("clip", *term(teacher)), None, False, Ranks(), keep=False)
    batch = batch_maker(run).make(0)
    assert batch.teacher_images is not None
    assert batch.teacher_images.shape == (8, 24)
    assert not (tmp_path / "cache" / "declip" / "files").exists()


def test_steps_are_timed_with_what_the_teacher_says(teacher: Path, tiny: MakeRecipe) -> None:
    assert estimate(tiny("clip", *term(teacher)), keep=True)["steps"] == 8


def write(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "teacher.npz", **arrays)  # type: ignore[arg-type]
    return str(folder / "teacher.npz")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"texts": np.zeros((64, 3), np.float32)}, "has no images"),
        ({"images": np.zeros((31, 3), np.float32)}, "has images for 31 pairs, but .* has 40, 32 of them to train on"),
        ({"images": np.ones((2, 3), np.float32), "keys": np.array(["x", "x"])}, "several are 'x'"),
        ({"images": np.ones((2, 3), np.float32), "keys": np.array(["x"])}, "keys must be 2 strings"),
        ({"images": np.zeros((32, 3), np.float32), "texts": np.zeros((9, 3), np.float32)}, "texts for 9 captions"),
        ({"images": np.zeros((32, 3), np.float32), "texts": np.zeros((64, 4), np.float32)}, "different widths"),
        ({"images": np.zeros(32, np.float32)}, "images is no matrix"),
        ({"images": np.zeros((32, 3), np.int64)}, "images is no matrix of floating-point"),
        ({"images": np.ones((1, 3), np.float32), "keys": np.array(["x"])}, "keys has 'x', which is no pair"),
        ({"images": np.array([{"a": 1}])}, "cannot be read"),
    ],
)
def test_bad_files(arrays: dict[str, np.ndarray], says: str, tiny: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        declip.train(tiny("clip", *term(write(tmp_path, **arrays))), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_who_cannot_teach(tiny: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tower that learns starts from weights"):
        declip.train(tiny("clip", *term("start")), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="There is no model 'nobody'"):
        declip.train(tiny("clip", *term("nobody")), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="there is no file"):
        declip.train(tiny("clip", *term(tmp_path / "none.npz")), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match="features and similarities are both 0"):
        tiny("clip", *term("nobody", "features=0", "similarities=0"))
    filip = tiny("clip", "terms.contrastive=none", "terms.token_wise.dim=8", "seed=1")
    declip.train(filip, tmp_path / "filip", quiet=True)
    with pytest.raises(InputError, match="compares tokens and gives no embeddings"):
        declip.train(tiny("clip", *term(tmp_path / "filip")), tmp_path / "run", quiet=True)
