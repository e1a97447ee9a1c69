"""What a row of metrics.jsonl says of a step beyond its losses: where time goes, gradients, how well it compares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.apart import text_hash
from declip.data.batch import Batch
from declip.data.decoded import Images
from declip.model.dual_encoder import DualEncoder, Features
from declip.model.towers import patch_dropouts
from declip.objectives.nearest_neighbour import NearestNeighbour, mean_age
from declip.objectives.objective import Objective
from declip.ranks import Ranks
from declip.recipe import Recipe
from declip.training.flops import pair_flops, peak_flops
from declip.training.gradients import LossScale
from declip.training.optimizer import LOGIT_SCALES
from declip.training.step import autocast

ROWS = 2048  # of a batch at most are compared with one another
LOOKED_UP = 64  # neighbours at most whose captions are read


def tower_parameters(model: DualEncoder, objective: Objective) -> dict[str, list[nn.Parameter]]:
    """All parameters: those of the image tower, of the text tower, and the rest, heads and logit scales."""
    named = dict(model.named_parameters())
    scales = {name for name in named if name.rsplit(".", 1)[-1] in LOGIT_SCALES}
    image = {name for name in named if name.startswith("clip.visual.")}
    return {
        "image": [named[name] for name in sorted(image)],
        "text": [named[name] for name in sorted(named.keys() - image - scales)],
        "heads": [*objective.parameters(), *(named[name] for name in sorted(scales))],
    }


class Watch:
    """Looks at the steps that are to be logged, on rank 0 alone and at its part of the batch; nothing waits for others.

    `begin` says before the forward pass whether the step is such a one. In all others nothing is computed or kept here
    but the time that the loop waits for the loader.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        model: DualEncoder,
        objective: Objective,
        images: Images,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.device, self.images, self.ranks = recipe, device, images, ranks
        self.towers = tower_parameters(model, objective)
        self.neighbours: NearestNeighbour | None = None
        if "nearest_neighbour" in objective.terms:
            self.neighbours = objective.terms["nearest_neighbour"]  # type: ignore[assignment]
        active = recipe.terms.active()
        compared = [active[name] for name in ("contrastive", "sigmoid", "nearest_neighbour") if name in active]
        self.text_view = compared[0].texts[0] if compared else None  # type: ignore[attr-defined]
        self.waited, self.on, self.tokens = 0.0, False, 0
        self.norms: dict[str, Tensor] = {}
        self.accuracy: Tensor | None = None
        self.ring: tuple[Tensor, Tensor, Tensor] | None = None  # pointer and ids of the queue, ids of the batch
        self.peak = _peak(recipe, device)
        self.dropouts = patch_dropouts(model.clip)
        self.flops: dict[float, float | None] = {}  # of a pair, by the share of patches left out, once counted
        objective.register_forward_pre_hook(self._look)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches; adds up how long they were waited for."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def begin(self, on: bool) -> bool:
        """Before the forward pass: whether this step is to be logged; only rank 0 logs."""
        self.on = on and not self.ranks.rank
        return self.on

    @torch.no_grad()
    def _look(self, _: nn.Module, inputs: tuple[Features, Batch]) -> None:
        """Between towers and terms, before the batch enters the queue; the device is given work, not waited for."""
        if not self.on:
            return
        features, batch = inputs
        self.tokens = batch.tokens.shape[-1]
        if self.text_view is not None:
            text, tokens = features.text[self.text_view], batch.tokens[batch.text_views.index(self.text_view)]
            self.accuracy = image_to_text_accuracy(features.image[0, :ROWS], text[:ROWS], tokens[:ROWS])
        if self.neighbours is not None:
            queue = self.neighbours
            self.ring = queue.pointer.clone(), queue.queue_ids.clone(), batch.sample_ids[:LOOKED_UP]

    def read_gradients(self, scale: LossScale) -> None:
        """After the backward pass, before anything changes the gradients: the norm of each tower's.

        Not where they are sharded: each rank has its part alone.
        """
        if not self.on or self.recipe.engine.shard:
            return
        for name, parameters in self.towers.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.stack(torch._foreach_norm(gradients)).norm() if gradients else torch.zeros(())
            self.norms[name] = norm / scale.value

    def row(self, norm: Tensor, seconds: float, speed: float) -> dict[str, Any]:
        """What the row of the step says; here the device is waited for.

        norm: of all gradients; seconds: since the row before; speed: pairs a second since then, of all ranks

        data_wait: share of the time that the loop waited for the loader
        gradient_norm: before clipping; `heads` are all parameters outside of the towers, logit scales too; only the
            total where the model is sharded
        contrastive_accuracy: `image_to_text_accuracy` of this rank's first image and text view; only where a term
            trains these embeddings
        queue_age: `nearest_neighbour.mean_age`; null while the queue is empty
        neighbour_matches: share of the neighbours found that are the sample itself or have a caption in common with it;
            null where none was found; only where the images are kept in memory: captions on disk take long to look up
        mfu: FLOPs of the towers (`pair_flops`) over what the GPU's data sheet promises; only for the GPUs known; null
            where a tower's FLOPs cannot be counted
        """
        row: dict[str, Any] = {"data_wait": round(self.waited / max(seconds, 1e-9), 4)}
        self.waited = 0.0
        row["gradient_norm"] = {"total": float(norm), **{name: float(value) for name, value in self.norms.items()}}
        if self.accuracy is not None:
            row["contrastive_accuracy"] = round(float(self.accuracy), 4)
        if self.neighbours is not None and self.ring is not None:
            pointer, queue_ids, sample_ids = self.ring
            ranks = self.ranks.count if self.neighbours.per_rank else 1
            batch, views = self.recipe.schedule.batch_size // ranks, len(self.neighbours.enqueue)
            row["queue_age"] = mean_age(int(pointer), len(queue_ids), bool(queue_ids[-1] >= 0), batch, views)
            if self.images.kept is not None and self.neighbours.found is not None:
                rows, found = (part[0, :LOOKED_UP] for part in self.neighbours.found)
                pairs = zip(sample_ids[found].tolist(), queue_ids[rows[found]].tolist(), strict=True)
                row["neighbour_matches"] = self._matches(list(pairs))
        if self.peak is not None:
            row["mfu"] = self._mfu(speed, self.peak)
        return row

    def _matches(self, pairs: list[tuple[int, int]]) -> float | None:
        """The share of sample ids, one and its neighbour's, that are equal or of pairs with a caption in common."""

        def captions(index: int) -> set[int]:
            # What a queue begins with, random directions, has no captions.
            return {text_hash(caption) for caption in self.images.source.captions(index)} if index >= 0 else set()

        matches = [one == other or bool(captions(one) & captions(other)) for one, other in pairs]
        return round(sum(matches) / len(matches), 4) if matches else None

    def _mfu(self, speed: float, peak: float) -> float | None:
        left_out = max((dropout.prob for dropout in self.dropouts), default=0.0)
        if left_out not in self.flops:
            model = self.recipe.model.model_copy(update={"patch_dropout": left_out})
            try:
                self.flops[left_out] = pair_flops(self.recipe.model_copy(update={"model": model}), self.tokens)
            except Exception:  # of any library's tower that asks for numbers which a tensor without data does not have
                self.flops[left_out] = None
        flops = self.flops[left_out]
        return None if flops is None else round(speed / self.ranks.count * flops / peak, 4)


@torch.no_grad()
def image_to_text_accuracy(images: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
    """Share of the images whose most similar text is their own, or one of the same tokens: a scalar.

    images, texts: [batch, dim], normalised or not; tokens: int64 [batch, tokens]
    """
    found = (images.float() @ F.normalize(texts.float(), dim=-1).T).argmax(dim=-1)
    return (tokens[found] == tokens).all(dim=-1).float().mean()


def _peak(recipe: Recipe, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    with autocast(device, recipe.engine.precision):
        return peak_flops(torch.cuda.get_device_name(device), torch.is_autocast_enabled("cuda"))
