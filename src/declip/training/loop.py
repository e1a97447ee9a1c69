"""A run: pairs, views, towers, terms, steps. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from declip.data.decoded import Images, check_broken, open_images
from declip.data.device_views import finish_views
from declip.data.huggingface_tokenizer import HuggingFaceTokenizer
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import BrokenPair
from declip.errors import InputError, RunStopped
from declip.files import save_weights, write_atomically
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import TokenWise
from declip.model.export import HEADS, WEIGHTS, open_clip_config, write_config
from declip.objectives.objective import Objective, build_objective
from declip.ranks import ALONE, Ranks
from declip.recipe import Recipe
from declip.training.batch_norm import synchronise
from declip.training.checkpoint import (
    HEADS_BEST,
    WEIGHTS_BEST,
    check_run,
    make_run,
    read_checkpoint,
    save_checkpoint,
)
from declip.training.distributed import (
    agree,
    broadcast,
    draw_apart,
    joined_ranks,
    local_device,
    one_voice,
    share_gradients,
)
from declip.training.heads import heads_of, start_from
from declip.training.held_out import HeldOut
from declip.training.logging import NoLog, RunLog, cut_metrics, resident_bytes
from declip.training.optimizer import build_optimizer, learning_rate
from declip.training.pairs import epoch_pairs, open_pairs, total_steps, used_tokens
from declip.training.step import Step, pick_device

LOG_SECONDS = 0.5
SAVE_SECONDS = 60.0
MEMORY_SECONDS = 5.0


def train(recipe: Recipe, out: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a recipe into the run folder `out` and return a summary of the run.

    As one of several processes where torchrun has started them (`training.distributed`).
    Raises InputError for bad input and for a loss that is no longer a number, and KeyboardInterrupt on Ctrl-C, after
    the state is saved.
    """
    with joined_ranks(recipe) as ranks:
        with one_voice(ranks):
            run = _set_up(recipe, Path(out), resume, ranks)
        log = NoLog() if ranks.rank else RunLog(run.out, recipe.name, run.steps, run.step, quiet)
        with log, interrupts_between_steps() as interrupted:
            try:
                run.go(log, interrupted)
            except KeyboardInterrupt:
                run.save()
                if run.stopping:
                    broadcast(None, ranks)  # the others wait for rank 0: whoever started them ends all when one ends
                log.say(
                    f"\nStopped at step {run.step} of {run.steps}; saved. To go on: the same command with --resume."
                )
                raise
            except RunStopped as error:
                run.save()
                where = f"The run is saved at step {run.step} of {run.steps}; to go on"
                raise RunStopped(
                    f"{error} {'To go on from the last checkpoint' if ranks.rank else where}: the same command with "
                    "--resume."
                ) from None
        return run.finish()


def _set_up(recipe: Recipe, out: Path, resume: bool, ranks: Ranks) -> Run:
    """Everything that can be wrong is found out here, before the first step."""
    # Rank 0 alone looks: it soon makes the folder, and another would find it there.
    going_on = broadcast(ranks.rank == 0 and check_run(out, recipe, resume), ranks)
    device = pick_device(local_device(recipe.engine.device))
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    pairs, held_pairs = open_pairs(recipe.data)
    if recipe.schedule.batch_size > len(pairs):
        raise InputError(
            f"schedule.batch_size = {recipe.schedule.batch_size} is larger than the training set of {len(pairs)} pairs."
        )
    images = open_images(pairs, recipe.data.cache_gb, recipe.data.broken_limit)
    held_images = open_images(held_pairs, recipe.data.cache_gb, 1.0) if held_pairs else None
    steps = total_steps(recipe, epoch_pairs(recipe, images))
    torch.manual_seed(recipe.seed)
    model = DualEncoder(recipe)
    objective = build_objective(recipe, model, used_tokens(recipe, pairs, model.tokenizer))
    if recipe.model.start and not going_on:
        start_from(recipe.model, model, objective)
    held_out = None
    if held_images and not ranks.rank:
        held_out = HeldOut(held_images, recipe, model.image_size, model.context_length, model.tokenizer)
    if not ranks.rank:
        make_run(out, recipe)
    run = Run(recipe, out, device, model, objective, images, held_out, steps, ranks)
    if going_on:
        run.restore(read_checkpoint(out))
    return run


