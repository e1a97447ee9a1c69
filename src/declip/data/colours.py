"""Colours and blur of an image view, on float32 planes; what is passed in may be overwritten."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from declip.data.decode import Pixels

Planes = NDArray[np.float32]  # [3, height * width], grey levels 0..255

GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as PIL's mode L
_BLUR_PASSES = 3  # PIL's Gaussian blur is three box blurs
# OpenBLAS computes products of up to 64 ** 3 multiplications on one thread. Larger ones would start threads in every
# loader worker, so these are left to PyTorch, whose threads a worker has switched off.
_LARGEST_PRODUCT = 64
_BLUR_BLOCK = 24  # rows that are blurred together: a call costs as much as some zeros that are multiplied


class Jitter(NamedTuple):
    """Colour jitter as drawn: factors around 1, hue as a share of the circle, and the order of the four."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]  # a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue


def change_colours(planes: Planes, jitter: Jitter) -> Planes:
    for operation in jitter.order:
        if operation == 0:
            planes = _brightness(planes, jitter.brightness)
        elif operation == 1:
            planes = _contrast(planes, jitter.contrast)
        elif operation == 2:
            planes = _saturation(planes, jitter.saturation)
        else:
            planes = _hue(planes, jitter.hue)
    return planes


def _brightness(planes: Planes, factor: float) -> Planes:
    planes *= factor
    return planes.clip(0, 255, out=planes) if factor > 1 else planes


def _contrast(planes: Planes, factor: float) -> Planes:
    """Away from (factor > 1) or towards the image's mean grey."""
    if factor == 1:
        return planes
    sums = planes.sum(axis=1).tolist()
    mean = sum(share * total for share, total in zip(GREY, sums, strict=True)) / planes.shape[1]
    planes *= factor
    planes += (1 - factor) * mean
    return planes.clip(0, 255, out=planes) if factor > 1 else planes


def _saturation(planes: Planes, factor: float) -> Planes:
    """Away from (factor > 1) or towards each pixel's grey."""
    if factor == 1:
        return planes
    grey = grey_of(planes)
    grey *= 1 - factor
    planes *= factor
    planes += grey
    return planes.clip(0, 255, out=planes) if factor > 1 else planes


def grey_of(planes: Planes) -> Planes:
    """``[height * width]``."""
    grey: Planes = planes[0] * GREY[0]
    grey += planes[1] * GREY[1]
    grey += planes[2] * GREY[2]
    return grey


def _hue(planes: Planes, shift: float) -> Planes:
    """Turn the hue of HSV by `shift` of the colour circle, keeping value and saturation.

    Turning by 60 degrees is exact and cheap: each channel x becomes high + low - y, with y the next channel and
    high, low the pixel's extremes. Within 60 degrees a channel goes from its old to its new value with slope
    high - low, either at once and then rests, or rests first; both follow from the clamps below, so no pixel has
    to be told which sixth of the circle it is in.
    """
    if shift == 0:
        return planes
    turns, part = divmod(abs(shift) * 6, 1)
    ring = np.empty((5, planes.shape[1]), np.float32)  # blue, red, green, blue, red: both neighbours of each channel
    ring[1:4] = planes
    now = ring[1:4]
    following = ring[2:5] if shift > 0 else ring[0:3]
    high = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    low = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    for _ in range(int(turns)):
        _close_ring(ring)
        now[:] = (high + low) - following
    _close_ring(ring)
    way = (high - low) * np.float32(part)
    goal = (high + low) - following
    rise = now - following
    fall = rise + (high - way)
    rise += low + way
    np.minimum(np.maximum(rise, now, out=rise), goal, out=rise)  # the goal itself where the channel falls
    np.maximum(np.minimum(fall, now, out=fall), goal, out=fall)  # the goal itself where it rises
    rise += fall
    rise -= goal
    return rise


def _close_ring(ring: Planes) -> None:
    ring[0], ring[4] = ring[3], ring[1]


def to_pixels(planes: Planes, size: int) -> Pixels:
    """Round ``[3 or 1, size * size]`` to grey levels and lay it out as ``[size, size, 3]``."""
    planes += 0.5
    levels = planes.astype(np.uint8).reshape(-1, size, size)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):
        pixels[..., channel] = levels[channel % len(levels)]
    return pixels


def blur(planes: Planes, size: int, sigma: float) -> Pixels:
    """PIL's GaussianBlur(sigma) as two matrix products, within a level or two of it; then as `to_pixels`."""
    # In steps of 1/64 pixel, which nobody sees, so that few matrices serve all images.
    bands = _blur_bands(size, round(sigma * 64))
    if size <= _LARGEST_PRODUCT:
        matrix = bands[0][2].numpy()
        planes = (matrix @ planes.reshape(-1, size, size) @ matrix.T).reshape(len(planes), -1)
        return to_pixels(planes, size)
    rows = torch.from_numpy(planes).view(-1, size)
    for _ in range(2):  # [planes * height, width] -> [width, planes * height] -> [height, width * planes]
        columns = torch.empty((size, len(rows)))
        for block, near, band in bands:
            torch.mm(band, rows[:, near].T, out=columns[block])
        rows = columns.view(-1, size)
    levels = columns.numpy()
    if len(planes) == 1:
        return to_pixels(levels.reshape(1, -1), size)
    levels += 0.5
    return levels.astype(np.uint8).reshape(size, size, 3)


@lru_cache(maxsize=256)
def _blur_bands(size: int, sigma_64: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """The blur matrix without most of its zeros: blocks of rows, the columns where each has values, and the values."""
    matrix, bands = blur_matrix(size, sigma_64), []
    step = size if size <= _LARGEST_PRODUCT else _BLUR_BLOCK
    for start in range(0, size, step):
        block = slice(start, min(start + step, size))
        columns = np.flatnonzero(matrix[block].numpy().any(axis=0))
        near = slice(int(columns[0]), int(columns[-1]) + 1)
        bands.append((block, near, matrix[block, near].clone()))
    return bands


def blur_matrix(size: int, sigma_64: int) -> torch.Tensor:
    """``[size, size]``: three box blurs that together have a variance of (sigma_64 / 64) ** 2; the edges repeat.

    A box of fractional length: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", equations 11 and 14, as in PIL.
    """
    variance = (sigma_64 / 64) ** 2 / _BLUR_PASSES
    inner = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    # An image in which the two edges are just out of each other's sight tells of all larger ones.
    reach = _BLUR_PASSES * (inner + 1)
    small, half = min(size, 4 * reach), 2 * reach
    rows = np.arange(small)
    box = np.zeros((small, small))
    for offset in range(-inner - 1, inner + 2):
        np.add.at(box, (rows, (rows + offset).clip(0, small - 1)), edge if abs(offset) > inner else 1.0)
    blurred = torch.from_numpy(box / (2 * (inner + edge) + 1)).matrix_power(_BLUR_PASSES).float()
    if small == size:
        return blurred
    matrix = np.zeros((size, size), np.float32)
    matrix[:half, :small], matrix[-half:, -small:] = blurred[:half], blurred[half:]
    rows = np.arange(half, size - half)
    for offset in range(-reach, reach + 1):
        matrix[rows, rows + offset] = blurred[half, half + offset].item()
    return torch.from_numpy(matrix)
