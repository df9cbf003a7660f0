"""How near rendered views are to true ones, and how near the nearest input view is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from kvbind.tasks.views.drawing import Batch

PEAK_ERROR = 1e-10
"""The mean squared error below which PSNR grows no further: 100 dB."""


def psnr(predicted: Tensor, true: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, `[N]`, of RGB `[N, 3, h, w]` in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    error = (predicted - true).square().flatten(1).mean(1)
    ratio: Tensor = peak_signal_noise_ratio(predicted, true, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return torch.where(error > PEAK_ERROR, ratio, 100.0)


def ssim(predicted: Tensor, true: Tensor) -> Tensor:
    """Structural similarity of each image, `[N]`, of RGB `[N, 3, h, w]` in [0, 1], under a Gaussian window of 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity = structural_similarity_index_measure(predicted, true, data_range=1.0, reduction="none")
    return cast(Tensor, similarity).reshape(-1)


def nearest_inputs(batch: Batch) -> Tensor:
    """Which input view is nearest to each target, int64 `[B, Vt]`.

    Nearest is the least distance between the cameras' centres plus that between the ends of their unit z axes.
    """
    c2w, target = batch["c2w"], batch["target_c2w"]
    # not torch.cdist, which takes products of many views, on a GPU perhaps in TF32
    place, ahead = ((target[:, :, None, :3, axis] - c2w[:, None, :, :3, axis]).norm(dim=-1) for axis in (3, 2))
    return (place + ahead).argmin(-1)
