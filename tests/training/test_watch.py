"""What rows say of a step beyond its losses, and that only steps that are logged pay for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from declip.data.batch import Batch
from declip.objectives.nearest_neighbour import NearestNeighbour, mean_age
from declip.recipe import Recipe
from declip.training import loop, watch
from declip.training.flops import pair_flops, peak_flops
from declip.training.logging import read_metrics
from declip.training.loop import train
from declip.training.run import Run
from declip.training.watch import Watch, image_to_text_accuracy, tower_parameters

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_SECONDS", 0.0)


def steps_of(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    train(recipe, out, quiet=True)
    return [row for row in read_metrics(out) if "loss" in row]


@pytest.mark.parametrize("method", ["clip", "declip"])
def test_rows(tiny: MakeRecipe, tmp_path: Path, method: str) -> None:
    for row in steps_of(tiny(method, "optimizer.clip_norm=0.001"), tmp_path / "run"):
        norms = row["gradient_norm"]
        assert norms["total"] > 0.01  # before clipping
        parts = [norms[name] for name in ("image", "text", "heads")]
        assert min(parts) > 0
        assert math.hypot(*parts) == pytest.approx(norms["total"], rel=1e-5)
        assert 0 <= row["data_wait"] <= 1
        assert 8 * row["contrastive_accuracy"] == pytest.approx(round(8 * row["contrastive_accuracy"]), abs=1e-3)
        assert "mfu" not in row
        assert ("queue_age" in row) == ("neighbour_matches" in row) == (method == "declip")


def test_terms_that_train_no_embeddings(tiny: MakeRecipe, tmp_path: Path) -> None:
    rows = steps_of(tiny("clip", "terms.contrastive=none", "terms.token_wise.dim=8"), tmp_path / "run")
    assert all("contrastive_accuracy" not in row for row in rows)


def test_steps_that_are_not_logged(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight steps are, those that are judged: only they are looked at."""
    monkeypatch.setattr(loop, "LOG_SECONDS", 1e9)
    monkeypatch.setattr(Run, "judge", lambda *_: False)
    looked: list[int] = []  # each time
    for name in ("image_to_text_accuracy", "mean_age"):
        function = getattr(watch, name)
        monkeypatch.setattr(watch, name, lambda *a, f=function, **k: looked.append(1) or f(*a, **k))
    norms = torch._foreach_norm
    gradients: list[int] = []
    monkeypatch.setattr(torch, "_foreach_norm", lambda part, *a: gradients.append(len(part)) or norms(part, *a))
    counts = []
    for every in ("1", "0.5"):
        looked.clear()
        gradients.clear()
        rows = steps_of(tiny("declip", f"evaluation.every={every}"), tmp_path / every)
        counts.append((len(rows), len(looked), len(gradients)))
    # The first step of a run is always logged.
    assert [rows for rows, _, _ in counts] == [2, 3]
    assert [looks for _, looks, _ in counts] == [4, 6]
    assert (counts[1][2] - counts[0][2]) % 3 == 0
    assert counts[1][2] > counts[0][2]


def test_the_loader_is_waited_for(monkeypatch: pytest.MonkeyPatch, tiny: MakeRecipe) -> None:
    run = loop.set_up(tiny(), None, False, loop.Ranks())
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0])
    monkeypatch.setattr("declip.training.watch.time.perf_counter", lambda: next(clock))

    def loader() -> Iterator[Any]:
        yield from ("one", "other")

    assert list(run.watch.batches(loader())) == ["one", "other"]
    assert run.watch.row(torch.ones(()), 8.0, 1.0)["data_wait"] == 0.5
    assert run.watch.row(torch.ones(()), 8.0, 1.0)["data_wait"] == 0.0


def test_towers(tiny: MakeRecipe) -> None:
    run = loop.set_up(tiny("declip"), None, False, loop.Ranks())
    parts = tower_parameters(run.model, run.objective)
    every = [*run.model.parameters(), *run.objective.parameters()]
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(id(p) for p in every)
    assert {id(p) for p in parts["image"]} == {id(p) for p in run.model.clip.visual.parameters()}
    assert any(p is run.model.clip.token_embedding.weight for p in parts["text"])
    assert any(p is run.model.clip.logit_scale for p in parts["heads"])


def test_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 40, 8, generator=generator)
    texts[:20] = images[:20] * torch.rand(20, 1, generator=generator)
    tokens = torch.arange(40)[:, None] // torch.tensor([1, 100])
    right = 0
    for row, image in enumerate(images):
        similarity = [float(torch.cosine_similarity(image, text, dim=0)) for text in texts]
        right += similarity.index(max(similarity)) == row
    assert 20 <= right < 40
    assert float(image_to_text_accuracy(images, texts, tokens)) == pytest.approx(right / 40)
    assert float(image_to_text_accuracy(images, texts, torch.zeros_like(tokens))) == 1.0  # all show the same caption


# The queue


@pytest.mark.parametrize(("size", "batch", "views"), [(20, 8, 1), (24, 8, 2), (20, 8, 2), (5, 8, 1), (64, 8, 3)])
@pytest.mark.parametrize("random_start", [False, True])
def test_age_of_the_queue(size: int, batch: int, views: int, random_start: bool) -> None:
    """As written down for each entry."""
    term = NearestNeighbour(4, size, 1, ["caption"], random_start=random_start)
    came: list[int | None] = [None] * size
    for step in range(12):
        entered = [at for at in came if at is not None]
        expected = sum(step - at for at in entered) / len(entered) if entered else None
        full = bool(term.queue_ids[-1] >= 0)
        assert mean_age(int(term.pointer), size, full, batch, views) == pytest.approx(expected)
        for view in range(views):
            pointer = int(term.pointer)
            ids = torch.arange(batch) + 100 * (step * views + view)
            term._enqueue(torch.randn(batch, 4), ids)
            for place in range(pointer, min(pointer + batch, size)):
                came[place] = step


