"""Micro-batches and activation checkpointing give the losses, gradients and statistics of the whole batch kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pair, write_pairs
from rank_checks import METHODS, RESNET, recipe_of, steps_of
from torch import Tensor

from declip.errors import InputError
from declip.model import dual_encoder
from declip.model.dual_encoder import DualEncoder
from declip.ranks import ALONE

APART = "engine.sync_batch_norm=false"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recompute")
    write_pairs(folder / "pairs.parquet", [pair(number) for number in range(40)])
    return folder


def found(folder: Path, method: str, *overrides: str) -> dict[str, Any]:
    return steps_of(recipe_of(folder, method, *overrides), ALONE)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == [pytest.approx(losses, rel=1e-5, abs=1e-6) for losses in other["losses"]]
    for gradients, same in zip(one["gradients"], other["gradients"], strict=True):
        assert gradients.keys() == same.keys()
        for name, gradient in gradients.items():
            assert (gradient is None) == (same[name] is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, same[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, tensor in one["buffers"].items():
        torch.testing.assert_close(tensor, other["buffers"][name], rtol=1e-5, atol=1e-6, msg=name)


def keep_all(module: Any, function: Callable[..., Any], *inputs: Any) -> Any:
    """The slow twin's opposite: nothing is computed again."""
    return function(*inputs)


@pytest.mark.parametrize("method", [name for name in METHODS if not {"a ResNet", "bfloat16"} & {*name.split(", ")}])
def test_micro_batches_are_the_whole_batch(folder: Path, method: str) -> None:
    """Eight pairs in pieces of three, for every method; heads with batch norm see the whole batch either way."""
    assert_same(found(folder, method, "engine.micro_batch=3"), found(folder, method))


@pytest.mark.parametrize("change", ["engine.micro_batch=3", "engine.grad_checkpointing=true"])
def test_in_bfloat16(folder: Path, change: str) -> None:
    """What is computed again is computed by the same kernels; sums of pieces are rounded elsewhere."""
    again, kept = (found(folder, "clip, bfloat16", *changes) for changes in ([change], []))
    for gradients, same in zip(again["gradients"], kept["gradients"], strict=True):
        for name, gradient in gradients.items():
            assert gradient is None or (gradient - same[name]).norm() <= 0.05 * same[name].norm() + 1e-4, name


@pytest.mark.parametrize("tower", [["model.patch_dropout=0.5", "model.image.image_size=32"], [*RESNET, APART]])
def test_randomness_and_statistics_are_replayed(
    folder: Path, tower: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed again drops the same patches, and a batch norm counts each piece once."""
    again = found(folder, "declip", "engine.micro_batch=3", *tower)
    monkeypatch.setattr(dual_encoder, "recomputed", keep_all)
    assert_same(again, found(folder, "declip", "engine.micro_batch=3", *tower))


@pytest.mark.parametrize("tower", [["model.patch_dropout=0.5", "model.image.image_size=32"], RESNET])
def test_activation_checkpointing(folder: Path, tower: list[str]) -> None:
    changes = "model.image.layers=[2,1,1,1]" if tower is RESNET else "model.image.layers=2"
    assert_same(
        found(folder, "declip", *tower, changes, "engine.grad_checkpointing=true"),
        found(folder, "declip", *tower, changes),
    )


def kept_bytes(folder: Path, *overrides: str) -> int:
    """What the forward pass of the first batch keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found(folder, "clip", "model.image.layers=4", *overrides)
    return sum(kept.values())


def test_less_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rank_checks.BATCHES", (0,))
    everything = kept_bytes(folder)
    assert kept_bytes(folder, "engine.micro_batch=2") < 0.6 * everything
    assert kept_bytes(folder, "engine.grad_checkpointing=true") < 0.8 * everything


def test_batch_norm_in_a_tower_is_no_surprise(folder: Path) -> None:
    with pytest.raises(InputError, match=r"one micro-batch at a time: allow it with engine\.sync_batch_norm=false"):
        DualEncoder(recipe_of(folder, "clip", *RESNET, "engine.micro_batch=3"))


def test_frozen_batch_norms_are_the_same_in_pieces(folder: Path) -> None:
    frozen = [*RESNET, "model.freeze_batch_norm=true"]
    whole = found(folder, "clip", *frozen)
    assert_same(found(folder, "clip", *frozen, "engine.micro_batch=3"), whole)
    norms = {name: tensor for name, tensor in whole["buffers"].items() if "running_mean" in name}
    assert norms
    assert all(not tensor.any() for tensor in norms.values())  # as at the start
    scales = [g for name, g in whole["gradients"][0].items() if name.endswith("bn1.weight")]
    assert any(gradient.any() for gradient in scales)
    with pytest.raises(InputError, match=r"freeze_batch_norm: these towers have no batch norms"):
        DualEncoder(recipe_of(folder, "clip", "model.freeze_batch_norm=true"))


def test_compiling_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"engine\.compile does not go with engine\.micro_batch"):
        recipe_of(folder, "clip", "engine.compile=true", "engine.micro_batch=3")


def test_sharding_with_what_looks_at_whole_matrices_is_refused(folder: Path) -> None:
    for other in ("optimizer.ema=0.9", "optimizer.kind=muon"):
        with pytest.raises(InputError, match=r"engine\.shard goes with neither optimizer\.ema nor"):
            recipe_of(folder, "clip", "engine.shard=true", other)


def test_a_timm_tower_with_batch_norm_is_refused(folder: Path) -> None:
    tower = ["model.image.timm_model_name=resnet18", "model.image.image_size=32", "model.image.timm_proj=linear"]
    with pytest.raises(InputError, match="would count each batch twice"):
        DualEncoder(recipe_of(folder, "clip", *tower, "engine.grad_checkpointing=true"))
