"""An image file's bytes to pixels."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

MOST_PIXELS = 2**27
"""Largest image that is decoded: 0.4 GB."""

_ORIENTATION = 0x0112  # EXIF's tag


def decode_image(data: bytes) -> Pixels:
    """Decode an image file's bytes to RGB ``[height, width, 3]``.

    Transparent parts are laid on white, of an animation the first frame counts, and the image stands upright as its
    EXIF orientation says. Raises ValueError where the bytes are no image, a broken or truncated one, or one of more
    than MOST_PIXELS, which would fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about large images; ours is an error
            image = Image.open(io.BytesIO(data))
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            if image.getexif().get(_ORIENTATION, 1) != 1:
                return np.array(as_rgb(ImageOps.exif_transpose(image)))
            return np.array(as_rgb(image))
    except Exception as error:  # on broken bytes PIL's readers raise anything from OSError to struct.error
        raise ValueError(f"the image cannot be decoded: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB, transparent parts laid on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # PIL clips 16-bit grey levels to 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")
