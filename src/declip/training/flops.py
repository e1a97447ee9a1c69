"""What a step of the towers costs in floating-point operations, and what known GPUs can do: model FLOPs utilisation."""

from __future__ import annotations

import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from declip.data.batch import Batch
from declip.model.dual_encoder import DualEncoder
from declip.recipe import Recipe

# Dense peaks of the makers' data sheets in TFLOP/s: bfloat16 on tensor cores, float32 without them (PyTorch uses no
# TF32 for products unless asked). The first name that a GPU's own begins with, after the maker's, counts.
PEAKS = {
    "B200": (2250.0, 80.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def peak_flops(gpu: str, bfloat16: bool) -> float | None:
    """FLOP/s of a GPU by its name, as `torch.cuda.get_device_name` says it; None where it is not known."""
    for name, (half, single) in PEAKS.items():
        if re.match(rf"(NVIDIA )?(GeForce )?{name}(?![A-Za-z0-9]| D\b)", gpu):
            return 1e12 * (half if bfloat16 else single)
    return None


def pair_flops(recipe: Recipe, tokens: int) -> float:
    """FLOPs of the towers for one pair with all its views, forward and backward, captions `tokens` long.

    What a moving average of the weights makes of a pair, where a term asks, counts too.

    Counted operator by operator on tensors without data: a product of [a, b] and [b, c] is 2abc. What is computed again
    to save memory does not count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), nor do heads and losses.
    """
    engine = recipe.engine.model_copy(update={"micro_batch": None, "grad_checkpointing": False})
    recipe, pairs = recipe.model_copy(update={"engine": engine}), 2
    with FakeTensorMode(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):  # else attention is opaque
        model = DualEncoder(recipe)
        batch = Batch(
            images=torch.zeros(recipe.image_views, pairs, model.view_size, model.view_size, 3, dtype=torch.uint8),
            tokens=torch.zeros(len(recipe.text_views), pairs, tokens, dtype=torch.int64),
            text_views=tuple(recipe.text_views),
            labels=None,
            sample_ids=torch.arange(pairs),
            local_images=torch.zeros(recipe.local_views, pairs, *[model.local_size] * 2, 3, dtype=torch.uint8)
            if recipe.local_views
            else None,
        )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with FlopCounterMode(display=False) as counter:
            features = model(batch)
            found = [features.image, *features.text.values()]
            found += [] if features.local_image is None else [features.local_image]
            total = torch.stack([each.sum() for each in found]).sum()
            torch.autograd.grad(total, parameters, allow_unused=True)
            if (term := recipe.terms.active().get("teacher_contrast")) is not None:
                with torch.no_grad():
                    model(batch.part(term.images, term.seen_by_average))  # type: ignore[attr-defined]
    return float(counter.get_total_flops()) / pairs
