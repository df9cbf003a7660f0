"""What suits images of one's own, found in a sample of them: size, channels, and the spread of their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbind.tasks.images.augment import centred
from kvbind.tasks.images.stores import Images, InMemory

SAMPLED = 64
"""Images in the sample, spread over all."""

SIZES = (224, 192, 160, 128, 96, 64, 48, 32)
"""Sides in pixels that are chosen among: the largest that does not enlarge half of the images."""

PATCHES, LEAST_PATCHES = (16, 8, 4, 2), 12
"""Sides of patches that are chosen among, and how many of them are wanted along an image's side."""


@dataclass(frozen=True, eq=False)
class PixelStatistics:
    """The size, channels and pixels of some images.

    Attributes:
        size: side of the images in pixels, as the run has them.
        pixels: of the sampled images, at that size, float64 `[n, 3]`, from 0 to 1.
    """

    size: int
    pixels: NDArray[np.float64]

    @property
    def channels(self) -> int:
        """1 where all pixels are grey, 3 otherwise."""
        return 1 if (self.pixels == self.pixels[:, :1]).all() else 3

    def mean(self, channels: int) -> list[float]:
        """The mean of each channel."""
        return [round(float(x), 3) for x in self._of(channels).mean(0)]

    def std(self, channels: int) -> list[float]:
        """The spread of each channel; images of one colour alone count as if they had some spread."""
        return [max(round(float(x), 3), 0.01) for x in self._of(channels).std(0)]

    def _of(self, channels: int) -> NDArray[np.float64]:
        # the weights are those by which PIL makes grey of colour
        return self.pixels if channels == 3 else self.pixels @ np.array([[0.299], [0.587], [0.114]])


def pixel_statistics(images: Images, size: int = 0) -> PixelStatistics:
    """Statistics of a sample of images, the same sample every time.

    Args:
        images: the training images.
        size: side in pixels; 0 for one that suits them.

    Raises:
        ValueError: an image that cannot be read; the message names it.
    """
    chosen = np.unique(np.linspace(0, len(images.labels) - 1, SAMPLED).round().astype(int))
    if isinstance(images, InMemory):
        held = images.images[chosen].numpy().transpose(0, 2, 3, 1)
        pixels = np.broadcast_to(held, (*held.shape[:3], 3)) if held.shape[-1] == 1 else held
        return PixelStatistics(size or held.shape[1], pixels.reshape(-1, 3) / 255)
    sides, read = [], []
    for index in chosen.tolist():
        image = images.read(index)
        sides.append(min(image.size))
        # a photo is too large to be kept until all are seen
        read.append(centred(image, min(sides[-1], size or SIZES[0])))
    size = size or suited_size(float(np.median(sides)))
    return PixelStatistics(size, np.concatenate([np.asarray(centred(image, size)).reshape(-1, 3) for image in read]) / 255)


def suited_size(side: float) -> int:
    """The side to give images whose shorter side is so long: the largest of `SIZES` within it, or nearly their own."""
    return next((size for size in SIZES if size <= side), max(int(side) // 4 * 4, 4))


def suited_patch(size: int) -> int:
    """The side of patches that suits images of a size."""
    fitting = [patch for patch in PATCHES if size % patch == 0 and size // patch >= LEAST_PATCHES]
    return fitting[0] if fitting else 1
