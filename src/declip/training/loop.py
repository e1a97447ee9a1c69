"""A run: pairs, views, towers, terms, steps. Read `train` from top to bottom."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.data.decoded import open_images
from declip.data.device_views import finish_views
from declip.data.kept import Kept
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import Source
from declip.errors import Diverged, InputError, Preempted, RunStopped
from declip.memory import keep_freed_memory
from declip.model.classes import start_by_classes
from declip.model.dual_encoder import DualEncoder
from declip.model.start import Start, first_weights, load_towers, read_start
from declip.model.tuning import add_adapters
from declip.objectives.objective import Objective, build_objective
from declip.progress import Progress, progress_bar
from declip.ranks import Ranks
from declip.recipe import Recipe
from declip.training.batch_norm import synchronise
from declip.training.checkpoint import check_run, make_run
from declip.training.distributed import (
    News,
    agree,
    broadcast,
    draw_apart,
    joined_ranks,
    local_device,
    one_voice,
    part,
    share_gradients,
)
from declip.training.gradients import clip_gradients
from declip.training.heads import take_heads
from declip.training.held_out import HeldOut
from declip.training.interpolation import interpolate
from declip.training.interrupts import Interrupts, interrupts_between_steps
from declip.training.locked import empty_features, keep_features, kept_parts
from declip.training.logging import NoLog, RunLog, cut_metrics
from declip.training.optimizer import batch_factor, check_schedule, cooldown_start, learning_rate, parameter_groups
from declip.training.pairs import (
    UNKNOWN_AT_MOST,
    check_batch,
    epoch_pairs,
    open_pairs,
    total_steps,
    unknown_share,
    used_tokens,
)
from declip.training.run import Run
from declip.training.saving import NoSaver, Saver
from declip.training.sharding import tower_blocks
from declip.training.step import attention_kernel, pick_device
from declip.training.teacher import Teacher, open_teacher
from declip.training.trackers import check_trackers

LOG_SECONDS = 0.5


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    quiet: bool = False,
    beside: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train a recipe into the run folder `out` and return a summary of the run.

    beside: text files that the folder is made with, by name.

    As one of several processes where torchrun has started them (`training.distributed`).
    Raises InputError for bad input and for a run that has diverged; KeyboardInterrupt on Ctrl-C and Preempted on
    SIGTERM, after the state is saved.
    """
    with joined_ranks(recipe) as ranks:
        with one_voice(ranks):
            run = set_up(recipe, Path(out), resume, ranks, quiet, beside)
        log = NoLog() if ranks.rank else RunLog(run.out, run.recipe, run.steps, run.step, quiet)
        with run.saver, log, interrupts_between_steps() as interrupts:
            _go_to_the_end(run, log, interrupts)
        return _finish(run)


def _finish(run: Run) -> dict[str, Any]:
    """The finished model in the run folder, and a summary of the run."""
    summary = run.finish()
    if run.recipe.evaluation.interpolate and not run.ranks.rank:
        summary |= interpolate(run)
    return summary


def set_up(
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    ranks: Ranks,
    quiet: bool = True,
    beside: Mapping[str, str] | None = None,
    keep: bool = True,
    progress: Progress | None = None,
) -> Run:
    """Everything that can be wrong is found out here, before the first step; what rests or teaches goes over the pairs.

    out: the run folder; None for a run that writes nothing
    keep: false for a run that only measures its steps, on zeros in the place of what is kept of the pairs
    progress: where a quiet run tells how far that is
    """
    check_trackers(recipe)
    recipe, start = read_start(recipe)
    # Rank 0 alone looks: it soon makes the folder, and another would find it there.
    going_on = out is not None and broadcast(ranks.rank == 0 and check_run(out, recipe, resume), ranks)
    device = pick_device(local_device(recipe.engine.device))
    if device.type == "cpu":
        keep_freed_memory()
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    pairs, held_pairs = open_pairs(recipe.data)
    check_batch(recipe, pairs)
    images = open_images(pairs, recipe.data.cache_gb, recipe.data.broken_limit)
    held_images = open_images(held_pairs, recipe.data.cache_gb, 1.0) if held_pairs else None
    steps = total_steps(recipe, epoch_pairs(recipe, images))
    check_schedule(steps, recipe)
    if recipe.evaluation.interpolate and not held_images:
        raise InputError(
            "evaluation.interpolate needs held-out pairs to choose by: set data.holdout or data.validation."
        )
    teacher = open_teacher(recipe, start, device)
    model, objective, first = _build(recipe, start, pairs, going_on, ranks, teacher)
    held_out = None
    if held_images and not ranks.rank:
        held_out = HeldOut(held_images, recipe, model.image_size, model.context_length, model.tokenizer)
    writes = out is not None and not ranks.rank
    saver: Saver = NoSaver()
    if out is not None and writes:
        saver = Saver(out, recipe.engine.keep, cooldown_start(steps, recipe), yields=device.type == "cpu")
    run = Run(recipe, out or Path(), device, model, objective, images, held_out, steps, saver, ranks, first)
    if going_on:
        run.read()
    if keep:
        shows = bool(teacher or kept_parts(recipe)) and not quiet and not ranks.rank
        with progress_bar() if shows else nullcontext(progress) as shown:
            run.kept = _keep(run, teacher, shown)
    else:
        run.kept = _keep_nothing(run, teacher)
    if writes:
        make_run(run.out, recipe, beside)  # where it goes on, the schedule may be another
        if going_on:
            cut_metrics(run.out, run.step)
    return run


