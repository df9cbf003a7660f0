"""Image files, decoded to 8-bit RGB: the one place that says what their other kinds mean.

- 16-bit grey (PNG, PGM, TIFF, also of 12 bits): the whole range becomes 0 to 255, as PIL has it with 16-bit colour.
- Floating point (TIFF): from 0, black, to 1, white; other values are refused, as no file says what they mean.
- Integers of 32 bits or with a sign, and CIE Lab: refused.
- What is transparent, by an alpha channel, a palette or a colour that stands for it, shows white.
- CMYK and YCbCr: by PIL's formulas, without colour profiles.
- Of animations, the first picture.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kvbind.models.pictures import on_white
from kvbind.tasks.files import EXPANDED_GIB

_BITS, _PHOTOMETRIC = 258, 262
"""Tags of TIFF files."""


def open_picture(
    file: Path | BinaryIO, what: str = "", *, upright: bool = False, expanded_gib: float = EXPANDED_GIB
) -> Image.Image:
    """An image as 8-bit RGB.

    Args:
        file: the image file.
        what: what to call it in errors; default its path.
        upright: turn it as its EXIF orientation says that it is to be seen; else its pixels stay where they are stored, as
            the intrinsics of a camera count them.
        expanded_gib: the most GiB that its pixels may take, at four bytes each.

    Raises:
        ValueError: a file that is no image, is too large, or of a kind whose brightness is not known.
    """
    what = what or str(file)
    try:
        with _any_size(), Image.open(file) as picture:
            if picture.width * picture.height * 4 > expanded_gib * 2**30:
                raise ValueError(
                    f"its {picture.width} x {picture.height} pixels take more than {expanded_gib:g} GiB, which "
                    "data.expanded_gib raises"
                )
            if picture.mode == "LAB":
                raise ValueError("CIE Lab is not read; RGB is")
            turned = ImageOps.exif_transpose(picture) if upright else picture
            return _as_rgb(turned, picture)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # whatever PIL's decoders raise
        raise ValueError(f"{what} must be an image; {error}") from error


def _as_rgb(picture: Image.Image, opened: Image.Image) -> Image.Image:
    """A picture as 8-bit RGB on white; `opened` is the file that it comes from."""
    clear = picture.info.get("transparency")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        pixels = np.asarray(picture)
        grey = Image.fromarray(_as_bytes(pixels, opened))
        if not isinstance(clear, int):
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
        picture = grey
    return on_white(picture)


def _as_bytes(pixels: NDArray[np.generic], opened: Image.Image) -> NDArray[np.uint8]:
    """Grey levels of more than 8 bits as levels from 0 to 255."""
    tags = getattr(opened, "tag_v2", {})
    if opened.mode == "F":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating point pixels must lie between 0 and 1; they lie between {low:g} and {high:g}")
        levels = pixels.astype(np.float64)
    elif opened.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise ValueError("integers of 32 bits or with a sign have no known white; 8 or 16 bits without a sign have")
    else:
        levels = pixels.astype(np.float64) / (2 ** int(tags.get(_BITS, (16,))[0]) - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which PIL sees to for 8 bits alone
        levels = 1 - levels
    return np.rint(levels * 255).astype(np.uint8)


@contextmanager
def _any_size() -> Iterator[None]:
    """Open images of any size: the limit is `open_picture`'s own."""
    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = most
