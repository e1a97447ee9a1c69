"""Products of matrices on the CPU by oneDNN, also where PyTorch would not take it: of float32.

For those PyTorch takes MKL, which does not use AVX-512 on AMD's processors; oneDNN's kernels are of the same precision
and use it on either make (``benchmarks/embedding.py`` measures it). With AVX2 alone MKL is the faster one.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[n, k]`` and ``[k, m]``, without a gradient."""
    return _linear(a, b.T, None) if _fits(a) else a @ b


def by_onednn(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, modules applied on that device take oneDNN for their linear layers."""
    return _ByOneDNN() if device.type == "cpu" and _kinds() else nullcontext()


@cache
def _kinds() -> tuple[torch.dtype, ...]:
    """Of what matrices oneDNN is better; () where it is not there, has no AVX-512, or PyTorch takes it anyway (ARM)."""
    if not _is_there() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return ()
    in_half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if in_half else (torch.float32,)


def _is_there() -> bool:
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return on_x86 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _fits(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _kinds() and x.numel() > 0


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _ByOneDNN(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Parameters are packed for oneDNN once, so the modules' must not change within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.packed: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if not kwargs and isinstance(args[0] if args else None, Tensor) and _fits(args[0]):
            if func is aten.linear.default:
                return self._linear(*args)
            if func is aten.addmm.default and args[0].ndim == 1:
                return _linear(args[1], args[2].T, args[0])
            if func is aten.mm.default:
                return _linear(args[0], args[1].T, None)
            if func is aten._native_multi_head_attention.default and _is_plain(args):
                return self._attention(*args[:1], *args[4:9]), None
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, nn.Parameter):
            if id(weight) not in self.packed:  # the weight is kept too, lest its id pass to another
                self.packed[id(weight)] = weight, torch.ops.mkldnn._reorder_linear_weight(weight)
            weight = self.packed[id(weight)][1]
        return _linear(x, weight, bias)

    def _attention(self, x: Tensor, heads: int, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
        """What ``nn.MultiheadAttention`` does in one kernel where no gradient is wanted: ``[batch, tokens, width]``."""
        batch, tokens, width = x.shape
        parts = self._linear(x, weight, bias).view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        found = F.scaled_dot_product_attention(query, key, value)
        return self._linear(found.transpose(1, 2).reshape(batch, tokens, width), out, out_bias)


def _is_plain(args: Sequence[Any]) -> bool:
    """Self-attention without a mask, of which no weights are asked."""
    query, key, value = args[:3]
    mask, need_weights = (args[9] if len(args) > 9 else None), (args[10] if len(args) > 10 else True)
    return query is key is value and mask is None and not need_weights
