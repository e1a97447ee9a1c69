"""Muon: momentum whose matrices are made orthogonal, with Adam for what is no matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

MOMENTUM = 0.95  # its author's
LEAST, LONGEST = 4, 128  # fewer rows or columns, or sides of a larger ratio, are no matrix to make orthogonal
_SMALLEST_NORM = 1e-7
_ITERATIONS = (  # a, b, c of x ↦ a·x + b·x³ + c·x⁵, which take singular values in (0, 1] near 1 (leloykun, 2024)
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum; Adam, decayed as in AdamW, where a group says `use_fallback`.

    Kernels of convolutions count as matrices [out, in × height × width], queries, keys and values as one matrix for
    each head (see `attention_heads`), which takes a fraction of the time. Steps are as large as AdamW's (Liu et al.,
    2025, arXiv 2502.16982), so that rates are of the same order. Matrices of one shape are computed together. Where
    `found_inf` is set, as for PyTorch's fused optimizers, no step is taken on the device where it is 1.
    """

    found_inf: Tensor | None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        heads: dict[Tensor, int] | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "use_fallback": False}
        super().__init__(groups, {**defaults, "fused": True})
        self.heads = heads or {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            matrices: list[Tensor] = []
            others: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (matrices if not group["use_fallback"] and is_matrix(parameter) else others).append(parameter)
            self._step_matrices(group, matrices, skip)
            self._step_others(group, others, skip)
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor], skip: Tensor | None) -> None:
        shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            momentum = state.get("momentum_buffer")
            if momentum is None:
                momentum = state["momentum_buffer"] = torch.zeros_like(parameter)
            changed = momentum.lerp(gradient, 1 - MOMENTUM)
            momentum.copy_(changed if skip is None else torch.where(skip > 0, momentum, changed))
            columns = parameter[0].numel()
            update = gradient.lerp(changed, MOMENTUM).reshape(self.heads.get(parameter, 1), -1, columns)
            shapes[tuple(update.shape[1:])].append((parameter, update))
        for shape, found in shapes.items():
            updates = orthogonal(torch.cat([update for _, update in found]).float())
            parts = torch.split(updates, [len(update) for _, update in found])
            for (parameter, _), update in zip(found, parts, strict=True):
                changed = parameter * (1 - group["lr"] * group["weight_decay"])
                changed.add_(update.reshape(parameter.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
                parameter.copy_(changed if skip is None else torch.where(skip > 0, parameter, changed))

    def _step_others(self, group: dict[str, Any], parameters: list[Tensor], skip: Tensor | None) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon makes its steps orthogonal: not of vectors, depthwise kernels, and what is nearly a vector."""
    if parameter.ndim < 2 or min(parameter.shape[:2]) == 1:
        return False
    sides = parameter.shape[0], parameter[0].numel()
    return min(sides) >= LEAST and max(sides) <= LONGEST * min(sides)


def attention_heads(module: nn.Module) -> dict[Tensor, int]:
    """How many heads' matrices lie in each weight that gives queries, keys or values, one below the other.

    Those of PyTorch's attention and of modules that have `num_heads` and layers `q_proj`, `k_proj` and `v_proj`
    (open_clip's attention pool) or `qkv` (timm's).
    """
    found: dict[Tensor, int] = {}
    for part in module.modules():
        count = getattr(part, "num_heads", None)
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found[part.in_proj_weight] = 3 * part.num_heads
        elif isinstance(count, int):
            layers = {name: layer for name, layer in part.named_children() if isinstance(layer, nn.Linear)}
            found |= {layers[name].weight: count for name in ("q_proj", "k_proj", "v_proj") if name in layers}
            found |= {layers[name].weight: 3 * count for name in ("qkv",) if name in layers}
    return {weight: count for weight, count in found.items() if weight.shape[0] % count == 0}


def orthogonal(matrices: Tensor) -> Tensor:
    """U·Vᵀ of each matrix U·S·Vᵀ, nearly: singular values between about 0.7 and 1.2, by Newton and Schulz.

    matrices: [count, rows, columns] in float32, in which it is computed: CPUs without bfloat16 take a hundred times
        longer in it. All iterations act on the small square matrix X·Xᵀ alone, so that a step takes from a third
        (kernels) to all (square matrices) of the time that iterations on X take.
    """
    wide = matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    square = wide @ wide.mT
    product = None
    for place, (a, b, c) in enumerate(_ITERATIONS):
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if place < len(_ITERATIONS) - 1:
            square = factor @ square @ factor
    assert product is not None
    found: Tensor = product @ wide
    return found.mT if matrices.size(-2) > matrices.size(-1) else found
