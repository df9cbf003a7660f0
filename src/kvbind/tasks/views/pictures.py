"""Images resized and cropped, with intrinsics that follow."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvbind.tasks.pictures import open_picture

__all__ = ["open_picture", "resize_and_crop"]


def resize_and_crop(picture: Image.Image, fxfycxcy: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An image resized to cover `size` and cropped around its middle, and the intrinsics of the result.

    Args:
        picture: RGB.
        fxfycxcy: `[4]`, in pixels of `picture`.
        size: height and width in pixels.

    Returns:
        The image, uint8 `[3, h, w]`, and its intrinsics, `[4]`.
    """
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    wide, high = round(picture.width * scale), round(picture.height * scale)
    left, top = (wide - width) // 2, (high - height) // 2
    # by what pixels move, which after rounding is not quite `scale`
    x, y = wide / picture.width, high / picture.height
    moved = fxfycxcy * fxfycxcy.new_tensor([x, y, x, y]) - fxfycxcy.new_tensor([0, 0, left, top])
    if (wide, high) != picture.size:
        picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    pixels = np.array(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels).permute(2, 0, 1), moved
