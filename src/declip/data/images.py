"""Image views: one decoded image in, one augmented ``uint8 [size, size, 3]`` out.

A view is drawn first (`draw_view`, only random numbers) and then made (`make_view`, only pixels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from declip.data.colours import Jitter, blur, change_colours, grey_of, to_pixels
from declip.data.decode import ImageFile, Pixels
from declip.pairs import ImageViews

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

_ORDERS = tuple(permutations(range(4)))


class View(NamedTuple):
    """Everything random about one view of one image."""

    box: tuple[int, int, int, int]  # top, left, height, width of the crop, in pixels; it may reach outside of the image
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


def make_views(
    data: bytes,
    size: int | Sequence[int],
    options: Sequence[ImageViews],
    rng: np.random.Generator,
    crops_only: bool = False,
) -> list[tuple[Pixels, View]]:
    """Random views of an image file's bytes, as `random_view` makes them of the decoded image, and how each was drawn.

    size: of all views, or of each; crops_only: make no more of a view than its crop.

    A large JPEG is decoded at the smallest scale at which no crop has to be enlarged that has not been anyway; the
    edges of the crops are then rounded to this scale's pixels. Raises ValueError as `ImageFile` does.
    """
    file = ImageFile(data)
    views = [draw_view(file.height, file.width, view, rng) for view in options]
    sizes = [size] * len(views) if isinstance(size, int) else list(size)
    enough = min((side / own for view, own in zip(views, sizes, strict=True) for side in view.box[2:]), default=0)
    reduction = next(reduction for reduction in (8, 4, 2, 1) if enough >= reduction or reduction == 1)
    image = file.decode(reduction)
    reduction = round(file.height / len(image))  # it may have come larger
    wanted = [View(view.box) for view in views] if crops_only else views
    made = [make_view(image, own, _reduced(view, reduction)) for view, own in zip(wanted, sizes, strict=True)]
    return list(zip(made, views, strict=True))


def _reduced(view: View, reduction: int) -> View:
    """The view of an image of which `reduction` pixels have become one along each axis."""
    if reduction == 1:
        return view
    top, left, height, width = view.box
    first, start = round(top / reduction), round(left / reduction)
    last, end = round((top + height) / reduction), round((left + width) / reduction)
    return view._replace(box=(first, start, last - first, end - start))


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
    """RandomResizedCrop: ten tries of a uniform area and a log-uniform ratio, then the largest central crop.

    Where crops may be larger than the image, any is taken; the image then lies anywhere in it along a longer side.
    """
    low, high = views.crop_ratio
    log_ratio = (math.log(low), math.log(high))
    beyond = views.crop_scale[1] > 1
    for _ in range(10):
        area_share, ratio_share, top_share, left_share = rng.random(4).tolist()
        area = height * width * _between(views.crop_scale, area_share)
        ratio = math.exp(_between(log_ratio, ratio_share))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if min(wide, tall) > 0 and (beyond or (wide <= width and tall <= height)):
            return _place(height, tall, top_share), _place(width, wide, left_share), tall, wide
    wide, tall = width, height
    if width / height < low:
        tall = max(1, min(height, round(width / low)))
    elif width / height > high:
        wide = max(1, min(width, round(height * high)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _place(side: int, crop: int, share: float) -> int:
    """Where a crop begins along a side: uniform over all places in which the shorter of the two lies in the longer."""
    return int(share * (side - crop + 1)) if crop <= side else -int(share * (crop - side + 1))


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
    pixels = _resize(image, size, view)
    if view.jitter is None and not view.grayscale and view.sigma is None:
        return pixels
    planes = np.empty((3, size * size), np.float32)
    for channel in range(3):  # three strided copies are several times faster than one transposition
        planes[channel] = pixels[..., channel].reshape(-1)
    if view.jitter is not None:
        planes = change_colours(planes, view.jitter)
    if view.grayscale:
        planes = grey_of(planes)[None]  # one plane stands for three from here on
    return to_pixels(planes, size) if view.sigma is None else blur(planes, size, view.sigma)


def _crop(image: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """A copy of the box, ``[1, height, width, 3]``; outside of the image it has the median colour of its border."""
    top, left, height, width = box
    above, before = max(-top, 0), max(-left, 0)
    inside = image[None, top + above : top + height, left + before : left + width]
    if inside.shape[1:3] == (height, width):
        return inside.copy()
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    crop = np.empty((1, height, width, 3), np.uint8)
    # Row by row: filled pixel by pixel, a crop takes several times as long.
    crop[:] = np.tile(np.median(border, axis=0).astype(np.uint8), (width, 1))
    crop[:, above : above + inside.shape[1], before : before + inside.shape[2]] = inside
    return crop


def _resize(image: Pixels, size: int, view: View) -> Pixels:
    """Crop, bilinear antialiased resize and flip; at most one level off PIL, and several times as fast."""
    # PyTorch resizes bytes with SIMD where the channels come last in memory.
    channels_last = torch.from_numpy(_crop(image, view.box).transpose(0, 3, 1, 2))
    resized = functional.interpolate(channels_last, (size, size), mode="bilinear", antialias=True)
    if view.flip:  # last in the published order; it commutes with all else and costs least here
        resized = resized.flip(3)
    return np.asarray(resized.numpy()[0].transpose(1, 2, 0), np.uint8)
