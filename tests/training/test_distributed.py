"""Several real processes compute what one does: losses, gradients, runs; and whatever goes wrong is said once."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_one_broken
from made import cosine, features
from rank_checks import (
    FOUR,
    METHODS,
    RESNET,
    four_ranks,
    made_norm,
    prolonged_recipe,
    recipe_of,
    run_recipe,
    samples_of,
    spawn,
    steps_of,
    two_ranks,
)
from safetensors.torch import load_file
from torch import nn

from declip.errors import InputError
from declip.model.dual_encoder import DualEncoder
from declip.ranks import ALONE
from declip.recipe import Recipe
from declip.training import loop, sharding
from declip.training.checkpoint import checkpoints, step_of
from declip.training.logging import read_metrics
from declip.training.sharding import tower_blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs, one of them broken, and what two ranks made of them; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    write_one_broken(folder / "pairs.parquet")
    context = spawn(two_ranks, folder, 2, meetings=16)
    for process in context.processes:
        process.join(300)
    codes = [process.exitcode for process in context.processes]
    if codes != [0, -signal.SIGKILL]:  # as it should be: rank 1 is killed at the end
        context.join()
    return folder


def assert_as_one(folder: Path, name: str, count: int) -> None:
    """Losses and gradients to 1e-5, on every rank."""
    one = steps_of(recipe_of(folder, name), ALONE)
    for rank in range(count):
        found = torch.load(folder / f"{name} {rank} of {count}.pt")
        assert found["losses"] == [pytest.approx(losses, rel=1e-5, abs=1e-5) for losses in one["losses"]]
        for gradients, expected in zip(found["gradients"], one["gradients"], strict=True):
            given = {name for name, gradient in expected.items() if gradient is not None}
            assert {name for name, gradient in gradients.items() if gradient is not None} == given
            whole = torch.cat([expected[name].flatten() for name in given]).norm()
            off = {name: (gradients[name] - expected[name]).norm() for name in given}
            assert torch.stack(list(off.values())).norm() <= 1e-5 * whole
            for parameter, difference in off.items():  # of small ones too, beyond the rounding of what is added up
                assert difference <= 1e-4 * expected[parameter].norm() + 3e-6 * whole, (
                    f"{parameter}: {difference / whole:.1e}"
                )
        for buffer, tensor in one["buffers"].items():
            torch.testing.assert_close(found["buffers"][buffer], tensor, rtol=1e-5, atol=1e-5, msg=buffer)


@pytest.mark.parametrize("name", [name for name in METHODS if "bfloat16" not in name])
def test_two_ranks_compute_what_one_process_does(folder: Path, name: str) -> None:
    assert_as_one(folder, name, 2)


@pytest.mark.parametrize("name", ["declip", "declip, sharded"])
def test_the_optimizer_of_two_ranks_has_the_state_of_one(folder: Path, name: str) -> None:
    """Whole, it may be loaded anywhere; and ranks that share it out find what it was."""
    one = steps_of(recipe_of(folder, name), ALONE)["optimizer"]
    for rank in range(2):
        found = torch.load(folder / f"{name} {rank} of 2.pt")
        assert found["optimizer"].keys() == one.keys()
        for number, state in one.items():
            for part, tensor in state.items():
                own = found["optimizer"][number][part]
                torch.testing.assert_close(own, tensor, rtol=1e-3, atol=1e-5, msg=f"{number} {part}")
                assert torch.equal(found["optimizer again"][number][part], own)


def test_sharded_in_bfloat16(folder: Path) -> None:
    """Blocks gather bfloat16, which autocast would make of what they gathered: nothing else changes."""
    found = [torch.load(folder / f"clip, bfloat16{sharded} 0 of 2.pt") for sharded in ("", ", sharded")]
    assert found[1]["losses"] == [pytest.approx(losses, rel=1e-5) for losses in found[0]["losses"]]
    for gradients, others in zip(*(each["gradients"] for each in found), strict=True):
        for name, gradient in gradients.items():
            assert gradient is None or (others[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_four_ranks_compute_what_one_process_does(folder: Path) -> None:
    spawn(four_ranks, folder, 4).join()
    for name in FOUR:
        assert_as_one(folder, name, 4)


def test_batch_norm_over_all_ranks(folder: Path) -> None:
    parts = [torch.load(folder / f"norms {rank}.pt") for rank in range(2)]
    for shape in parts[0]:
        norm, rows, slopes = made_norm(shape)
        rows.requires_grad_()
        output = norm(rows)
        (output * slopes).sum().backward()
        outputs, gradients, weights, buffers, judged = zip(*(part[shape] for part in parts), strict=True)
        torch.testing.assert_close(torch.cat(outputs), output.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat(gradients), rows.grad, rtol=1e-7, atol=1e-9)
        for rank in range(2):
            for name, parameter in norm.named_parameters():
                torch.testing.assert_close(weights[rank][name], parameter.grad, rtol=1e-7, atol=1e-9)
            assert buffers[rank] == {name: pytest.approx(t) for name, t in norm.named_buffers()}
            torch.testing.assert_close(judged[rank], norm.eval()(rows).detach())
            norm.train()


def test_a_queue_of_each_rank(folder: Path) -> None:
    """Each text's neighbour is in its own rank's queue; each image meets the neighbours of all ranks."""
    found = [torch.load(folder / f"queues {rank}.pt") for rank in range(2)]
    queues: list[list[tuple[int, int, torch.Tensor]]] = [[], []]  # of each rank: its place, the sample, the text
    for step in range(6):
        made, samples = features(batch=6, seed=step), samples_of(step)
        texts = torch.nn.functional.normalize(made.text["caption"].detach(), dim=-1)
        if queues[0]:
            nearest = []
            for row, sample in enumerate(samples):
                others = [entry for entry in queues[row // 3] if entry[1] != sample]
                nearest.append((row // 3, *max(others, key=lambda entry: float(entry[2] @ texts[row]))))
            losses = []
            for image in made.image.detach():
                for row, sample in enumerate(samples):
                    others = [it for it in nearest if it[2] != sample and it[:2] != nearest[row][:2]]
                    logits = [7.0 * cosine(image[row], it[3]) for it in (nearest[row], *others)]
                    losses.append(math.log(sum(math.exp(logit) for logit in logits)) - logits[0])
            assert (found[0][step] + found[1][step]) / 2 == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        for rank, queue in enumerate(queues):
            new = [(3 * step + i, samples[3 * rank + i], texts[3 * rank + i]) for i in range(3)]
            queue[:] = [*queue, *new][-9:]


# Runs


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    """The same run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_SECONDS", 0.0)
        loop.train(run_recipe(folder), folder / "one", quiet=True)
    return folder / "one"


