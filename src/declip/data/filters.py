"""Random convolutions of image views (RandConv): what each view is convolved with, drawn here, made in the step."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SIDE = 5
"""Side of a filter in pixels; narrower ones lie in its middle."""
_SIDES = (1, 3, SIDE)


def no_filter() -> NDArray[np.float32]:
    """The filter that changes nothing: float32 [3, 3, SIDE, SIDE]."""
    kernel = np.zeros((3, 3, SIDE, SIDE), np.float32)
    kernel[range(3), range(3), SIDE // 2, SIDE // 2] = 1
    return kernel


def draw_filter(rng: np.random.Generator) -> NDArray[np.float32]:
    """A random share of the view itself, the rest of its random convolution: float32 [3 out, 3 in, SIDE, SIDE].

    Xu et al. 2021 (arXiv:2007.13003), section 3. Weights are normal and keep the variance of pixels that do not depend
    on each other.
    """
    side, own = int(rng.choice(_SIDES)), rng.random()
    first = (SIDE - side) // 2
    weights = rng.standard_normal((3, 3, side, side)) / math.sqrt(3 * side * side)
    kernel = own * no_filter()
    kernel[:, :, first : first + side, first : first + side] += (1 - own) * weights
    return kernel.astype(np.float32)
