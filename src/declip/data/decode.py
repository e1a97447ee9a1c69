"""An image file's bytes to pixels."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # [height, width, 3], RGB

MOST_PIXELS = 2**27
"""Largest image that is decoded: 0.4 GB."""

_ORIENTATION = 0x0112  # EXIF's tag
_TOPS = {"I": (2**16 - 1,), "F": (1.0, 255.0, 2.0**16 - 1)}  # what may be white where levels are wider than bytes

# Pillow warns of what is damaged or large; here it is an error or does no harm. Once for all, as threads decode too.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageFile:
    """An image file's bytes, of which no more is decoded at first than its size needs.

    Raises ValueError, here or in `decode`, where the bytes are no image, a broken or truncated one, or one of more than
    MOST_PIXELS, which would fill the memory.
    """

    height: int  # of the upright image
    width: int

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pixels: Pixels | None = None
        with opened_image(data) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                self._orientation = orientation(image)
                self.height, self.width = image.height, image.width
                if self._orientation > 4:
                    self.height, self.width = image.width, image.height
            else:
                self._pixels = pixels_of(image)
                self.height, self.width = self._pixels.shape[:2]

    def decode(self, reduction: int = 1) -> Pixels:
        """RGB ``[height, width, 3]``, or a JPEG at 1 / `reduction` (2, 4 or 8) of both, rounded up, in less time.

        Transparent parts are laid on white, of an animation the first frame counts, and the image stands upright as its
        EXIF orientation says. Where an image cannot be reduced so, it comes larger, up to whole.
        """
        if self._pixels is not None:
            return self._pixels
        while self._orientation > 1 and (self.height % reduction or self.width % reduction):
            reduction //= 2  # the last pixel is half outside, and turned it would come first and move all others
        least = [-(-side // reduction) for side in (self.height, self.width)]
        if self._orientation > 4:
            least.reverse()
        try:
            # A warning is an error here: Pillow, which is the slower one, then decides whether there is an image.
            pixels = simplejpeg.decode_jpeg(self._data, min_height=least[0], min_width=least[1])
        except ValueError:
            with opened_image(self._data) as image:
                return pixels_of(image)
        return _upright(pixels, self._orientation)


def decode_image(data: bytes) -> Pixels:
    """Decode an image file's bytes to RGB ``[height, width, 3]``, as `ImageFile` says."""
    return ImageFile(data).decode()


def count_pixels(data: bytes) -> int:
    """How many pixels an image file has, by its header; raises ValueError as `ImageFile` does."""
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


def pixels_of(image: Image.Image) -> Pixels:
    """An opened image as RGB ``[height, width, 3]``, upright, transparent parts laid on white."""
    image.load()
    # Only now, as in a PNG file EXIF may follow the pixels.
    return _upright(np.array(as_rgb(image)), orientation(image))


def orientation(image: Image.Image) -> int:
    """How an image is stored, 1 to 8; 1 is upright, and above 4 rows are stored as columns."""
    told = image.getexif().get(_ORIENTATION)
    return told if isinstance(told, int) and 1 <= told <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB, transparent parts laid on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # PIL clips 16-bit grey levels to 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # as the sixteen bits of a PNG are with some versions of PIL
        levels = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
        top = next((top for top in _TOPS[image.mode] if levels.max(initial=0) <= top), levels.max(initial=0))
        return Image.fromarray((levels * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")