def assert_same_end(one: Path, other: Path) -> None:
    states = [torch.load(checkpoints(run)[0], weights_only=True) for run in (one, other)]
    for part in ("model", "objective"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    if all(state["average"] for state in states):  # sharded runs have none
        for average in zip(*(state["average"]["average"] for state in states), strict=True):
            torch.testing.assert_close(*average, rtol=1e-4, atol=1e-4)
    finished = [load_file(run / "open_clip_model.safetensors") for run in (one, other)]
    assert finished[0].keys() == finished[1].keys()
    rows = [read_metrics(run) for run in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for row, same in zip(*rows, strict=True):
        assert row.keys() == same.keys()
        assert row.get("terms", {}) == pytest.approx(same.get("terms", {}), rel=1e-4, abs=1e-4)


def test_a_run_of_two_ranks_is_the_run_of_one(folder: Path, one_process: Path) -> None:
    assert_same_end(one_process, folder / "two")
    summaries = [json.loads((folder / f"summary {rank}.json").read_text()) for rank in range(2)]
    assert [summary["broken"] for summary in summaries] == [1, 1]  # one rank met it, all know
    said = [summary.pop("said") for summary in summaries]
    assert said[1] == ""
    assert said[0].count("skipped: ") == 1
    assert summaries[0]["held_out_score"] > 0


def test_queues_of_each_rank_are_resumed(folder: Path) -> None:
    states = [torch.load(checkpoints(folder / name)[0], weights_only=True) for name in ("apart", "apart, resumed")]
    for name, parts in states[0]["apart"].items():
        assert len(parts) == 2
        for part, same in zip(parts, states[1]["apart"][name], strict=True):
            torch.testing.assert_close(part, same, rtol=0, atol=0)
    assert not torch.equal(*states[0]["apart"]["queue"])
    assert_same_end(folder / "apart", folder / "apart, resumed")


def test_ranks_go_back_together(folder: Path, one_process: Path) -> None:
    """The loss of one rank was no number in step 5: both go back to step 4, and the rate is half from there."""
    summaries = [json.loads((folder / f"rolled back {rank}.json").read_text()) for rank in range(2)]
    assert [summary["roll_backs"] for summary in summaries] == [1, 1]
    rows, undisturbed = (
        [row for row in read_metrics(run) if "lr" in row] for run in (folder / "rolled back", one_process)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed]
    factors = [row["lr"] / other["lr"] for row, other in zip(rows, undisturbed, strict=True)]
    assert factors == pytest.approx([1] * 4 + [0.5] * (len(rows) - 4))
    losses = [[row["loss"] for row in own[:5]] for own in (rows, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_ranks_prolong_a_run_together(folder: Path) -> None:
    """8 steps, of which 2 are taken back, and then 11 are the 11 steps of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_SECONDS", 0.0)
        loop.train(prolonged_recipe(folder, 88), folder / "prolonged alone", quiet=True)
    assert_same_end(folder / "prolonged alone", folder / "prolonged")


def test_a_dry_run_of_two_ranks(folder: Path) -> None:
    found, other = (json.loads((folder / f"estimate {rank}.json").read_text()) for rank in range(2))
    assert other == {}
    assert (found["ranks"], found["steps"], found["batch_size"]) == (2, 8, 8)
    assert found["device_hours"] == pytest.approx(2 * found["hours"])
    assert found["cost"] == pytest.approx(3 * found["device_hours"])


@pytest.mark.parametrize("end", ["stopped", "preempted", "killed"])
def test_what_two_ranks_began_one_process_ends(folder: Path, one_process: Path, end: str) -> None:
    """Ctrl-C or SIGTERM reached one rank in step 3, and both stopped after it. `killed`: rank 1 in step 6."""
    assert not (folder / end / "open_clip_model.safetensors").exists()
    said = [folder / f"{end} {rank}" for rank in range(2)]
    if end == "preempted":
        assert all("Stopped by SIGTERM at step 3 of 8; saved" in path.read_text() for path in said)
    if end == "killed":
        assert "Another rank has ended. To go on from the last checkpoint" in said[0].read_text()
    assert said[1].exists() == (end != "killed")
    assert step_of(checkpoints(folder / end)[0]) == (4 if end == "killed" else 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_SECONDS", 0.0)
        loop.train(run_recipe(folder), folder / end, resume=True, quiet=True)
    assert_same_end(one_process, folder / end)


def test_sharded_ranks_go_back_as_others_do(folder: Path) -> None:
    assert_same_end(folder / "rolled back", folder / "rolled back, sharded")


def test_what_sharded_ranks_began_one_process_ends(folder: Path, one_process: Path) -> None:
    assert step_of(checkpoints(folder / "stopped, sharded")[0]) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_SECONDS", 0.0)
        loop.train(run_recipe(folder, "optimizer.ema=0"), folder / "stopped, sharded", resume=True, quiet=True)
    assert_same_end(one_process, folder / "stopped, sharded")


def test_what_others_began_sharded_ranks_end(folder: Path, one_process: Path) -> None:
    assert_same_end(one_process, folder / "stopped, then sharded")


def test_another_recipe(folder: Path) -> None:
    assert not (folder / "odd 0").exists()
    says = "Rank 1 has another recipe than rank 0 (seed = 0 there, 1 now): start all with the same one."
    assert (folder / "odd 1").read_text() == says


def test_blocks_of_towers(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered at once; a tower whose blocks are not known is refused."""
    text = "model.text.layers=2"
    convnext = DualEncoder(
        tiny("clip", "model.image.timm_model_name=test_convnext", "model.image.image_size=64", text)
    ).clip
    layers = list(convnext.transformer.resblocks)
    assert tower_blocks(convnext) == [*convnext.visual.trunk.stages, *layers]
    resnet = DualEncoder(tiny("clip", *RESNET, text)).clip
    stages = [getattr(resnet.visual, f"layer{number}") for number in (1, 2, 3, 4)]
    assert tower_blocks(resnet) == [*stages, *resnet.transformer.resblocks]
    vit = DualEncoder(tiny("clip", "model.image.layers=3", text)).clip
    assert tower_blocks(vit) == [*vit.visual.transformer.resblocks, *vit.transformer.resblocks]
    with monkeypatch.context() as patch:
        patch.setattr(sharding, "is_huggingface", lambda clip: True)
        vit.text = SimpleNamespace(transformer=nn.Sequential(nn.ModuleList([vit.visual])))
        assert tower_blocks(vit) == [*vit.visual.transformer.resblocks] * 2
        vit.text.transformer = nn.Linear(2, 2)
        with pytest.raises(InputError, match=r"engine\.shard: this text tower has no list of layers"):
            tower_blocks(vit)
    del convnext.visual.trunk.stages
    with pytest.raises(InputError, match=r"engine\.shard: this image tower does not say which its blocks are"):
        tower_blocks(convnext)
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    with pytest.raises(InputError, match=r"engine\.shard needs PyTorch 2\.7 or later, this is 2\.6\.0"):
        tower_blocks(resnet)
