"""A run: pairs, views, towers, terms, steps. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from declip.data.decoded import Images, check_broken, open_images
from declip.data.device_views import finish_views
from declip.data.huggingface_tokenizer import HuggingFaceTokenizer
from declip.data.loader import BatchMaker, make_loader
from declip.data.sources import BrokenPair
from declip.errors import Diverged, InputError, Preempted, RunStopped, first_line
from declip.files import save_weights, write_atomically
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import TokenWise
from declip.model.export import HEADS, WEIGHTS, open_clip_config, write_config
from declip.objectives.objective import Objective, build_objective
from declip.recipe import Recipe
from declip.training.checkpoint import (
    FORMAT,
    HEADS_BEST,
    WEIGHTS_BEST,
    check_run,
    checkpoints,
    make_run,
    read_newest,
    step_of,
)
from declip.training.guard import Guard
from declip.training.heads import heads_of, start_from
from declip.training.held_out import HeldOut
from declip.training.interrupts import Interrupts, interrupts_between_steps
from declip.training.logging import RunLog, cut_metrics, resident_bytes
from declip.training.optimizer import build_optimizer, learning_rate
from declip.training.pairs import epoch_pairs, open_pairs, total_steps, used_tokens
from declip.training.saving import Saver

LOG_SECONDS = 0.5
MEMORY_SECONDS = 5.0


def train(recipe: Recipe, out: str | Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a recipe into the run folder `out` and return a summary of the run.

    Raises InputError for bad input and for a run that has diverged; KeyboardInterrupt on Ctrl-C and Preempted on
    SIGTERM, after the state is saved.
    """
    out = Path(out)
    going_on = check_run(out, recipe, resume)
    device = pick_device(recipe.engine.device)
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
    if held_images:
        held_out = HeldOut(held_images, recipe, model.image_size, model.context_length, model.tokenizer)
    make_run(out, recipe)
    with Saver(out, recipe.engine.keep) as saver:
        run = Run(recipe, out, device, model, objective, images, held_out, steps, saver)
        if going_on:
            run.restore(read_newest(out, recipe))
            cut_metrics(out, run.step)
        with RunLog(out, recipe.name, steps, run.step, quiet) as log, interrupts_between_steps() as interrupts:
            _go_to_the_end(run, log, interrupts)
    return run.finish()


def _go_to_the_end(run: Run, log: RunLog, interrupts: Interrupts) -> None:
    """Train; save where something outside stops the run; go back where it diverges, as the recipe says."""
    going_on = "To go on: the same command with --resume."
    while True:
        try:
            run.go(log, interrupts)
            return
        except Diverged as divergence:
            interrupts.settle()
            run.roll_back(str(divergence), log)
        except (KeyboardInterrupt, Preempted, RunStopped) as error:
            interrupts.settle()
            # The state in the middle of a step could not be resumed exactly.
            saved = "the last checkpoint is kept" if interrupts.late else run.save_at_once()
            where = f"step {run.step} of {run.steps}"
            if isinstance(error, KeyboardInterrupt):
                log.say(f"\nStopped at {where}; {saved}. {going_on}")
                raise
            # A loader process that SIGTERM reached too has not died of anything else.
            if isinstance(error, Preempted) or interrupts.preempted:
                raise Preempted(f"Stopped by SIGTERM at {where}; {saved}. {going_on}") from None
            raise RunStopped(f"{error} The run is {saved} at {where}. {going_on}") from None