class Source:
    """Captions by index."""

    def __init__(self, *captions: str) -> None:
        self.texts = captions

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.texts[index],)


def test_true_neighbours(tiny: MakeRecipe) -> None:
    """One's own, one with the same caption in other letters, another; the fourth found none, the fifth chance."""
    run = loop.set_up(tiny("declip"), None, False, loop.Ranks())
    term, own = run.watch.neighbours, torch.tensor([0, 1, 2, 3, 4])
    assert term is not None
    run.images.source = Source("a cat", "A  cat", "dog", "bird", "fish")  # type: ignore[assignment]
    queue_ids = torch.tensor([0, 0, 1, -1, -2])
    run.watch.ring = torch.tensor(0), queue_ids, own
    term.found = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[True, True, True, False, True]])
    row = run.watch.row(torch.ones(()), 1.0, 1.0)
    assert row["neighbour_matches"] == 0.5
    term.found = term.found[0], torch.zeros(1, 5, dtype=torch.bool)
    assert run.watch.row(torch.ones(()), 1.0, 1.0)["neighbour_matches"] is None
    run.images.kept = None
    assert "neighbour_matches" not in run.watch.row(torch.ones(()), 1.0, 1.0)


def test_neighbours_are_those_of_the_search(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row is told are the queue's ids before the batch has entered it."""
    seen: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []
    search, expected = NearestNeighbour._search, []

    def searching(self: NearestNeighbour, texts: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows, found = search(self, texts, ids)
        expected.append([(int(i), int(self.queue_ids[r])) for i, r, f in zip(ids, rows, found, strict=True) if f])
        return rows, found

    monkeypatch.setattr(NearestNeighbour, "_search", searching)
    monkeypatch.setattr(Watch, "_matches", lambda _, pairs: seen.append(pairs))
    steps_of(tiny("declip"), tmp_path / "run")
    assert seen == expected
    assert sum(map(len, seen)) > 20


# FLOPs


def transformer_flops(width: int, tokens: int) -> int:
    """Of one block and one sequence, forward: 24·n·w² and 4·n²·w (Kaplan et al. 2020, arXiv:2001.08361, table 1)."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


@pytest.mark.parametrize("changes", [[], ["engine.micro_batch=2", "engine.grad_checkpointing=true"]])
def test_flops_of_a_pair(tiny: MakeRecipe, changes: list[str]) -> None:
    """Two image views and three text views; what is computed again does not count, nor does it draw numbers."""
    before = torch.get_rng_state()
    found = pair_flops(tiny("declip", *changes), tokens=12)
    assert torch.equal(torch.get_rng_state(), before)
    patches = 2 * 4 * (3 * 8 * 8) * 32  # without a gradient for the pixels
    image = 3 * (transformer_flops(32, 4 + 1) + 2 * 32 * 16) + 2 * patches
    text = 3 * (transformer_flops(8, 12) + 2 * 8 * 16)
    assert found == pytest.approx(2 * image + 3 * text, rel=0.002)


@pytest.mark.parametrize(
    ("name", "bfloat16", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", True, 312),
        ("NVIDIA H100 80GB HBM3", True, 989),
        ("NVIDIA H100 PCIe", True, 756),
        ("NVIDIA H200", False, 67),
        ("NVIDIA L4", True, 121),
        ("NVIDIA L40S", True, 362),
        ("NVIDIA GeForce RTX 4090", True, 165.2),
        ("NVIDIA GeForce RTX 4090 D", True, None),
        ("NVIDIA A1000", True, None),
        ("Tesla V100-SXM2-16GB", True, None),
    ],
)
def test_peaks(name: str, bfloat16: bool, teraflops: float | None) -> None:
    assert peak_flops(name, bfloat16) == (None if teraflops is None else pytest.approx(1e12 * teraflops))


def test_mfu(tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_peak", lambda *_: 1e7)
    recipe = tiny()
    lengths: list[int] = []
    look = Watch._look

    def looking(self: Watch, module: Any, inputs: tuple[Any, Batch]) -> None:
        lengths.append(inputs[1].tokens.shape[-1])
        look(self, module, inputs)

    monkeypatch.setattr(Watch, "_look", looking)
    rows = steps_of(recipe, tmp_path / "run")
    for row in rows:
        assert row["mfu"] == pytest.approx(row["samples_per_second"] * pair_flops(recipe, lengths[0]) / 1e7, rel=0.01)

    with_dropout = tiny("clip", "model.patch_dropout=0.5", "model.unmasked_end=0.25")
    rows = steps_of(with_dropout, tmp_path / "dropout")
    counted = [row["mfu"] * 1e7 / row["samples_per_second"] for row in rows]
    assert counted[:6] == [pytest.approx(pair_flops(with_dropout, lengths[0]), rel=0.01)] * 6
    assert counted[6:] == [pytest.approx(pair_flops(recipe, lengths[0]), rel=0.01)] * 2
    assert counted[0] < 0.9 * counted[-1]

    def asks_for_numbers(*_: Any) -> float:
        raise RuntimeError

    monkeypatch.setattr(watch, "pair_flops", asks_for_numbers)
    assert [row["mfu"] for row in steps_of(recipe, tmp_path / "other")] == [None] * 8
