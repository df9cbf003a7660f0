"""What ViTTT sees of a picture, as a processor of transformers: the centre at the model's size, of known mean and spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images

from kvbind.inner.value import check_positive_int
from kvbind.models.auto import NotCopied
from kvbind.models.pictures import centred, on_white

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VitttImageProcessor(NotCopied, BaseImageProcessor):
    """Pictures of any size to `pixel_values`, exactly as images are read in evaluation. Needs Pillow, not torchvision.

    What is transparent shows white; the largest central square, times `crop_pct`, is resized (bicubic) to the size; pixels
    from 0 to 1 lose the mean and are divided by the standard deviation.

    Args:
        size: side of the result in pixels, or `{"height": n, "width": n}`.
        num_channels: 1 for grey, 3 for colour.
        image_mean: of each channel, of pixels from 0 to 1.
        image_std: of each channel, likewise.
        crop_pct: the side of the square that is seen over the picture's shorter side.
        **kwargs: further fields of transformers' processors, kept and written.

    Raises:
        ValueError: numbers that do not fit together.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        size: int | Mapping[str, int] = 224,
        num_channels: int = 3,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        crop_pct: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        side = _side(size)
        self.size = {"height": side, "width": side}
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3; got {num_channels}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != num_channels:
                raise ValueError(f"{name} must hold a number per channel, {num_channels}; got {list(values)}")
        if not min(image_std) > 0:
            raise ValueError(f"image_std must be above 0; got {list(image_std)}")
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1; got {crop_pct}")
        self.num_channels, self.crop_pct = num_channels, crop_pct
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without its class: that is the configuration's to tell, in `config.json` beside it.

        Where a processor's own file names one, pipelines look for a class of videos after it, and ask whether to run it.
        """
        fields: dict[str, Any] = super().to_dict()
        fields.pop("image_processor_type", None)
        return fields

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        size: int | Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures as a model takes them.

        Args:
            images: a PIL image, a uint8 array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`, or a list of these.
            return_tensors: "pt" or "np" for one array `[B, C, size, size]`; None for a list of arrays.
            size: in place of the processor's.
            **kwargs: none.

        Returns:
            `pixel_values`, float32.

        Raises:
            ValueError: pixels that are not from 0 to 255 in 8 bits, or another number of channels than 1, 3 or 4.
            TypeError: an argument that this processor has no use for.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise TypeError(f"VitttImageProcessor takes images, return_tensors and size; got {', '.join(unknown)}")
        side = _side(self.size if size is None else size)
        given: Any = make_flat_list_of_images(images)
        values = [self._pixels(_picture(image), side) for image in given]
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def _pixels(self, picture: Image.Image, side: int) -> NDArray[np.float32]:
        image = centred(on_white(picture).convert("L" if self.num_channels == 1 else "RGB"), side, self.crop_pct)
        pixels = np.asarray(image).reshape(side, side, self.num_channels).transpose(2, 0, 1).astype(np.float32)
        mean, std = (np.array(x)[:, None, None] for x in (self.image_mean, self.image_std))
        return pixels * (1 / (255 * std)).astype(np.float32) - (mean / std).astype(np.float32)


def _side(size: int | Mapping[str, int]) -> int:
    sides = [size] if isinstance(size, int) else list(size.values())
    if not isinstance(size, int) and (set(size) != {"height", "width"} or len(set(sides)) != 1):
        raise ValueError(f"size must be a number of pixels, or a height and an equal width; got {dict(size)}")
    check_positive_int("size", sides[0])
    return sides[0]


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise ValueError(f"images must be PIL images, or uint8 arrays of pixels from 0 to 255; got {pixels.dtype}")
    shape = list(pixels.shape)
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)) or not pixels.size:
        raise ValueError(
            f"images must be [H, W] of a pixel or more, or have 1, 3 or 4 channels first or last; got shape {shape}"
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