def pick_device(name: str) -> torch.device:
    """The device a recipe names; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"engine.device = {name!r} cannot be used: {first_line(error)}.") from None


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bfloat16 autocast where it is asked for, or with `auto` where the device computes in it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_computes_bfloat16(device)
        precision = "bfloat16" if native else "float32"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"))
        if device.type == "cpu" and precision == "bfloat16":
            # PyTorch's flash attention for CPUs takes two to five times longer than plain products in bfloat16.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@functools.cache
def _cpu_computes_bfloat16(device: torch.device) -> bool:
    # Without these instructions bfloat16 is emulated, about twenty times slower than float32.
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.is_file():
        return False
    return bool({"amx_bf16", "avx512_bf16"} & set(cpuinfo.read_text().split()))


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
        saver: Saver,
    ) -> None:
        self.recipe, self.out, self.device, self.held_out, self.steps = recipe, out, device, held_out, steps
        self.images, self.saver = images, saver
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
        self.loss_at_best = math.inf
        self.roll_backs, self.rate_factor, self.rolled_to = 0, 1.0, -1
        self.guard = Guard([model, objective], self.optimizer, recipe.engine)
        kept = images.kept or []
        self.broken = {index for index, image in enumerate(kept) if isinstance(image, BrokenPair)}

    def go(self, log: RunLog, interrupts: Interrupts) -> None:
        """Train from the step reached to the end; raises KeyboardInterrupt and Preempted between two steps."""
        if self.step == 0:
            self.save()
            self.saver.wait()  # a disk that is full is found out now, and there is always a checkpoint to go back to
        if self._has_stopped_rising():
            return
        towers = self.model.image_size, self.model.context_length, self.model.tokenizer, self.model.full_captions
        maker = BatchMaker(self.images, self.recipe, *towers)
        model = torch.compile(self.model) if self.recipe.engine.compile else self.model
        every = max(1, round(self.recipe.evaluation.every * self.steps))
        self.model.train()
        logged = saved = clock = time.perf_counter()
        logged_step = self.step
        for batch in make_loader(maker, self.step, self.steps, self.recipe.data.workers):
            self._note_broken(batch.broken, log)
            rate = self.rate_factor * learning_rate(self.step, self.steps, self.recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * (group["peak"] / self.recipe.optimizer.lr)
            batch = finish_views(batch.to(self.device))
            self.guard.before_forward()
            with autocast(self.device, self.recipe.engine.precision):
                features = model(batch)
            loss, terms = self.objective(features, batch)
            self.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_norm or math.inf)
            if skipped := self.guard.step(self.step + 1, loss, norm, terms):
                log.say(f"skipped: {skipped}", style="yellow")
            self.model.clamp_logit_scale()
            self.objective.clamp_logit_scale()
            self.step += 1

            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            judged = self.step % every == 0 or self.step == self.steps
            if judged or now - logged >= LOG_SECONDS:
                speed = (self.step - logged_step) * self.recipe.schedule.batch_size / max(now - logged, 1e-9)
                log.train(self._row(loss, terms, rate, speed))
            if judged:
                best = self._judge(log, float(loss.detach()))
            # A checkpoint that falls due while another is being written waits for it in the background.
            if judged or (now - saved >= self.recipe.engine.save_seconds and not self.saver.busy):
                self.save(best=judged and best)
                saved = time.perf_counter()
            if judged or now - logged >= LOG_SECONDS:
                # Judging and saving are not training: they count neither as time nor in the speed.
                logged = clock = time.perf_counter()
                logged_step = self.step
            if self._has_stopped_rising():
                log.say(f"Stopped at step {self.step}: no better held-out score since step {self.best_step}.")
                break
            interrupts.check()
        self.saver.wait()

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
            "skipped": self.guard.skipped,
        }

    def _judge(self, log: RunLog, loss: float) -> bool:
        """Score the held-out pairs, whether they are the best so far, and warn where the run has begun to overfit."""
        if self.held_out is None:
            return False
        metrics = self.held_out.score(self.model, self.device, self.token_wise)
        if not math.isfinite(metrics["score"]):
            raise self._no_number()
        pairs, seconds = self.step * self.recipe.schedule.batch_size, round(self.seconds, 2)
        rounded = {name: round(value, 3) for name, value in metrics.items()}
        log.held_out({"step": self.step, "pairs": pairs, "seconds": seconds, "held_out": rounded})
        if metrics["score"] > self.best_score:
            self.best_score, self.best_step = metrics["score"], self.step
            self.worse_in_a_row, self.loss_at_best = 0, loss
            return True
        self.worse_in_a_row += 1
        if self.worse_in_a_row >= 3 and loss < self.loss_at_best and not self.warned:
            self.warned = True
            log.say(
                f"Overfitting: the loss still falls ({self.loss_at_best:.3f} to {loss:.3f}) but the held-out score has "
                f"not risen since step {self.best_step} ({self.best_score:.1f}, now {metrics['score']:.1f}). The best "
                "weights are kept; train for fewer epochs, or add pairs or supervision.",
                style="yellow",
            )
        return False

    def _has_stopped_rising(self) -> bool:
        patience = self.recipe.evaluation.patience
        return bool(patience) and self.worse_in_a_row >= patience

    def _no_number(self) -> Diverged:
        return Diverged(f"The model's output is not a number after step {self.step}")

    def _note_broken(self, broken: tuple[tuple[int, str, str], ...], log: RunLog) -> None:
        for index, where, reason in broken:
            if index not in self.broken:
                self.broken.add(index)
                pair = BrokenPair(self.images.source.key(index), where, reason)
                log.say(f"skipped: {pair}", style="yellow")
                check_broken(len(self.broken), pair, len(self.images.source), self.recipe.data.broken_limit)

    def save(self, best: bool = False) -> None:
        """Have a checkpoint written, and the best weights; raises Diverged where the weights are no numbers."""
        self.guard.read(self.step)
        # A sum is not finite where a summand is not, and takes a twentieth of the time of asking each.
        if not torch.stack([parameter.detach().sum() for parameter in self.parameters]).isfinite().all():
            raise self._no_number()
        weights = {}
        if best:
            weights[WEIGHTS_BEST] = self.model.clip.state_dict()
            if heads := heads_of(self.model, self.objective):
                weights[HEADS_BEST] = heads
        self.saver.save(self.step, self.state(), weights)

    def save_at_once(self) -> str:
        """Save and wait for it; whether it is saved, in words."""
        try:
            self.save()
        except Diverged as divergence:
            return f"not saved, for {str(divergence)[0].lower()}{str(divergence)[1:]}; the last good checkpoint is kept"
        self.saver.wait()
        return "saved"

    def state(self) -> dict[str, Any]:
        """What a resumed run needs. The weights' moving average and the gradient scaler belong here too."""
        return {
            "format": FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "progress": {name: getattr(self, name) for name in self._PROGRESS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        peaks = [group["peak"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak"] = peak
        self.guard.restore(state["guard"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, value in state["progress"].items():
            setattr(self, name, value)

    _PROGRESS = (
        *("step", "seconds", "peak_memory", "roll_backs", "rate_factor", "rolled_to"),
        *("best_score", "best_step", "worse_in_a_row", "loss_at_best", "warned"),
    )

    def roll_back(self, divergence: str, log: RunLog) -> None:
        """Go back to the last good checkpoint with a lower learning rate; raises InputError where the run shall stop.

        Where it diverges again from the checkpoint that it went back to, that was not good: the one before is taken.
        """
        engine, tried = self.recipe.engine, self.roll_backs
        if engine.on_divergence == "stop" or tried == engine.roll_backs:
            again = f" after {tried} goings back" if tried else ""
            raise InputError(
                f"{divergence}{again}: the last good weights are kept in {self.out / 'checkpoints'}; lower "
                f"optimizer.lr (now {self.recipe.optimizer.lr:g}) or look at the pairs."
            )
        self.saver.wait()
        factor, rolled_to = self.rate_factor * engine.roll_back_lr, self.rolled_to
        newest = step_of(checkpoints(self.out)[0])
        self.restore(read_newest(self.out, self.recipe, before=newest if newest == rolled_to else None))
        self.roll_backs, self.rate_factor, self.rolled_to = tried + 1, factor, self.step
        log.cut(self.step)
        log.say(f"{divergence}: back to step {self.step} with {factor:g} of the learning rate.", style="yellow")
        self.save()  # a run that is killed now goes on from here too

    def finish(self) -> dict[str, Any]:
        """Turn the run folder into an open_clip model (the best weights) and sum the run up."""
        last = {WEIGHTS: self.model.clip.state_dict(), HEADS: heads_of(self.model, self.objective)}
        for name, best in ((WEIGHTS, self.out / WEIGHTS_BEST), (HEADS, self.out / HEADS_BEST)):
            if best.is_file():
                write_atomically(self.out / name, functools.partial(shutil.copyfile, best))
            elif last[name]:
                save_weights(self.out / name, last[name])
        if isinstance(self.model.tokenizer, HuggingFaceTokenizer):
            self.model.tokenizer.save(self.out)
        write_config(self.out, open_clip_config(self.recipe))
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
            "skipped": self.guard.skipped,
            "roll_backs": self.roll_backs,
        }