def _keep(run: Run, teacher: Teacher | None, progress: Progress | None) -> Kept:
    """What comes before all that learns, and what a teacher says: of all pairs, before the first step."""
    kept = keep_features(run.model, run.images, run.recipe, run.device, progress)
    return teacher.learn(run.images, run.recipe, kept, progress) if teacher else kept


def _keep_nothing(run: Run, teacher: Teacher | None) -> Kept:
    """Zeros in its place."""
    kept = empty_features(run.model, run.images, run.recipe)
    return teacher.nothing(run.images, kept, run.model) if teacher else kept


def _build(
    recipe: Recipe, start: Start, pairs: Source, going_on: bool, ranks: Ranks, teacher: Teacher | None
) -> tuple[DualEncoder, Objective, dict[str, Tensor]]:
    """Towers and terms with the weights that they start from; where a run goes on, its checkpoint has them.

    Also these weights by name, where the recipe comes back to them.
    """
    torch.manual_seed(recipe.seed)
    model = DualEncoder(recipe)
    if not ranks.rank and (share := unknown_share(pairs, model.tokenizer)) > UNKNOWN_AT_MOST:
        print(
            f"The text tower's tokenizer knows no word for {share:.0%} of what the captions of {pairs.name} say, and "
            "takes it all for the same: choose a text tower of their language.",
            file=sys.stderr,
        )
    of_teacher = (None, 1.0) if teacher is None else (teacher.width, teacher.logit_scale)
    objective = build_objective(recipe, model, used_tokens(recipe, pairs, model.tokenizer), of_teacher)
    parameter_groups([model, objective], recipe.optimizer)  # whether the rates fit the towers
    if recipe.engine.shard:
        tower_blocks(model.clip)  # whether they can be sharded
    if not going_on:
        for name in load_towers(start, model.clip):
            print(f"The weights have no {name} of this width, it starts anew.", file=sys.stderr)
        if recipe.model.image.classes:
            start_by_classes(model, start, recipe.model.image.classes)
        if start.whole is not None:
            take_heads(start.whole, f"model.init = {recipe.model.init!r}", model, objective)
    comes_back = recipe.evaluation.interpolate or recipe.optimizer.start_decay
    first = first_weights(start, model.clip) if comes_back else {}
    if recipe.model.image.tune == "lora":
        add_adapters(model.clip, "image", recipe.model.image.lora_rank)
    if recipe.model.text.tune == "lora":
        add_adapters(model.clip, "text", recipe.model.text.lora_rank)
    return model, objective, first


def _go_to_the_end(run: Run, log: RunLog, interrupts: Interrupts) -> None:
    """Train; save where something outside stops the run; go back where it diverges, as the recipe says."""
    going_on = "To go on: the same command with --resume."
    step = make_step(run)
    while True:
        try:
            go(run, step, log, interrupts)
            return
        except Diverged as divergence:
            interrupts.settle()
            run.roll_back(str(divergence), log)
        except (KeyboardInterrupt, Preempted, RunStopped) as error:
            interrupts.settle()
            # The state in the middle of a step could not be resumed exactly, and one rank alone cannot gather it.
            kept = interrupts.late or (isinstance(error, RunStopped) and run.ranks.count > 1)
            saved = "the last checkpoint is kept" if kept else run.save_at_once()
            where = f"step {run.step} of {run.steps}"
            if isinstance(error, KeyboardInterrupt | Preempted) and not interrupts.late:
                part(run.ranks)
            if isinstance(error, KeyboardInterrupt):
                log.say(f"\nStopped at {where}; {saved}. {going_on}")
                raise
            # A loader process that SIGTERM reached too has not died of anything else.
            if isinstance(error, Preempted) or interrupts.preempted:
                raise Preempted(f"Stopped by SIGTERM at {where}; {saved}. {going_on}") from None
            raise RunStopped(f"{error} At {where} of the run: {saved}. {going_on}") from None


