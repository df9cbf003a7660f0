"""How training images are varied: crops as they are read, the rest on the device, a whole batch at a time.

Crop, flip, RandAugment, erasing, mixup, cutmix and label smoothing are those by which DeiT is trained (arXiv 2012.12877).
RandAugment is torchvision's; everything else is here, as torchvision draws once for a whole batch what should differ from
image to image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.models.pictures import Box, centred, resized
from kvbind.train.ranks import Share

if TYPE_CHECKING:
    from PIL.Image import Image

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
"""The erased rectangle's share of the image, and its height over its width."""

CROP_RATIO = (3 / 4, 4 / 3)
"""The width of a resized crop over its height."""

CROP_ATTEMPTS = 10


@dataclass
class AugmentConfig:
    """How training images are varied; what is 0 does not happen.

    Attributes:
        crop: "resized", a random part of the image resized to `data.size` (not for images held in memory); "shift", the
            image moved by up to `shift` pixels, black coming in; or "none".
        scale: of resized crops, the smallest and largest share of the image.
        shift: pixels.
        flip: the probability of a horizontal flip.
        randaugment: operations of RandAugment (torchvision's) per image; not for images held in memory.
        magnitude: of RandAugment, 0 to 30.
        erasing: the probability that a rectangle of the image becomes noise.
        mixup: alpha of the Beta distribution by which images are blended with others.
        cutmix: alpha of the Beta distribution by which parts are taken from others. With both, each batch has one or the
            other, with even chances.
        smoothing: the share of a target that goes to all classes alike.
    """

    crop: str = "none"
    scale: tuple[float, float] = (0.08, 1.0)
    shift: int = 0
    flip: float = 0.0
    randaugment: int = 0
    magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_choice("augment.crop", self.crop, ("resized", "shift", "none"))
        for name in ("flip", "erasing", "smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie from 0 to 1; got {getattr(self, name)}")
        for name in ("shift", "randaugment", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"augment.magnitude must lie from 0 to 30; got {self.magnitude}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale must be two rising numbers above 0 and up to 1; got {list(self.scale)}")
        if (self.crop == "shift") != (self.shift > 0):
            raise ValueError(
                f"augment.shift must be above 0 with crop='shift', and 0 with another; got {self.shift} and {self.crop!r}"
            )


def check_fits_memory(config: AugmentConfig) -> None:
    """Refuse for images held in memory what only happens as images are read.

    Raises:
        ValueError: a resized crop, or RandAugment.
    """
    if config.crop == "resized" or config.randaugment:
        raise ValueError(
            "augment.crop must be 'shift' or 'none' and augment.randaugment 0 for images held in memory; got "
            f"crop={config.crop!r}, randaugment={config.randaugment}"
        )


class ReadTraining:
    """Makes a training image of what was read: resized crop, then RandAugment.

    Args:
        config: which augmentations, and how strong.
        size: side of the result, in pixels.

    Raises:
        ImportError: RandAugment is asked for and torchvision is not installed.
    """

    def __init__(self, config: AugmentConfig, size: int) -> None:
        self.config, self.size = config, size
        self.randaugment: Any = None
        if config.randaugment:
            try:
                from torchvision.transforms import v2
            except ImportError as error:
                raise ImportError(
                    f"augment.randaugment={config.randaugment} needs the package 'torchvision', which is not installed; "
                    "augment.randaugment=0 trains without it"
                ) from error
            self.randaugment = v2.RandAugment(num_ops=config.randaugment, magnitude=config.magnitude)

    def __call__(self, image: Image, seed: tuple[int, ...]) -> Image:
        """The image, `size` x `size`, varied as `seed` decides."""
        if self.config.crop == "resized":
            box = random_box(image.size, self.config.scale, np.random.default_rng(seed))
            image = resized(image, self.size, box)
        else:
            image = centred(image, self.size)
        if self.randaugment is not None:
            # it draws from torch's generator, which is otherwise the reading process's own
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.default_rng((*seed, 1)).integers(2**63)))
                image = self.randaugment(image)
        return image


class ReadEvaluation:
    """Makes an evaluation image of what was read: the centre.

    Args:
        size: side of the result, in pixels.
        kept: the side of the result over the image's shorter one, once that is resized.
    """

    def __init__(self, size: int, kept: float) -> None:
        self.size, self.kept = size, kept

    def __call__(self, image: Image, seed: tuple[int, ...]) -> Image:
        """The image, `size` x `size`; `seed` decides nothing."""
        return centred(image, self.size, self.kept)


