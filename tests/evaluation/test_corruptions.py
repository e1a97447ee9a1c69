"""Corruptions: worse with severity, the same for an item, as strong on a small picture as on a large one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from declip.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with a few edges: something that each of the corruptions hurts."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 9, 3), np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    image[height // 4 : height // 2, width // 4 : width // 2] = (230, 220, 40)
    return image


@pytest.mark.parametrize("shape", [(32, 32), (96, 130), (224, 180)])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_worse_with_severity(corruption: str, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    errors = [0.0]
    for severity in SEVERITIES:
        found = corrupt(image, corruption, severity, item=3)
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        errors.append(float(np.square(found.astype(float) - image).mean()))
    assert all(later > 1.01 * earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_an_item_always_looks_the_same(corruption: str) -> None:
    image = picture(40, 50)
    kept = image.copy()
    found = corrupt(image, corruption, 3, item=5, seed=2)
    assert (image == kept).all()
    assert (corrupt(image, corruption, 3, item=5, seed=2) == found).all()
    for item, seed in ((6, 2), (5, 3)):
        differs = (corrupt(image, corruption, 3, item, seed) != found).any()
        assert differs == (corruption in ("gaussian_noise", "low_light"))


def test_blur_hides_the_same_share_of_a_picture_of_any_size() -> None:
    large = picture(448, 448)
    blurred = np.array(Image.fromarray(corrupt(large, "gaussian_blur", 4)).resize((112, 112), Image.Resampling.BOX))
    small = corrupt(np.array(Image.fromarray(large).resize((112, 112), Image.Resampling.BOX)), "gaussian_blur", 4)
    assert np.abs(blurred.astype(int) - small).mean() < 1.5
    assert np.abs(small.astype(int) - picture(112, 112)).mean() > 3


def test_noise_has_its_strength() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    for severity, sigma in ((1, 0.08), (2, 0.12)):
        assert corrupt(grey, "gaussian_noise", severity).std() / 255 == pytest.approx(sigma, rel=0.01)


def test_low_light_is_dark_and_noisy() -> None:
    white = np.full((200, 200, 3), 255, np.uint8)
    means = [corrupt(white, "low_light", severity).mean() for severity in SEVERITIES]
    assert means == sorted(means, reverse=True)
    assert means[0] < 200
    assert means[-1] > 20
    black = corrupt(np.zeros_like(white), "low_light", 5)
    assert 0 < black.mean() < 10


@pytest.mark.parametrize(
    ("image", "corruption", "severity", "match"),
    [
        (picture(8, 8), "fog", 1, "no corruption 'fog': choose from gaussian_blur"),
        (picture(8, 8), "gaussian_blur", 6, "1 to 5, not 6"),
        (picture(8, 8).astype(np.float32), "gaussian_blur", 1, "uint8"),
        (picture(8, 8)[..., 0], "gaussian_blur", 1, "uint8"),
    ],
)
def test_wrong_input(image: np.ndarray, corruption: str, severity: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        corrupt(image, corruption, severity)
