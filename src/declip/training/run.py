"""The state of a run between two steps: judging it, saving it, going back, finishing."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.data.decoded import Images, check_broken
from declip.data.huggingface_tokenizer import HuggingFaceTokenizer
from declip.data.kept import Kept
from declip.data.sources import BrokenPair
from declip.errors import Diverged, RunDiverged
from declip.files import save_weights, write_atomically
from declip.model.depthwise import hasten_depthwise
from declip.model.dual_encoder import DualEncoder
from declip.model.embed import TokenWise
from declip.model.export import HEADS, WEIGHTS, open_clip_config, write_config
from declip.model.tuning import plain_state
from declip.objectives.objective import Objective
from declip.ranks import Ranks
from declip.recipe import Recipe, parse_recipe
from declip.training.anchor import Anchor
from declip.training.average import WeightAverage
from declip.training.checkpoint import FORMAT, HEADS_BEST, WEIGHTS_BEST, checkpoints, read_newest, step_of
from declip.training.distributed import Broken, broadcast, collect
from declip.training.gradients import LossScale
from declip.training.guard import Guard
from declip.training.heads import heads_of
from declip.training.held_out import HeldOut
from declip.training.logging import RunLog, resident_bytes
from declip.training.optimizer import build_optimizer, same_rates
from declip.training.pairs import epoch_pairs, total_steps
from declip.training.saving import Saver
from declip.training.sharding import WholeCopy, gather_weights, load_optimizer, load_weights, optimizer_state, shard
from declip.training.step import Step
from declip.training.watch import Watch

MEMORY_SECONDS = 5.0


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
        ranks: Ranks,
        first: dict[str, Tensor],
    ) -> None:
        """first: the towers' tensors that came from weights, where the recipe comes back to them."""
        self.recipe, self.out, self.device, self.held_out, self.steps = recipe, out, device, held_out, steps
        self.images, self.saver, self.ranks = images, saver, ranks
        self.model, self.objective = model, objective
        self.token_wise = None
        if recipe.similarity == "token_wise":
            self.token_wise = TokenWise(objective.terms["token_wise"].mappings, not recipe.pads_captions)  # type: ignore[arg-type]
        self.compute = Step(model, objective, recipe.engine.precision, ranks)
        self.whole_copy = None
        if recipe.engine.shard:
            judged = broadcast(held_out is not None, ranks)
            mappings = [] if self.token_wise is None else [self.token_wise.mappings]
            self.whole_copy = WholeCopy([model, *mappings] if judged else [], ranks)
            shard(self.compute, model.clip, device, ranks)
        else:
            self.compute.to(device)
            if device.type != "mps" and not hasattr(model.clip.visual, "transformer"):
                model.clip.visual.to(memory_format=torch.channels_last)  # convolutions are faster so
            if device.type == "cpu":
                hasten_depthwise(model.clip.visual)
        self.loss_scale = LossScale(device, moves=recipe.engine.precision == "float16")
        self.optimizer = build_optimizer([model, objective], recipe.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.first = first
        strength = recipe.optimizer.start_decay
        self.anchor = Anchor(model.clip, first, strength) if strength else None
        self.average, self.averages_first = None, recipe.optimizer.ema_update == "before"
        if recipe.optimizer.averages:
            decay = recipe.optimizer.ema_decay(steps)
            self.average = WeightAverage(self.parameters, decay, warm=not self.averages_first)
            if "teacher_contrast" in objective.terms:
                self.compute.average = self.average
        self.step, self.seconds, self.peak_memory, self.memory_read = 0, 0.0, 0, -math.inf
        self._forget_best()
        self.roll_backs, self.rate_factor, self.rolled_to = 0, 1.0, -1
        self.guard = Guard([model, objective], self.optimizer, recipe.engine, self.loss_scale)
        self.watch = Watch(recipe, device, model, objective, images, ranks)
        self.kept = Kept()
        kept = images.kept or []
        self.broken = {index for index, image in enumerate(kept) if isinstance(image, BrokenPair)}

    def _forget_best(self) -> None:
        self.best_score, self.best_step, self.worse_in_a_row, self.warned = -math.inf, 0, 0, False
        self.loss_at_best, self.error_at_best = math.inf, 0.0
        self.kept_score, self.kept_step = -math.inf, 0

    def begin_step(self) -> None:
        """Before the optimizer's step."""
        if self.average is not None and self.averages_first:
            self.average.update()

    def end_step(self) -> None:
        """After the optimizer's step: the logit scales go into their ranges, the weights into their average."""
        if self.anchor is not None:
            self.anchor.pull(self.optimizer)
        self.model.clamp_logit_scale()
        self.objective.clamp_logit_scale()
        if self.average is not None and not self.averages_first:
            self.average.update()
        self.step += 1

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the weights are their moving average, where the recipe asks for one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def row(self, loss: Tensor, terms: dict[str, Tensor], rate: float, speed: float) -> dict[str, Any]:
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
            **({"loss_scale": float(self.loss_scale.value)} if self.loss_scale.moves else {}),
        }

    def judge(self, log: RunLog, loss: float) -> bool:
        """Score the held-out pairs, say whether to keep the weights, and warn where the run begins to overfit."""
        metrics = broadcast(self.score(), self.ranks)
        if metrics is None:
            return False
        if not math.isfinite(metrics["score"]):
            raise self._no_number()
        pairs, seconds = self.step * self.recipe.schedule.batch_size, round(self.seconds, 2)
        rounded = {name: round(value, 3) for name, value in metrics.items()}
        log.held_out({"step": self.step, "pairs": pairs, "seconds": seconds, "held_out": rounded})
        if metrics["score"] > self.best_score:
            self.best_score, self.best_step = metrics["score"], self.step
            self.worse_in_a_row, self.loss_at_best, self.error_at_best = 0, loss, metrics["error"]
        else:
            self.worse_in_a_row += 1
        if self.worse_in_a_row >= 3 and loss < self.loss_at_best and not self.warned:
            self.warned = True
            log.say(
                f"Overfitting: the loss still falls ({self.loss_at_best:.3f} to {loss:.3f}) but the held-out score has "
                f"not risen since step {self.best_step} ({self.best_score:.1f}, now {metrics['score']:.1f}). The best "
                "weights are kept; train for fewer epochs, or add pairs or supervision.",
                style="yellow",
            )
        if metrics["score"] < self.best_score - self.recipe.evaluation.tolerance * self.error_at_best:
            return False
        self.kept_score, self.kept_step = metrics["score"], self.step
        return True

    def score(self) -> dict[str, float] | None:
        """The held-out pairs' metrics, on rank 0 alone."""
        model, token_wise = self.model, self.token_wise
        if self.whole_copy is not None:
            copies: list[Any] = self.whole_copy.gather(self.device)
            if copies:
                model = copies[0]
                token_wise = None if token_wise is None else token_wise._replace(mappings=copies[1])
        with self.averaged():
            metrics = None if self.held_out is None else self.held_out.score(model, self.device, token_wise)
        if metrics is not None and self.held_out is not None and self.recipe.evaluation.unaveraged:
            metrics["unaveraged_score"] = self.held_out.score(model, self.device, token_wise)["score"]
        if self.whole_copy is not None:
            self.whole_copy.put_away()
        return metrics

    def has_stopped_rising(self) -> bool:
        patience = self.recipe.evaluation.patience
        return bool(patience) and self.worse_in_a_row >= patience

    def _no_number(self) -> Diverged:
        return Diverged(f"The model's output is not a number after step {self.step}")

    def note_broken(self, broken: Broken, log: RunLog) -> None:
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
        sums = torch.stack([parameter.detach().sum() for parameter in self.parameters])
        if self.ranks.sum((~sums.isfinite()).sum()):
            raise self._no_number()
        weights = {}
        if best:
            with self.averaged():
                weights[WEIGHTS_BEST] = plain_state(self.model.clip)
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
        """What a resumed run needs, sharded where the model is: `Saver` gathers it, and what it writes is whole."""
        return {
            "format": FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "apart": {name: collect(own, self.ranks) for name, own in self._apart().items()},
            "optimizer": optimizer_state(self.optimizer),
            "average": None if self.average is None else self.average.state_dict(),
            "guard": self.guard.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "progress": {name: getattr(self, name) for name in self._PROGRESS},
        }

    def _apart(self) -> dict[str, Tensor]:
        """Buffers of which each rank has its own."""
        parts = self.objective.modules() if self.ranks.count > 1 else []
        return {name: getattr(part, name) for part in parts for name in getattr(part, "own_buffers", ())}

    def read(self, before: int | None = None) -> None:
        """Take up the newest intact checkpoint, on every rank the one that rank 0 finds.

        before: one of an earlier step than this, where there is one
        """
        newest = 0 if self.ranks.rank else max((step_of(path) for path in checkpoints(self.out)), default=0)
        state = None if self.ranks.rank else read_newest(self.out, self.recipe, before, self._goes_on_from)
        step, newest = broadcast((0 if state is None else int(state["progress"]["step"]), newest), self.ranks)
        if state is None:  # the others look when rank 0 has tidied up
            state = read_newest(self.out, self.recipe, step + 1, self._goes_on_from)
        self.restore(state)
        if step < newest and parse_recipe(state["recipe"]).schedule != self.recipe.schedule:
            self._forget_best()  # the best weights in the folder may be of steps that are now taken otherwise

    def _goes_on_from(self, stored: Recipe, step: int) -> bool:
        """Whether a checkpoint fits: its schedule is this run's, or has had the same learning rates up to its step."""
        if stored.schedule == self.recipe.schedule:
            return True
        steps = total_steps(stored, epoch_pairs(stored, self.images))
        return same_rates(step, (steps, stored), (self.steps, self.recipe))

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        load_weights(self.model, state["model"])
        load_weights(self.objective, state["objective"])
        for name, own in self._apart().items():
            parts = state["apart"].get(name) or [own]  # of one process there is one queue, which all take
            own.copy_(parts[self.ranks.rank % len(parts)])
        given = [{name: group[name] for name in ("peak", "begins")} for group in self.optimizer.param_groups]
        load_optimizer(self.optimizer, state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, given, strict=True):
            group.update(values)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.guard.restore(state["guard"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for name, value in state["progress"].items():
            setattr(self, name, value)

    _PROGRESS = (
        *("step", "seconds", "peak_memory", "roll_backs", "rate_factor", "rolled_to"),
        *("best_score", "best_step", "worse_in_a_row", "loss_at_best", "warned"),
        *("error_at_best", "kept_score", "kept_step"),
    )

    def roll_back(self, divergence: str, log: RunLog) -> None:
        """Go back to the last good checkpoint with a lower learning rate; raises RunDiverged where the run shall stop.

        Where it diverges again from the checkpoint that it went back to, that was not good: the one before is taken.
        """
        engine, tried = self.recipe.engine, self.roll_backs
        if engine.on_divergence == "stop" or tried == engine.roll_backs:
            again = f" after {tried} goings back" if tried else ""
            raise RunDiverged(
                f"{divergence}{again}",
                f"the last good weights are kept in {self.out / 'checkpoints'}; lower optimizer.lr (now "
                f"{self.recipe.optimizer.lr:g}) or look at the pairs.",
            )
        self.saver.wait()
        factor = self.rate_factor * engine.roll_back_lr
        newest = broadcast(0 if self.ranks.rank else step_of(checkpoints(self.out)[0]), self.ranks)
        self.read(before=newest if newest == self.rolled_to else None)
        self.roll_backs, self.rate_factor, self.rolled_to = tried + 1, factor, self.step
        log.cut(self.step)
        log.say(f"{divergence}: back to step {self.step} with {factor:g} of the learning rate.", style="yellow")
        self.save()  # a run that is killed now goes on from here too

    def finish(self) -> dict[str, Any]:
        """Turn the run folder into an open_clip model (the best weights) and sum the run up."""
        self._write_model()
        pairs_seen = self.step * self.recipe.schedule.batch_size
        return {
            "run": str(self.out),
            "recipe": self.recipe.name,
            "training_pairs": len(self.images.source),
            "steps": self.step,
            "pairs_seen": pairs_seen,
            "seconds": round(self.seconds, 2),
            "samples_per_second": round(pairs_seen / max(self.seconds, 1e-9), 1),
            "peak_memory_gb": round(self.peak_memory / 2**30, 2),
            "held_out_score": None if self.held_out is None else round(self.kept_score, 2),
            "best_step": self.kept_step,
            "broken": len(self.broken),
            "skipped": self.guard.skipped,
            "roll_backs": self.roll_backs,
        }

    def _write_model(self) -> None:
        with self.averaged():
            weights, heads = plain_state(self.model.clip), heads_of(self.model, self.objective)
            last = {WEIGHTS: gather_weights(weights, self.ranks), HEADS: gather_weights(heads, self.ranks)}
        if self.ranks.rank:
            return
        for name, best in ((WEIGHTS, self.out / WEIGHTS_BEST), (HEADS, self.out / HEADS_BEST)):
            if best.is_file():
                write_atomically(self.out / name, functools.partial(shutil.copyfile, best))
            elif last[name]:
                save_weights(self.out / name, last[name])
        if isinstance(self.model.tokenizer, HuggingFaceTokenizer):
            self.model.tokenizer.save(self.out)
        write_config(self.out, open_clip_config(self.recipe))