def random_box(image: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """A random part of an image: its share uniform in `scale`, its shape log-uniform in `CROP_RATIO`.

    Args:
        image: width and height.
        scale: smallest and largest share.
        rng: what draws.

    Returns:
        The box; after `CROP_ATTEMPTS` that did not fit, the largest central square.
    """
    width, height = image
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, upper, left + w, upper + h
    side = min(image)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


@dataclass(frozen=True)
class Among:
    """Which rows of a batch some images are, where processes divide it.

    What is random is drawn for the whole batch by each of them, so that all together make what one would.

    Attributes:
        rows: their numbers.
        total: rows of the whole batch.
        lead: how many of the first are there for the next ones to be mixed with, and are left out in the end.
    """

    rows: tuple[int, ...]
    total: int
    lead: int = 0

    @classmethod
    def of(cls, share: Share, batch: int, mixed: bool) -> Among:
        """The rows of a share of a batch; where images are mixed, the one before them leads."""
        own = tuple(share.rows(batch))
        return cls(((own[0] - 1) % batch, *own), batch, 1) if mixed else cls(own, batch)

    def pick(self, drawn: Tensor, axis: int = 0) -> Tensor:
        """Of what was drawn for the whole batch, that of these rows."""
        return drawn.index_select(axis, torch.tensor(self.rows).to(drawn.device, non_blocking=True))


class Augment:
    """Makes a training batch of images and classes: shift, flip, normalization, erasing, mixup or cutmix, smoothing.

    Args:
        config: which augmentations, and how strong.
        mean: of each channel, of pixels from 0 to 1.
        std: of each channel, likewise.
        classes: how many there are.
    """

    def __init__(self, config: AugmentConfig, mean: list[float], std: list[float], classes: int) -> None:
        self.config, self.mean, self.std, self.classes = config, mean, std, classes

    @property
    def mixes(self) -> bool:
        """Whether an image gets something of the one before it."""
        return bool(self.config.mixup or self.config.cutmix)

    def __call__(self, images: Tensor, labels: Tensor, seed: int, among: Among | None = None) -> tuple[Tensor, Tensor]:
        """Vary a batch, as `seed` decides.

        Args:
            images: uint8 `[B, C, H, W]`.
            labels: int64 `[B]`.
            seed: of every draw.
            among: which rows of a batch these are; None for a whole one.

        Returns:
            float32 `[B, C, H, W]`, and targets `[B, classes]` that sum to 1; without the rows that lead.
        """
        config = self.config
        generator = torch.Generator(images.device).manual_seed(seed)
        if config.shift:
            images = shifted(images, config.shift, generator, among)
        if config.flip:
            images = flipped(images, config.flip, generator, among)
        x = normalized(images, self.mean, self.std)
        if config.erasing:
            x = erased(x, config.erasing, generator, among)
        targets = F.one_hot(labels, self.classes).float()
        targets = targets * (1 - config.smoothing) + config.smoothing / self.classes
        if self.mixes:
            # one draw for the batch, on the CPU, so that no GPU is waited for
            rng = np.random.default_rng(seed)
            cut = rng.random() < 0.5 if config.mixup and config.cutmix else config.cutmix > 0
            alpha = config.cutmix if cut else config.mixup
            share = rng.beta(alpha, alpha)
            x, targets = cut_in(x, targets, share, rng) if cut else blended(x, targets, share)
        lead = among.lead if among else 0
        return x[lead:], targets[lead:]


def normalized(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Pixels 0 to 255 as float32 of about zero mean and unit spread."""
    by_channel = torch.tensor([[1 / (255 * s), m / s] for m, s in zip(mean, std, strict=True)])
    # one transfer, which the CPU does not wait for
    scale, offset = by_channel.to(images.device, non_blocking=True).T[:, None, :, None, None]
    return images.float() * scale - offset


def shifted(images: Tensor, most: int, generator: torch.Generator, among: Among | None = None) -> Tensor:
    """Each image moved by up to `most` pixels down or up and right or left, zeros coming in."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (most,) * 4)
    drawn = torch.randint(2 * most + 1, (2, among.total if among else batch, 1), generator=generator, device=images.device)
    down, right = among.pick(drawn, 1) if among else drawn
    rows = (down + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (right + torch.arange(width, device=images.device))[:, None, None, :]
    number = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[number, channel, rows, columns]


def flipped(images: Tensor, probability: float, generator: torch.Generator, among: Among | None = None) -> Tensor:
    """Some images mirrored left to right."""
    count = among.total if among else len(images)
    chosen = torch.rand(count, 1, 1, 1, generator=generator, device=images.device) < probability
    chosen = among.pick(chosen) if among else chosen
    return torch.where(chosen, images.flip(-1), images)


def erased(images: Tensor, probability: float, generator: torch.Generator, among: Among | None = None) -> Tensor:
    """A rectangle of some images replaced by standard normal noise; one that does not fit is cut to the image's side."""
    height, width = images.shape[-2:]
    count = among.total if among else len(images)
    drawn = torch.rand(5, count, generator=generator, device=images.device)
    chosen, area, ratio, top, left = among.pick(drawn, 1) if among else drawn
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
    low, high = map(math.log, ERASED_RATIO)
    ratio = (low + (high - low) * ratio).exp()
    sides = (area * ratio).sqrt().round().clamp(1, height), (area / ratio).sqrt().round().clamp(1, width)
    inside = []
    for length, side, start in zip((height, width), sides, (top, left), strict=True):
        first = (start * (length - side + 1)).floor()[:, None]
        place = torch.arange(length, device=images.device)
        inside.append((place >= first) & (place < first + side[:, None]))
    mask = inside[0][:, None, :, None] & inside[1][:, None, None, :] & (chosen < probability)[:, None, None, None]
    noise = torch.randn(count, *images.shape[1:], generator=generator, device=images.device)
    noise = among.pick(noise) if among else noise
    return torch.where(mask, noise, images)


def blended(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412): `share` of each image and target, the rest the next one's in the batch."""
    return images.lerp(images.roll(1, 0), 1 - share), targets.lerp(targets.roll(1, 0), 1 - share)


def cut_in(images: Tensor, targets: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Cutmix (arXiv 1905.04899): a rectangle of about `1 - share` of each image comes from the next one in the batch.

    The rectangle's centre is anywhere, what lies outside is lost, and targets follow the area that is left.
    """
    height, width = images.shape[-2:]
    spans = []
    for length in (height, width):
        side, middle = int(length * math.sqrt(1 - share)), int(rng.integers(length))
        spans.append((max(middle - side // 2, 0), min(middle + side - side // 2, length)))
    (top, bottom), (left, right) = spans
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    taken = (bottom - top) * (right - left) / (height * width)
    return mixed, targets.lerp(targets.roll(1, 0), taken)
