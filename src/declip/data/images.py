"""Image views: one decoded image in, one augmented ``uint8 [size, size, 3]`` out.

A view is drawn first (`draw_view`, only random numbers) and then made (`make_view`, only pixels). Resizing and colours
are plain NumPy in float32: for the small images of a small model this is about twice as fast as going through PIL.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from declip.data.decode import Pixels
from declip.pairs import ImageViews

Planes = NDArray[np.float32]  # [3, height * width], grey levels 0..255

WEAK = ImageViews()
"""A random crop of half to all of the area, nothing else: STANDARD_SLIP, the published view of CLIP."""

STRONG = ImageViews(
    crop_scale=(0.2, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
    blur=0.5,
    blur_sigma=(0.1, 2.0),
)
"""MOCOV2, the published view of DeCLIP, DeFILIP and FILIP (Chen et al. 2020, arXiv:2003.04297)."""

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as PIL's mode L
_ORDERS = tuple(permutations(range(4)))
_BLUR_PASSES = 3  # PIL's Gaussian blur is three box blurs
# OpenBLAS computes products of up to 64 ** 3 multiplications on one thread. Larger ones would start threads in every
# loader worker, so larger images are blurred by PIL.
_LARGEST_PRODUCT = 64


class Jitter(NamedTuple):
    """Colour jitter as drawn: factors around 1, hue as a share of the circle, and the order of the four."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    order: tuple[int, ...]  # a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue


class View(NamedTuple):
    """Everything random about one view of one image."""

    box: tuple[int, int, int, int]  # top, left, height, width of the crop, in pixels
    jitter: Jitter | None = None
    grayscale: bool = False
    sigma: float | None = None  # radius of the blur in pixels
    flip: bool = False


def eval_view(image: Pixels, size: int) -> Pixels:
    """Shorter side to `size` (bilinear, antialiased), then the central square: ``[size, size, 3]``, contiguous.

    The same as torchvision's Resize and CenterCrop.
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image.copy()
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    # Only the square is computed, not the whole resized image: a long thin image would grow out of memory.
    across, down = width / wide, height / tall
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.array(resized)


def random_view(image: Pixels, size: int, views: ImageViews, rng: np.random.Generator) -> Pixels:
    """A random view of an image ``[height, width, 3]``: ``[size, size, 3]``, contiguous.

    In the published order: random resized crop, colour jitter, grayscale, Gaussian blur, horizontal flip.
    All that is random comes from `rng`.
    """
    return make_view(image, size, draw_view(image.shape[0], image.shape[1], views, rng))


def draw_view(height: int, width: int, views: ImageViews, rng: np.random.Generator) -> View:
    """Draw what a random view of a `height` x `width` image does, as torchvision's transforms draw it."""
    box = _draw_box(height, width, views, rng)
    if not (views.jitter or views.grayscale or views.blur or views.flip):
        return View(box)
    draws = rng.random(10).tolist()
    return View(
        box,
        _draw_jitter(views, draws[5:]) if draws[0] < views.jitter else None,
        draws[1] < views.grayscale,
        _between(views.blur_sigma, draws[3]) if draws[2] < views.blur else None,
        draws[4] < views.flip,
    )


def _between(interval: tuple[float, float], share: float) -> float:
    return interval[0] + (interval[1] - interval[0]) * share


