"""Images made worse, to see how a model bears it: blur, noise, JPEG and low light, each in five severities.

Blur, noise and JPEG have the parameters of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), whose images
have 224 pixels a side; a radius is scaled to the image's shorter side, so that it hides the same share of a picture of
any size. Low light is no part of ImageNet-C.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from declip.data.decode import Pixels

SEVERITIES = (1, 2, 3, 4, 5)

_SIDE = 224  # of ImageNet-C's images, in pixels
_BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)  # gaussian_blur, in pixels of such an image
_NOISE_SIGMA = (0.08, 0.12, 0.18, 0.26, 0.38)  # gaussian_noise, where white is 1
_JPEG_QUALITY = (25, 18, 15, 10, 7)  # jpeg_compression
_LIGHT = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)  # of the scene's light: two to six stops less
_ELECTRONS = 4000  # that white is at full light, as in a small sensor
_READ_NOISE = 4.0  # electrons, standard deviation


def corrupt(image: Pixels, corruption: str, severity: int, item: int = 0, seed: int = 0) -> Pixels:
    """The image ``uint8 [height, width, 3]`` with a corruption of `CORRUPTIONS`, in the same shape.

    severity: 1 (mild) to 5. All that is random comes from (seed, item), so that an item looks the same in every run;
    at each severity it is the same noise, only stronger.
    Raises ValueError for another corruption, severity or kind of image.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {corruption!r}: choose from {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severities are 1 to 5, not {severity}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image is uint8 [height, width, 3], not {image.dtype} {image.shape}")
    return CORRUPTIONS[corruption](image, severity - 1, np.random.default_rng((seed, item)))


def _blur(image: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    sigma = _BLUR_SIGMA[level] * min(image.shape[:2]) / _SIDE
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def _noise(image: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    return _bytes(image / 255 + _NOISE_SIGMA[level] * rng.standard_normal(image.shape))


def _jpeg(image: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY[level])
    return np.array(Image.open(buffer))


def _low_light(image: Pixels, level: int, rng: np.random.Generator) -> Pixels:
    """A shorter exposure, brightened by a quarter of its stops as a camera would: dark, and with the sensor's noise.

    It is linear light that falls. What the sensor counts has the noise of photons, whose variance is their number, and
    of reading them out, together one normal variable (Foi et al. 2008). The numbers are this package's own.
    """
    electrons = _ELECTRONS * _LIGHT[level] * _to_linear(image / 255)
    counted = electrons + np.sqrt(electrons + _READ_NOISE**2) * rng.standard_normal(image.shape)
    gain = _LIGHT[level] ** -0.25
    return _bytes(_from_linear(gain * counted / _ELECTRONS))


CORRUPTIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "gaussian_blur": _blur,
    "gaussian_noise": _noise,
    "jpeg_compression": _jpeg,
    "low_light": _low_light,
}


def _to_linear(shares: np.ndarray) -> np.ndarray:
    """Of sRGB (IEC 61966-2-1), where white is 1."""
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def _from_linear(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _bytes(shares: np.ndarray) -> Pixels:
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)