def go(run: Run, step: nn.Module, log: RunLog, interrupts: Interrupts) -> None:
    """Train from the step reached to the end; raises KeyboardInterrupt and Preempted between two steps."""
    recipe, model, ranks = run.recipe, run.model, run.ranks
    if run.step == 0:
        if (factor := batch_factor(recipe)) != 1:
            pairs = f"{recipe.schedule.batch_size} pairs instead of optimizer.lr_batch = {recipe.optimizer.lr_batch}"
            log.say(f"A step has {pairs}: learning rates are {factor:.2f} times those of the recipe.")
        run.save()
        run.saver.wait()  # a disk that is full is found out now, and there is always a checkpoint to go back to
    if run.has_stopped_rising():
        return
    batches = make_loader(batch_maker(run), run.step, run.steps, recipe.data.workers)
    every = max(1, round(recipe.evaluation.every * run.steps))
    model.train()
    logged = saved = clock = time.perf_counter()
    logged_step, took = run.step, math.inf
    for batch in run.watch.batches(batches):
        judged, best = (run.step + 1) % every == 0 or run.step + 1 == run.steps, False
        # Known before the forward pass, so that only steps that are logged pay for what a row says of them.
        watched = run.watch.begin(judged or log.every_step or time.perf_counter() - logged + took >= LOG_SECONDS)
        draw_apart(ranks, recipe.seed, run.step)
        rate = _follow_schedule(run)
        batch = finish_views(batch.to(run.device))
        run.guard.before_forward()
        loss, terms = step(batch)
        # A checkpoint that falls due while another is being written waits for it in the background.
        due = not ranks.rank and clock - saved >= recipe.engine.save_seconds and not run.saver.busy
        agreed = agree(ranks, loss, terms, News(batch.broken, due, interrupts.stop, interrupts.preempted))
        run.note_broken(agreed.news.broken, log)
        run.optimizer.zero_grad()
        with attention_kernel(run.device, recipe.engine.precision):
            (loss * run.loss_scale.value).backward()
        run.watch.read_gradients(run.loss_scale)
        norm = clip_gradients(run.parameters, recipe.optimizer.clip_norm or math.inf, ranks, run.loss_scale)
        run.begin_step()
        if skipped := run.guard.step(run.step + 1, agreed.loss, norm, agreed.terms):
            log.say(f"skipped: {skipped}", style="yellow")
        run.end_step()

        if watched and run.device.type == "cuda":
            torch.cuda.synchronize(run.device)  # else what is queued there would take no time
        now = time.perf_counter()
        run.seconds, took, clock = run.seconds + now - clock, now - clock, now
        if watched:
            speed = (run.step - logged_step) * recipe.schedule.batch_size / max(now - logged, 1e-9)
            more = run.watch.row(norm, now - logged, speed)
            log.train({**run.row(agreed.loss, agreed.terms, rate, speed), **more})
        if judged:
            best = run.judge(log, float(agreed.loss))
        if judged or agreed.news.due or run.step == cooldown_start(run.steps, recipe):
            run.save(best)
            saved = time.perf_counter()
        if judged or watched:
            # Judging and saving are not training: they count neither as time nor in the speed.
            logged = clock = time.perf_counter()
            logged_step = run.step
        if run.has_stopped_rising():
            log.say(f"Stopped at step {run.step}: no better held-out score since step {run.best_step}.")
            break
        interrupts.check(agreed.news if ranks.count > 1 else None)
    run.saver.wait()


def _follow_schedule(run: Run) -> float:
    """Set what changes in the course of a run: learning rates, terms' weights, patches; returns the learning rate."""
    recipe = run.recipe
    run.objective.done = run.step / run.steps
    rate = run.rate_factor * learning_rate(run.step, run.steps, recipe)
    for group in run.optimizer.param_groups:
        begun = run.step >= group["begins"] * run.steps
        group["lr"] = rate * (group["peak"] / recipe.optimizer.lr) if begun else 0.0
    if recipe.model.unmasked_end:
        unmasked = run.step >= run.steps * (1 - recipe.model.unmasked_end)
        run.model.leave_out_patches(0.0 if unmasked else recipe.model.patch_dropout)
    return rate


def batch_maker(run: Run) -> BatchMaker:
    """What makes this rank's part of each batch."""
    model, ranks = run.model, run.ranks
    towers = model.view_size, model.context_length, model.tokenizer, model.full_captions
    return BatchMaker(
        run.images,
        run.recipe,
        *towers,
        rank=ranks.rank,
        ranks=ranks.count,
        kept=run.kept,
        local_size=model.local_size,
    )


def make_step(run: Run) -> nn.Module:
    """What computes a batch's loss on this rank, so that its gradients are those of the global batch."""
    engine = run.recipe.engine
    if run.ranks.count > 1 and engine.sync_batch_norm:
        synchronise(run.model, run.ranks)
        synchronise(run.objective, run.ranks)
    if engine.compile:
        run.model.compile()
    return share_gradients(run.compute, run.ranks)
