"""PIL images on the way to a model: on white, cut to their centre, resized."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels."""


def on_white(picture: Picture) -> Picture:
    """A picture of 8 bits as RGB, with what is transparent in it white."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def resized(image: Picture, size: int, box: Box) -> Picture:
    """A part of an image, resized to `size` x `size`, bicubic."""
    from PIL.Image import Resampling

    return image.resize((size, size), Resampling.BICUBIC, box)


def centred(image: Picture, size: int, kept: float = 1.0) -> Picture:
    """The largest central square, times `kept`, resized to `size` x `size`; an image of that size stays as it is."""
    if kept == 1 and image.size == (size, size):
        return image
    width, height = image.size
    side = min(image.size) * kept
    left, upper = (width - side) / 2, (height - side) / 2
    return resized(image, size, (left, upper, left + side, upper + side))
