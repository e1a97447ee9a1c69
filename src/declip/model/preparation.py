"""From an image file to what a model takes, in two parts: geometry in loader processes, numbers in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from declip.data.decode import ImageFile, Pixels

_ENOUGH = 2
"""A JPEG is decoded at a reduced scale that leaves so many times the side that is wanted: what is then lost by resizing
in two steps is below a level of a byte in the mean (as with Pillow's own `reducing_gap`)."""


class Preparation:
    """A model's own preprocessing, open_clip's or what equals it, cut where bytes become floats."""

    def __init__(self, preprocess: Any) -> None:
        *self.geometry, _, normalize = preprocess.transforms
        size = self.geometry[0].size
        self.side = max(size) if isinstance(size, Sequence) else int(size)
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (normalize.mean, normalize.std)
        )

    def __call__(self, data: bytes) -> Pixels:
        """uint8 [height, width, 3] of an image file's bytes. Raises ValueError where they cannot be decoded."""
        file = ImageFile(data)
        least = _ENOUGH * self.side
        reduction = next(r for r in (8, 4, 2, 1) if r == 1 or min(file.height, file.width) // r >= least)
        image = Image.fromarray(file.decode(reduction))
        for transform in self.geometry:
            image = transform(image)
        return np.array(image)

    def batch(self, images: Sequence[Pixels], device: torch.device) -> Tensor:
        """float32 [batch, 3, height, width], normalised, of as many prepared images."""
        pixels = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
        return pixels.float().div_(255).sub_(self.mean.to(device)).div_(self.std.to(device))
