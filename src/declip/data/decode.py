"""An image file's bytes to pixels."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

MOST_PIXELS = 2**27
"""Largest image that is decoded: 0.4 GB."""

_ORIENTATION = 0x0112  # EXIF's tag

# Pillow warns of what is damaged or large; here it is an error or does no harm. Once for all, as threads decode too.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes) -> Pixels:
    """Decode an image file's bytes to RGB ``[height, width, 3]``.

    Transparent parts are laid on white, of an animation the first frame counts, and the image stands upright as its
    EXIF orientation says. Raises ValueError where the bytes are no image, a broken or truncated one, or one of more
    than MOST_PIXELS, which would fill the memory.
    """
    with opened_image(data) as image:
        return np.array(upright(image))


def count_pixels(data: bytes) -> int:
    """How many pixels an image file has, by its header; raises ValueError as `decode_image` does."""
    with opened_image(data) as image:
        return image.width * image.height


@contextlib.contextmanager
def opened_image(data: bytes) -> Iterator[Image.Image]:
    """An image of which only the header is read; whatever goes wrong with it is a ValueError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            yield image
    except Exception as error:  # on broken bytes PIL's readers raise anything from OSError to struct.error
        raise ValueError(f"the image cannot be decoded: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """An opened image as its EXIF orientation says, in RGB, transparent parts laid on white."""
    image.load()
    return as_rgb(ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image)


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