@contextlib.contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, so that what is saved resumes exactly; a second one does not wait.

    Gives a function that says whether Ctrl-C was pressed. Where Python allows no handlers, outside the main thread,
    nothing changes.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """The state of a run between two steps: what a checkpoint holds."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        model: DualEncoder,
        objective: Objective,
        images: Images,
        held_out: HeldOut | None,
        steps: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.out, self.device, self.held_out, self.steps = recipe, out, device, held_out, steps
        self.images, self.ranks = images, ranks
        self.model, self.objective = model.to(device), objective.to(device)
        if device.type != "mps" and not hasattr(model.clip.visual, "transformer"):
            self.model.clip.visual.to(memory_format=torch.channels_last)  # convolutions are faster so
        self.token_wise = None
        if recipe.similarity == "token_wise":
            self.token_wise = TokenWise(objective.terms["token_wise"].mappings, not recipe.pads_captions)  # type: ignore[arg-type]
        self.optimizer = build_optimizer([model, objective], recipe.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step, self.seconds, self.peak_memory, self.memory_read = 0, 0.0, 0, -math.inf
        self.best_score, self.best_step, self.worse_in_a_row, self.warned = -math.inf, 0, 0, False
        self.loss_at_best, self.sound, self.stopping = math.inf, True, False
        kept = images.kept or []
        self.broken = {index for index, image in enumerate(kept) if isinstance(image, BrokenPair)}

    def go(self, log: RunLog, interrupted: Callable[[], bool]) -> None:
        """Train from the step reached to the end; raises KeyboardInterrupt between two steps."""
        if self.step == 0:
            self.save()  # a disk that is full is found out now, and there is always a checkpoint to go back to
        if self._has_stopped_rising():
            return
        towers = self.model.image_size, self.model.context_length, self.model.tokenizer, self.model.full_captions
        maker = BatchMaker(self.images, self.recipe, *towers, rank=self.ranks.rank, ranks=self.ranks.count)
        step = self._step()
        every = max(1, round(self.recipe.evaluation.every * self.steps))
        self.model.train()
        logged = saved = clock = time.perf_counter()
        logged_step = self.step
        for batch in make_loader(maker, self.step, self.steps, self.recipe.data.workers):
            draw_apart(self.ranks, self.recipe.seed, self.step)
            rate = learning_rate(self.step, self.steps, self.recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * (group["peak"] / self.recipe.optimizer.lr)
            batch = finish_views(batch.to(self.device))
            loss, terms = step(batch)
            agreed = agree(self.ranks, loss, terms, batch.broken, interrupted())
            self._note_broken(agreed.broken, log)
            self._stop_if_not_finite(agreed.loss, agreed.terms)
            self.optimizer.zero_grad()
            loss.backward()
            if self.recipe.optimizer.clip_norm:
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_norm)
                self._stop_if_not_finite(norm, agreed.terms)
            self.optimizer.step()
            self.model.clamp_logit_scale()
            self.objective.clamp_logit_scale()
            self.step += 1

            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            judged = self.step % every == 0 or self.step == self.steps
            if judged or now - logged >= LOG_SECONDS:
                speed = (self.step - logged_step) * self.recipe.schedule.batch_size / max(now - logged, 1e-9)
                log.train(self._row(agreed.loss, agreed.terms, rate, speed))
            if judged:
                self._judge(log, float(agreed.loss.detach()))
            if judged or now - saved >= SAVE_SECONDS:
                self.save()
                saved = time.perf_counter()
            if judged or now - logged >= LOG_SECONDS:
                # Judging and saving are not training: they count neither as time nor in the speed.
                logged = clock = time.perf_counter()
                logged_step = self.step
            if self._has_stopped_rising():
                log.say(f"Stopped at step {self.step}: no better held-out score since step {self.best_step}.")
                break
            if agreed.interrupted or (self.ranks.count == 1 and interrupted()):
                self.stopping = True
                raise KeyboardInterrupt

    def _step(self) -> nn.Module:
        if self.ranks.count > 1 and self.recipe.engine.sync_batch_norm:
            synchronise(self.model, self.ranks)
            synchronise(self.objective, self.ranks)
        model: Any = torch.compile(self.model) if self.recipe.engine.compile else self.model
        return share_gradients(Step(model, self.objective, self.recipe.engine.precision, self.ranks), self.ranks)

    def _row(self, loss: Tensor, terms: dict[str, Tensor], rate: float, speed: float) -> dict[str, Any]:
        if self.device.type == "cuda":
            self.peak_memory = max(self.peak_memory, torch.cuda.max_memory_allocated())
        elif time.perf_counter() - self.memory_read >= MEMORY_SECONDS:  # reading it takes tens of milliseconds
            self.peak_memory, self.memory_read = max(self.peak_memory, resident_bytes()), time.perf_counter()
        return {
            "step": self.step,
            "pairs": self.step * self.recipe.schedule.batch_size,
            "seconds": round(self.seconds, 2),
            "loss": float(loss.detach()),
            "terms": {name: float(value.detach()) for name, value in terms.items()},
            "logit_scale": float(self.model.clip.logit_scale.detach().exp()),
            "lr": rate,
            "samples_per_second": round(speed, 1),
        }

    def _judge(self, log: RunLog, loss: float) -> None:
        """Score the held-out pairs, keep the best weights, and warn where the run has begun to overfit."""
        own = None if self.held_out is None else self.held_out.score(self.model, self.device, self.token_wise)
        metrics = broadcast(own, self.ranks)
        if metrics is None:
            return
        self.sound = math.isfinite(metrics["score"])
        if not self.sound:
            return
        pairs, seconds = self.step * self.recipe.schedule.batch_size, round(self.seconds, 2)
        rounded = {name: round(value, 3) for name, value in metrics.items()}
        log.held_out({"step": self.step, "pairs": pairs, "seconds": seconds, "held_out": rounded})
        if metrics["score"] > self.best_score:
            self.best_score, self.best_step = metrics["score"], self.step
            self.worse_in_a_row, self.loss_at_best = 0, loss
            if not self.ranks.rank:
                save_weights(self.out / WEIGHTS_BEST, self.model.clip.state_dict())
                if heads := heads_of(self.model, self.objective):
                    save_weights(self.out / HEADS_BEST, heads)
            return
        self.worse_in_a_row += 1
        if self.worse_in_a_row >= 3 and loss < self.loss_at_best and not self.warned:
            self.warned = True
            log.say(
                f"Overfitting: the loss still falls ({self.loss_at_best:.3f} to {loss:.3f}) but the held-out score has "
                f"not risen since step {self.best_step} ({self.best_score:.1f}, now {metrics['score']:.1f}). The best "
                "weights are kept; train for fewer epochs, or add pairs or supervision.",
                style="yellow",
            )

    def _has_stopped_rising(self) -> bool:
        patience = self.recipe.evaluation.patience
        return bool(patience) and self.worse_in_a_row >= patience

    def _stop_if_not_finite(self, loss_or_norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Stop before a step that would spoil the weights. The last checkpoint stays: these may be spoilt already."""
        if math.isfinite(float(loss_or_norm.detach())):
            return
        bad = [name for name, value in terms.items() if not math.isfinite(float(value.detach()))]
        what = "loss" if bad else "gradient of the loss"
        raise self._not_a_number(f"{what} is not a number at step {self.step + 1} (term {', '.join(bad or terms)})")

    def _not_a_number(self, what: str) -> InputError:
        return InputError(
            f"The {what}: the last good weights are kept in {self.out / 'checkpoints'}; lower optimizer.lr "
            f"(now {self.recipe.optimizer.lr:g}) or look at the pairs."
        )

    def _note_broken(self, broken: tuple[tuple[int, str, str], ...], log: RunLog) -> None:
        for index, where, reason in broken:
            if index not in self.broken:
                self.broken.add(index)
                pair = BrokenPair(self.images.source.key(index), where, reason)
                log.say(f"skipped: {pair}", style="yellow")
                check_broken(len(self.broken), pair, len(self.images.source), self.recipe.data.broken_limit)

    def save(self) -> None:
        """Write checkpoints/last.pt, unless the weights are no longer numbers: then the earlier one stays."""
        self.sound = self.sound and all(bool(parameter.isfinite().all()) for parameter in self.parameters)
        if not self.sound or self.ranks.rank:
            return
        save_checkpoint(
            self.out,
            {
                "model": self.model.state_dict(),
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "progress": {name: getattr(self, name) for name in self._PROGRESS},
            },
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, value in state["progress"].items():
            setattr(self, name, value)
        if not self.ranks.rank:
            cut_metrics(self.out, self.step)

    _PROGRESS = (
        *("step", "seconds", "peak_memory"),
        *("best_score", "best_step", "worse_in_a_row", "loss_at_best", "warned"),
    )

    def finish(self) -> dict[str, Any]:
        """Turn the run folder into an open_clip model (the best weights) and sum the run up."""
        if not self.sound:
            raise self._not_a_number(f"model's output is not a number after step {self.step}")
        if not self.ranks.rank:
            self._write_model()
        pairs_seen = self.step * self.recipe.schedule.batch_size
        return {
            "run": str(self.out),
            "recipe": self.recipe.name,
            "training_pairs": len(self.images.source),
            "steps": self.step,
            "pairs_seen": pairs_seen,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(pairs_seen / max(self.seconds, 1e-9), 1),
            "peak_memory_gb": round(self.peak_memory / 2**30, 2),
            "held_out_score": None if self.held_out is None else round(self.best_score, 2),
            "best_step": self.best_step,
            "broken": len(self.broken),
        }

    def _write_model(self) -> None:
        last = {WEIGHTS: self.model.clip.state_dict(), HEADS: heads_of(self.model, self.objective)}
        for name, best in ((WEIGHTS, self.out / WEIGHTS_BEST), (HEADS, self.out / HEADS_BEST)):
            if best.is_file():
                write_atomically(self.out / name, functools.partial(shutil.copyfile, best))
            elif last[name]:
                save_weights(self.out / name, last[name])
        if isinstance(self.model.tokenizer, HuggingFaceTokenizer):
            self.model.tokenizer.save(self.out)
        write_config(self.out, open_clip_config(self.recipe))
