"""The rest of the image views, batched on the training device: colour jitter, grayscale, blur and flip.

With ``data.augment_on = "device"`` the loader processes only decode, crop and resize. What `draw_view` has drawn beyond
the crop travels with the batch as numbers (`pack`), and `finish_views` does it here, in the published order and by the
arithmetic of colours.py. So a view is the same on either path, but where a half is rounded to the other side.

Which images take which operation is read from the draws on the CPU. The device is never asked, so it is never waited
for, and no image is taken through an operation that it does not get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from declip.data.batch import Batch, send
from declip.data.colours import GREY, Jitter, blur_matrix
from declip.data.images import View

# What a view's numbers are: four strengths and their order as in Jitter, then the rest of View.
_ORDER, _GRAYSCALE, _SIGMA, _FLIP = 4, 8, 9, 10
DRAWS = 11
_NO_JITTER = Jitter(1.0, 1.0, 1.0, 0.0, (-1, -1, -1, -1))
# Images are taken through in parts of so many pixels (167 images of 224 x 224), so that the memory for it, some hundred
# MB, does not grow with the batch. A part is 300 operations on the device, which would mostly wait for small ones.
_PIXELS_AT_A_TIME = 2**23


def pack(view: View) -> list[float]:
    """What is left to do for a view once its crop is made, as `DRAWS` numbers."""
    jitter = view.jitter or _NO_JITTER
    return [*jitter[:4], *jitter.order, view.grayscale, view.sigma or 0.0, view.flip]


def finish_views(batch: Batch) -> Batch:
    """The batch with whole image views, where its images are crops only; runs on the device that they are on."""
    if batch.draws is None:
        return batch
    return replace(batch, images=augment(batch.images, batch.draws), draws=None)


@torch.no_grad()
def augment(crops: Tensor, draws: Tensor) -> Tensor:
    """Whole views of crops uint8 [..., size, size, 3]: the same shape, on the same device.

    draws: float32 [..., DRAWS] on the CPU, `pack` of each view
    """
    return in_parts(_augment, crops, draws.flatten(0, -2))


def in_parts(make: Callable[[Tensor, Tensor], Tensor], images: Tensor, numbers: Tensor) -> Tensor:
    """`make(images, numbers)` of images [..., height, width, 3], some at a time: the same shape.

    numbers: [images, ...], what `make` takes beside [images, height, width, 3]
    """
    at_a_time = max(1, _PIXELS_AT_A_TIME // (images.shape[-3] * images.shape[-2]))
    parts = zip(torch.split(images.flatten(0, -4), at_a_time), torch.split(numbers, at_a_time), strict=True)
    return torch.cat([make(*part) for part in parts]).view(images.shape)


def _augment(crops: Tensor, draws: Tensor) -> Tensor:
    """uint8 [batch, size, size, 3] and float32 [batch, DRAWS] on the CPU -> uint8 [batch, size, size, 3]."""
    steps = [draws[:, _ORDER + step] == operation for step in range(4) for operation in range(4)]
    *jittered, grey, blurred, flipped = _rows([*steps, *(draws[:, [_GRAYSCALE, _SIGMA, _FLIP]] > 0).T], crops.device)
    sent = send(draws, crops.device)
    planes = crops.permute(0, 3, 1, 2).float().contiguous()
    for number, rows in enumerate(jittered):
        if len(rows):
            operation = number % 4
            strengths = sent[rows, operation].view(-1, 1, 1, 1)
            planes[rows] = _OPERATIONS[operation](planes[rows], strengths)
    if len(grey):
        planes[grey] = _grey(planes[grey]).expand(-1, 3, -1, -1)
    if len(blurred):
        sigmas = draws[:, _SIGMA]
        planes[blurred] = _blur(planes[blurred], sigmas[sigmas > 0].tolist())
    if len(flipped):
        planes[flipped] = planes[flipped].flip(3)
    return (planes + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _rows(masks: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Where each mask is true, int64 [any number] on the device, which they reach in one copy."""
    rows = [mask.nonzero()[:, 0] for mask in masks]
    return torch.split(send(torch.cat(rows), device), [len(part) for part in rows])


# Colours: planes float32 [batch, 3, height, width], grey levels 0..255; strengths [batch, 1, 1, 1] ------------------


def _brightness(planes: Tensor, factor: Tensor) -> Tensor:
    return (planes * factor).clamp_(0, 255)


def _contrast(planes: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(planes.mean((2, 3), keepdim=True)), planes, factor).clamp_(0, 255)


def _saturation(planes: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(planes), planes, factor).clamp_(0, 255)


def _grey(planes: Tensor) -> Tensor:
    """``[batch, 1, height, width]``."""
    grey = planes[:, :1] * GREY[0]
    return grey.add_(planes[:, 1:2], alpha=GREY[1]).add_(planes[:, 2:], alpha=GREY[2])


def _hue(planes: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` of the colour circle, as colours.py does; its docstring says why this is right.

    Whole turns by 60 degrees: each moves every channel's value on by one channel and mirrors it between the pixel's
    extremes, so two only move it. Mirroring commutes with turning and can wait for the end.
    """
    sixths = shift.abs() * 6
    turns = sixths.floor()
    way, part = shift.sign(), sixths - turns
    high, low = planes.amax(1, keepdim=True), planes.amin(1, keepdim=True)
    both, chroma = high + low, high - low
    now, following = _move(planes, way * turns), _move(planes, way * (turns + 1))
    first = chroma * part
    change = both - now - following
    rise = torch.minimum(low + first - following, change).clamp_(min=0)
    fall = torch.maximum(high - first - following, change).clamp_(max=0)
    now.add_(rise).add_(fall)
    return torch.lerp(now, both - now, turns % 2)  # one or the other


def _move(planes: Tensor, by: Tensor) -> Tensor:
    """Each image's channel c gets the values of its channel c + by."""
    channel = torch.arange(3, device=planes.device)
    image = torch.arange(len(planes), device=planes.device)[:, None]
    source = 3 * image + (channel + by.view(-1, 1).long()) % 3
    return planes.flatten(0, 1)[source.flatten()].view_as(planes)


_OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


# Blur ---------------------------------------------------------------------------------------------------------------


def _blur(planes: Tensor, sigmas: list[float]) -> Tensor:
    """Two matrix products an image, with the matrices of a loader process."""
    size = planes.shape[-1]
    matrices = torch.stack([_blur_matrix_on(planes.device, size, round(sigma * 64)) for sigma in sigmas])[:, None]
    return matrices @ planes @ matrices.mT


@lru_cache(maxsize=256)
def _blur_matrix_on(device: torch.device, size: int, sigma_64: int) -> Tensor:
    return send(blur_matrix(size, sigma_64), device)
