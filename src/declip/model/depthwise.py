"""Depthwise convolutions on a CPU in bfloat16, with gradients that do not take many times what the forward pass does.

oneDNN's gradients in bfloat16 fall back to plain loops where the stride is not 1 (of the input) and where the kernel
is larger than 3 x 3 (of the weight); benchmarks/depthwise.py has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FAST_KERNEL = 3  # up to this size oneDNN computes the weight's gradient fast in bfloat16


def hasten_depthwise(module: nn.Module) -> None:
    """Give a module's depthwise convolutions, open_clip's and timm's, these gradients; their tensors stay the same.

    Elsewhere than on a CPU in bfloat16 they compute as before.
    """
    from timm.layers.conv2d_same import Conv2dSame

    for part in module.modules():
        if type(part) in (nn.Conv2d, Conv2dSame) and _is_plain_depthwise(part):
            part.__class__ = _DepthwiseSame if isinstance(part, Conv2dSame) else _Depthwise


def _is_plain_depthwise(conv: Any) -> bool:
    alone = conv.groups == conv.in_channels == conv.out_channels > 1
    square = len({*conv.kernel_size}) == len({*conv.stride}) == 1
    simple = conv.bias is None and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return alone and square and simple and not isinstance(conv.padding, str) and len({*conv.padding}) == 1


class _Depthwise(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if _computes_bfloat16_on_cpu(input) and self.weight.requires_grad:
            return _apply(input, self.weight, self.stride[0], self.padding[0])  # type: ignore[arg-type]
        return super().forward(input)


class _DepthwiseSame(nn.Conv2d):
    """TensorFlow's padding: the output is as large as the input over the stride, odd places are added at the end."""

    def forward(self, input: Tensor) -> Tensor:
        from timm.layers.conv2d_same import Conv2dSame
        from timm.layers.padding import pad_same

        if _computes_bfloat16_on_cpu(input) and self.weight.requires_grad:
            padded = pad_same(input.bfloat16(), self.kernel_size, self.stride)  # type: ignore[arg-type]
            return _apply(padded, self.weight, self.stride[0], 0)
        output: Tensor = Conv2dSame.forward(self, input)  # type: ignore[arg-type, no-untyped-call]
        return output


def _computes_bfloat16_on_cpu(input: Tensor) -> bool:
    if input.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return input.dtype == torch.bfloat16


def _apply(input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    output: Tensor = _Convolution.apply(input.bfloat16(), weight.bfloat16(), stride, padding)
    return output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(input, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = input_gradient(gradient, weight, input.shape, stride, padding)
        if ctx.needs_input_grad[1]:
            fast = weight.shape[2] <= _FAST_KERNEL
            tensors = (one if fast else one.float() for one in (gradient, input, weight))
            of_weight = torch.ops.aten.convolution_backward(
                *tensors, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight), [False, True, False]
            )[1].to(weight.dtype)
        return of_input, of_weight, None, None


def input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """The gradient of a depthwise convolution's input, of the given shape [batch, channels, height, width].

    gradient: of the output. A place of the input meets every `stride`-th tap of the kernel alone: for each of the
    stride² kinds of places, those taps go over the gradient, so that nothing is multiplied by zeros between strides.
    """
    found = torch.empty(shape, dtype=gradient.dtype).contiguous(memory_format=torch.channels_last)
    for row in range(stride):
        for column in range(stride):
            taps = weight[:, :, row::stride, column::stride].flip(2, 3)
            top, bottom, first_row = _places(shape[2], gradient.shape[2], taps.shape[2], stride, padding, row)
            left, right, first_column = _places(shape[3], gradient.shape[3], taps.shape[3], stride, padding, column)
            place = found[:, :, first_row::stride, first_column::stride]
            if not taps.numel():
                place.zero_()
                continue
            padded = F.pad(gradient, (left, right, top, bottom))
            place.copy_(F.conv2d(padded, taps.contiguous(), None, 1, 0, 1, len(weight)))
    return found


def _places(size: int, out: int, taps: int, stride: int, padding: int, phase: int) -> tuple[int, int, int]:
    """Along one side: what to pad the output's gradient with before and behind, and the input's first place.

    Input place i = stride · m + phase - padding gets the sum over u of tap u times the gradient at m - u.
    """
    low = -((phase - padding) // stride)  # the lowest m whose place is in the input
    high = (size - 1 + padding - phase) // stride
    return taps - 1 - low, high - (out - 1), stride * low + phase - padding
