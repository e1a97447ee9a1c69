"""Pictures that tests decode and change."""

from __future__ import annotations

import numpy as np
from PIL import Image

from declip.data.decode import Pixels


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """A smooth colourful image with some noise and a white part."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    noisy[: height // 4, : width // 3] = 255
    return noisy


def difference(ours: Pixels, theirs: Image.Image | Pixels) -> tuple[float, int]:
    """Mean and largest difference in grey levels."""
    apart = np.abs(ours.astype(int) - np.asarray(theirs).astype(int))
    return float(apart.mean()), int(apart.max())