def _draw_box(height: int, width: int, views: ImageViews, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop: ten tries of a uniform area and a log-uniform ratio, then the largest central crop."""
    low, high = views.crop_ratio
    log_ratio = (math.log(low), math.log(high))
    for _ in range(10):
        area_share, ratio_share, top_share, left_share = rng.random(4).tolist()
        area = height * width * _between(views.crop_scale, area_share)
        ratio = math.exp(_between(log_ratio, ratio_share))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(top_share * (height - tall + 1)), int(left_share * (width - wide + 1)), tall, wide
    wide, tall = width, height
    if width / height < low:
        tall = max(1, min(height, round(width / low)))
    elif width / height > high:
        wide = max(1, min(width, round(height * high)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _draw_jitter(views: ImageViews, draws: list[float]) -> Jitter:
    def factor(strength: float, share: float) -> float:
        return _between((max(0.0, 1 - strength), 1 + strength), share)

    return Jitter(
        factor(views.brightness, draws[0]),
        factor(views.contrast, draws[1]),
        factor(views.saturation, draws[2]),
        _between((-views.hue, views.hue), draws[3]),
        _ORDERS[int(draws[4] * len(_ORDERS))],
    )


def make_view(image: Pixels, size: int, view: View) -> Pixels:
    """The view of an image that `draw_view` has drawn: ``[size, size, 3]``, contiguous."""
    top, left, height, width = view.box
    crop = image[top : top + height, left : left + width]
    # The flip comes last in the published order; it commutes with all else and costs nothing in the resize.
    if view.jitter is None and not view.grayscale and view.sigma is None:
        levels = _resize(crop, size, view.flip, planar=False)
        levels += 0.5
        return levels.astype(np.uint8).reshape(size, size, 3)
    planes = _resize(crop, size, view.flip, planar=True)
    if view.jitter is not None:
        planes = _jitter(planes, view.jitter)
    if view.grayscale:
        planes = _grey(planes)[None]  # one plane stands for three from here on
    if view.sigma is None:
        return _interleave(planes, size)
    if size <= _LARGEST_PRODUCT:
        return _interleave(_blur(planes, size, view.sigma), size)
    blurred = Image.fromarray(_interleave(planes, size)).filter(ImageFilter.GaussianBlur(view.sigma))
    return np.array(blurred)


def _interleave(planes: Planes, size: int) -> Pixels:
    """Round ``[3 or 1, size * size]`` to grey levels and lay it out as ``[size, size, 3]``."""
    planes += 0.5
    levels = planes.astype(np.uint8).reshape(-1, size, size)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # three strided copies are several times faster than one transposition
        pixels[..., channel] = levels[channel % len(levels)]
    return pixels


# Resizing ---------------------------------------------------------------------------------------------------------


def _resize(crop: Pixels, size: int, flip: bool, planar: bool) -> Planes:
    """Bilinear, antialiased: ``[size, size * 3]``, or ``[3, size * size]`` when planar. At most one level off PIL."""
    height, width = crop.shape[:2]
    if height > size or width > size:
        return _shrink(crop, size, flip, planar)
    # Nothing shrinks, so each output pixel mixes two neighbours along each axis and no antialiasing is needed.
    near, far, share = _column_taps(width, size, flip, planar)
    flat = crop.astype(np.float32, order="C").reshape(height, width * 3)
    rows = flat.take(near, axis=1, mode="clip")
    step = flat.take(far, axis=1, mode="clip")
    step -= rows
    step *= share
    rows += step
    above, below, share = _row_taps(height, size)
    out = rows.take(above, axis=0, mode="clip")
    step = rows.take(below, axis=0, mode="clip")
    step -= out
    step *= share
    if not planar:
        out += step
        return out
    planes = np.empty((3, size, size), np.float32)
    np.add(out.reshape(size, 3, size), step.reshape(size, 3, size), out=planes.transpose(1, 0, 2))
    return planes.reshape(3, -1)


def _shrink(crop: Pixels, size: int, flip: bool, planar: bool) -> Planes:
    resized = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR))
    if flip:
        resized = resized[:, ::-1]
    if not planar:
        return resized.astype(np.float32, order="C").reshape(size, size * 3)
    planes = np.empty((3, size, size), np.float32)
    for channel in range(3):
        planes[channel] = resized[..., channel]
    return planes.reshape(3, -1)


def _taps(length: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each of `size` output pixels the two input pixels around its centre and the share of the second."""
    centre = (np.arange(size) + 0.5) * (length / size) - 0.5
    near = np.floor(centre).astype(np.intp)
    share = (centre - near).astype(np.float32)
    return near.clip(0, length - 1), (near + 1).clip(0, length - 1), share


@lru_cache(maxsize=1024)
def _row_taps(length: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    near, far, share = _taps(length, size)
    return near, far, share[:, None]


@lru_cache(maxsize=1024)
def _column_taps(
    length: int, size: int, flip: bool, planar: bool
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """As `_taps`, for a row of ``length * 3`` interleaved values; planar writes the row channel after channel."""
    near, far, share = _taps(length, size)
    if flip:
        near, far, share = near[::-1], far[::-1], share[::-1]
    channel = np.arange(3)
    if planar:
        return _flat(3 * near + channel[:, None]), _flat(3 * far + channel[:, None]), np.tile(share, 3)
    return _flat(3 * near[:, None] + channel), _flat(3 * far[:, None] + channel), np.repeat(share, 3)


def _flat(indices: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.ascontiguousarray(indices).reshape(-1)


# Colours ----------------------------------------------------------------------------------------------------------


def _jitter(planes: Planes, jitter: Jitter) -> Planes:
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
    mean = sum(share * total for share, total in zip(_GREY, sums, strict=True)) / planes.shape[1]
    planes *= factor
    planes += (1 - factor) * mean
    return planes.clip(0, 255, out=planes) if factor > 1 else planes


def _saturation(planes: Planes, factor: float) -> Planes:
    """Away from (factor > 1) or towards each pixel's grey."""
    if factor == 1:
        return planes
    grey = _grey(planes)
    grey *= 1 - factor
    planes *= factor
    planes += grey
    return planes.clip(0, 255, out=planes) if factor > 1 else planes


def _grey(planes: Planes) -> Planes:
    """``[height * width]``."""
    grey: Planes = planes[0] * _GREY[0]
    grey += planes[1] * _GREY[1]
    grey += planes[2] * _GREY[2]
    return grey


def _hue(planes: Planes, shift: float) -> Planes:
    """Turn the hue of HSV by `shift` of the colour circle, keeping value and saturation.

    Turning by 60 degrees is exact and cheap: each channel x becomes high + low - y, with y the next channel and
    high, low the pixel's extremes. Within 60 degrees a channel goes from its old to its new value with slope
    high - low, either at once and then rests, or rests first; both follow from the two clamps below, so no pixel has
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
    chroma = high - low
    first = chroma * np.float32(part)  # how far a channel gets that moves at once
    late = chroma - first  # how far behind its goal is one that rests first
    change = (high + low) - (now + following)
    rise = (high - late) - following
    fall = (high - first) - following
    zeros = _zeros(planes.shape[1])
    np.maximum(np.minimum(rise, change, out=rise), zeros, out=rise)
    np.minimum(np.maximum(fall, change, out=fall), zeros, out=fall)
    now += rise
    now += fall
    return now


def _close_ring(ring: Planes) -> None:
    ring[0], ring[4] = ring[3], ring[1]


@lru_cache(maxsize=8)
def _zeros(pixels: int) -> Planes:
    # Minimum and maximum of two arrays are vectorised, of an array and a number they are not (three times slower).
    return np.zeros((3, pixels), np.float32)


# Blur -------------------------------------------------------------------------------------------------------------


def _blur(planes: Planes, size: int, sigma: float) -> Planes:
    """PIL's GaussianBlur(sigma) as two matrix products; within a level or two of it."""
    # In steps of 1/64 pixel, which nobody sees, so that few matrices serve all images.
    matrix = _blur_matrix(size, round(sigma * 64))
    blurred = matrix @ planes.reshape(-1, size, size) @ matrix.T
    return np.asarray(blurred, np.float32).reshape(len(planes), -1)


@lru_cache(maxsize=256)
def _blur_matrix(size: int, sigma_64: int) -> NDArray[np.float32]:
    """``[size, size]``: three box blurs that together have a variance of (sigma_64 / 64) ** 2; the edges repeat.

    A box of fractional length: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", equations 11 and 14, as in PIL.
    """
    variance = (sigma_64 / 64) ** 2 / _BLUR_PASSES
    inner = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    rows = np.arange(size)
    box = np.zeros((size, size))
    for offset in range(-inner - 1, inner + 2):
        np.add.at(box, (rows, (rows + offset).clip(0, size - 1)), edge if abs(offset) > inner else 1.0)
    return np.asarray(np.linalg.matrix_power(box / (2 * (inner + edge) + 1), _BLUR_PASSES), np.float32)
