"""Colours and blur of a view against torchvision, PIL and the standard library."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from pictures import difference, picture
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from declip.data import colours
from declip.data.colours import Planes
from declip.data.decode import Pixels
from declip.data.images import View, make_view


def planes_of(image: Pixels) -> Planes:
    return image.reshape(-1, 3).T.astype(np.float32).copy()


def pixels_of(planes: Planes, like: Pixels) -> Pixels:
    return (planes + 0.5).astype(np.uint8).T.reshape(like.shape)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_equals_torchvision(name: str, factor: float) -> None:
    image = picture(64, 64)
    ours = pixels_of(getattr(colours, f"_{name}")(planes_of(image), factor), image)
    theirs = getattr(functional, f"adjust_{name}")(Image.fromarray(image), factor)
    assert difference(ours, theirs)[1] <= 2


@pytest.mark.parametrize("shift", [-0.5, -0.3, -0.1, -0.02, 0.0, 0.05, 0.1, 1 / 6, 0.4, 0.5])
def test_hue_is_exact(shift: float) -> None:
    image = picture(16, 16)
    image[8] = image[8, :, :1]  # greys have no hue
    image[9, :3] = np.eye(3) * 255
    turned = colours._hue(planes_of(image), shift).T
    for ours, pixel in zip(turned, image.reshape(-1, 3) / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        wanted = np.array(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)) * 255
        np.testing.assert_allclose(ours, wanted, atol=1e-2)


def test_grayscale_equals_torchvision() -> None:
    image = picture(64, 64)
    view = make_view(image, 64, View((0, 0, 64, 64), grayscale=True))
    assert difference(view, functional.rgb_to_grayscale(Image.fromarray(image), 3))[1] <= 1


@pytest.mark.parametrize("size", [48, 64, 96, 101, 224])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_blur_equals_pil(size: int, sigma: float) -> None:
    image = picture(size, size)
    wanted = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
    mean, largest = difference(make_view(image, size, View((0, 0, size, size), sigma=sigma)), wanted)
    assert mean < 0.7
    assert largest <= 3
