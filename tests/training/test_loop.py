"""Tiny runs from end to end."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from declip.data.sources import open_sources
from declip.data.tokenizer import Tokenizer
from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.model.export import WEIGHTS
from declip.model.pretrained import load
from declip.recipe import Recipe, load_recipe
from declip.training import loop
from declip.training.held_out import HeldOut, score_error
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.pairs import open_pairs, total_steps, used_tokens
from declip.training.step import autocast

MakeRecipe = Callable[..., Recipe]
TIMING = ("seconds", "samples_per_second", "data_wait")


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def scores(monkeypatch: pytest.MonkeyPatch, values: list[float], error: float = 0.0) -> None:
    """The held-out scores that the run will see, whatever it learns."""
    left = iter(values)
    monkeypatch.setattr(HeldOut, "score", lambda *_: {"text_to_image_r1": 1.0, "score": next(left), "error": error})


@pytest.mark.parametrize("method", ["clip", "declip"])
def test_run_folder(tiny: MakeRecipe, tmp_path: Path, method: str) -> None:
    recipe, out = tiny(method), tmp_path / "run"
    summary = train(recipe, out, quiet=True)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and "tensorboard" not in str(path)}
    assert files == {
        "recipe.toml",
        "metrics.jsonl",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "checkpoints/step_00000006.pt",
        "checkpoints/step_00000008.pt",
        "checkpoints/best.safetensors",
    } | ({"declip_heads.safetensors", "checkpoints/best_heads.safetensors"} if method == "declip" else set())
    assert load_recipe(out / "recipe.toml") == recipe

    rows = read_metrics(out)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["step"] for row in rows if "held_out" in row] == [2, 4, 6, 8]
    for row in steps:
        assert row["terms"].keys() == recipe.terms.active().keys()
        weights = {name: term.weight for name, term in recipe.terms.active().items()}  # type: ignore[attr-defined]
        assert row["loss"] == pytest.approx(sum(weights[name] * row["terms"][name] for name in weights), rel=1e-4)
        assert row["pairs"] == 8 * row["step"]
        assert row["lr"] > 0
        assert row["samples_per_second"] > 0
    assert steps[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=0.01)

    assert (summary["run"], summary["recipe"]) == (str(out), method)
    assert (summary["steps"], summary["pairs_seen"], summary["training_pairs"]) == (8, 64, 32)
    assert (summary["broken"], summary["seconds"] > 0, summary["peak_memory_gb"] > 0) == (0, True, True)
    held_out = {row["step"]: row["held_out"] for row in rows if "held_out" in row}
    best = held_out[summary["best_step"]]
    assert summary["held_out_score"] == pytest.approx(best["score"], abs=0.01)
    highest = max(held_out.values(), key=lambda row: row["score"])
    assert best["score"] >= highest["score"] - highest["error"]
    recalls = [f"{way}_r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert best.keys() == {*recalls, "score", "error"}
    assert best["score"] == pytest.approx(sum(best[name] for name in recalls) / 6, abs=0.01)
    assert json.loads(json.dumps(summary)) == summary


def test_loss_falls(tiny: MakeRecipe, tmp_path: Path) -> None:
    train(tiny("clip", "schedule.pairs_seen=480"), tmp_path / "run", quiet=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("workers", [0, 1])
def test_run_repeated_is_the_same(tiny: MakeRecipe, tmp_path: Path, workers: int) -> None:
    for name, options in (("one", []), ("other", [f"data.workers={workers}"])):
        train(tiny("declip", *options), tmp_path / name, quiet=True)
    one, other = (without_timing(read_metrics(tmp_path / name)) for name in ("one", "other"))
    assert one == other
    weights = [load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("one", "other")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_seed_changes_the_run(tiny: MakeRecipe, tmp_path: Path) -> None:
    for seed in (0, 1):
        train(tiny("clip", f"seed={seed}"), tmp_path / str(seed), quiet=True)
    losses = [[row.get("loss") for row in read_metrics(tmp_path / str(seed))] for seed in (0, 1)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", ["clip", "declip"])
def test_bfloat16(tiny: MakeRecipe, tmp_path: Path, method: str) -> None:
    """The towers compute in bfloat16, the terms in float32."""
    for precision in ("float32", "bfloat16"):
        train(tiny(method, f"engine.precision={precision}"), tmp_path / precision, quiet=True)
    exact, rough = (read_metrics(tmp_path / name)[0] for name in ("float32", "bfloat16"))
    assert exact["loss"] != rough["loss"]
    assert exact["terms"] == pytest.approx(rough["terms"], abs=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "bfloat16" / WEIGHTS).values())


def test_attention_on_a_cpu_in_bfloat16_is_made_of_plain_products() -> None:
    for precision, flash in (("float32", True), ("bfloat16", False)):
        with autocast(torch.device("cpu"), precision):
            assert torch.backends.cuda.flash_sdp_enabled() is flash  # CPUs heed this flag too
            assert torch.is_autocast_enabled("cpu") is not flash
    assert torch.backends.cuda.flash_sdp_enabled()


def test_vocabulary_in_use(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("declip", "terms.masked_language.vocabulary=used")
    train(recipe, tmp_path / "run", quiet=True)
    used = used_tokens(recipe, open_sources(recipe.data.train, recipe.data), Tokenizer())
    assert used is not None
    assert 15 < len(used) < 60
    first = read_metrics(tmp_path / "run")[0]
    assert first["terms"]["masked_language"] < math.log(60)


# What the held-out score decides


def test_best_weights_are_kept(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, [10, 30, 20, 29])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    judge = loop.Run.judge

    def note(run: loop.Run, log: Any, loss: float) -> bool:
        kept[run.step] = {name: tensor.clone() for name, tensor in run.model.clip.state_dict().items()}
        return judge(run, log, loss)

    monkeypatch.setattr(loop.Run, "judge", note)
    summary = train(tiny(), tmp_path / "run", quiet=True)
    assert (summary["best_step"], summary["held_out_score"]) == (4, 30)
    found = load_file(tmp_path / "run" / "open_clip_model.safetensors")
    for name, tensor in kept[4].items():
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["visual.proj"], kept[8]["visual.proj"])


@pytest.mark.parametrize(("tolerance", "step"), [(0, 4), (0.5, 6), (1, 8)])
def test_later_weights_that_are_not_surely_worse_are_kept(
    tolerance: float, step: int, tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [20, 30, 29, 28], error=2.0)
    summary = train(tiny("clip", f"evaluation.tolerance={tolerance}"), tmp_path / "run", quiet=True)
    assert (summary["best_step"], summary["held_out_score"]) == (step, {4: 30, 6: 29, 8: 28}[step])
    found = load_file(tmp_path / "run" / "open_clip_model.safetensors")
    last = torch.load(tmp_path / "run" / "checkpoints" / "step_00000008.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, last[f"clip.{name}"]) for name, tensor in found.items()) == (step == 8)


def test_the_error_of_a_score_is_that_of_its_images() -> None:
    """Three images, the first with two captions; beside the naive loop."""
    ranks = {"text_to_image": torch.tensor([0, 7, 3, 20]), "image_to_text": torch.tensor([2, 0, 11])}
    owners = torch.tensor([0, 0, 1, 2])
    each = []
    for image in range(3):
        texts = [float(ranks["text_to_image"][i]) for i in range(4) if owners[i] == image]
        by_text = [sum(rank < k for k in (1, 5, 10)) / 3 for rank in texts]
        by_image = sum(float(ranks["image_to_text"][image]) < k for k in (1, 5, 10)) / 3
        each.append((sum(by_text) / len(by_text) + by_image) / 2)
    expected = 100 * statistics.pstdev(each) / math.sqrt(3)
    assert score_error(ranks, owners) == pytest.approx(expected)


def test_without_held_out_pairs_the_last_weights_count(tiny: MakeRecipe, tmp_path: Path) -> None:
    summary = train(tiny("clip", "data.holdout=0"), tmp_path / "run", quiet=True)
    assert (summary["training_pairs"], summary["held_out_score"]) == (40, None)
    assert not any("held_out" in row for row in read_metrics(tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_00000008.pt", weights_only=True)["model"]
    for name, tensor in load_file(tmp_path / "run" / "open_clip_model.safetensors").items():
        assert torch.equal(tensor, state[f"clip.{name}"]), name


def test_validation_pairs_of_their_own(tiny: MakeRecipe, pairs: Path, tmp_path: Path) -> None:
    summary = train(tiny("clip", f"data.validation={str(pairs)!r}"), tmp_path / "run", quiet=True)
    assert summary["training_pairs"] == 40
    assert summary["held_out_score"] > 0


def test_overfitting_is_said_once(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(monkeypatch, [50 - step for step in range(16)])
    train(tiny("clip", "schedule.pairs_seen=128", "evaluation.every=0.06", "optimizer.lr=3e-3"), tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("Overfitting: the loss still falls") == 1
    assert "has not risen since step 1 (50.0, now 4" in said


def test_rising_score_is_no_overfitting(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(monkeypatch, list(range(16)))
    train(tiny("clip", "schedule.pairs_seen=128", "evaluation.every=0.06"), tmp_path / "run")
    assert "Overfitting" not in capsys.readouterr().err


def test_patience(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(monkeypatch, [10, 30, 20, 29, 29, 28])
    recipe = tiny("clip", "schedule.pairs_seen=128", "evaluation.every=0.125", "evaluation.patience=3")
    summary = train(recipe, tmp_path / "run")
    assert (summary["steps"], summary["best_step"], summary["pairs_seen"]) == (10, 4, 80)
    assert "Stopped at step 10: no better held-out score since step 4." in capsys.readouterr().err
    assert (tmp_path / "run" / "open_clip_model.safetensors").is_file()
    # Going on with a run that has stopped takes no further step.
    assert train(recipe, tmp_path / "run", resume=True, quiet=True)["steps"] == 10


def test_scoring_leaves_the_model_as_it_was(tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny("declip")
    _, held = open_pairs(recipe.data)
    assert held is not None
    torch.manual_seed(0)
    model = DualEncoder(recipe)
    held_out = HeldOut(loop.open_images(held, 1.0, 1.0), recipe, 16, 77, model.tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = held_out.score(model, torch.device("cpu"))
    assert model.training
    assert held_out.score(model.eval(), torch.device("cpu")) == first
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_first_held_out_images_have_their_own_texts(tiny: MakeRecipe) -> None:
    held_out = loop.set_up(tiny(), None, False, loop.Ranks()).held_out
    assert held_out is not None
    whole = len(held_out.images)
    part = held_out.first(3)
    assert (len(held_out.images), len(part.images)) == (whole, 3)
    texts = [held_out.tokens[place] for place, owner in enumerate(held_out.image_of_text.tolist()) if owner < 3]
    assert len(texts) >= 3
    assert torch.equal(part.tokens, torch.stack(texts))
    assert part.image_of_text.unique().tolist() == [0, 1, 2]
    assert part.below is not held_out.below


def test_views_are_smaller_than_the_images_that_it_judges(tiny: MakeRecipe, tmp_path: Path) -> None:
    tower = "model.image={ timm_model_name = 'mnasnet_small', timm_proj = 'linear', image_size = 64 }"
    run = loop.set_up(tiny("clip", tower, "data.view_size=32"), tmp_path / "run", False, loop.Ranks())
    assert loop.batch_maker(run).make(0).images.shape == (1, 8, 32, 32, 3)
    assert run.held_out is not None
    assert run.held_out.images.shape[1:] == (64, 64, 3)
    train(tiny("clip", tower, "data.view_size=32"), tmp_path / "whole", quiet=True)
    assert load(str(tmp_path / "whole")).clip.visual.image_size in (64, (64, 64))


# Length, device, Ctrl-C


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["schedule.pairs_seen=none", "schedule.epochs=2"], 8),
        (["schedule.pairs_seen=none", "schedule.epochs=0.1"], 1),
        (["schedule.pairs_seen=100"], 12),
    ],
)
def test_length(tiny: MakeRecipe, options: list[str], steps: int) -> None:
    assert total_steps(tiny("clip", *options), 32) == steps


def test_device_and_threads(tiny: MakeRecipe, tmp_path: Path) -> None:
    assert loop.pick_device("auto").type in ("cpu", "cuda", "mps")
    before = torch.get_num_threads()
    try:
        train(tiny("clip", "engine.threads=2", "schedule.pairs_seen=8"), tmp_path / "run", quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_end_of_a_run_sees_all_patches(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    forward = DualEncoder.forward

    def note(model: DualEncoder, batch: Any) -> Any:
        shares.append(model.clip.visual.patch_dropout.prob)
        return forward(model, batch)

    monkeypatch.setattr(DualEncoder, "forward", note)
    recipe = tiny("clip", "model.patch_dropout=0.5", "model.unmasked_end=0.25")
    train(recipe, tmp_path / "run", quiet=True)
    assert shares == [0.5] * 6 + [0.0] * 2


def test_patch_dropout_that_would_do_nothing(tiny: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"model\.unmasked_end ends model\.patch_dropout, which is 0"):
        tiny("clip", "model.unmasked_end=0.25")
    resnet = tiny("clip", "model.image.layers=[1,1,1,1]", "model.image.width=8", "model.patch_dropout=0.5")
    with pytest.raises(InputError, match="has no patches to leave out"):
        DualEncoder(resnet)


def test_interrupts_wait_for_the_end_of_the_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    with loop.interrupts_between_steps() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):  # a second one does not wait
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
