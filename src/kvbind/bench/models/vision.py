"""`kvbind bench vision`: ViTTT beside a vision transformer with softmax attention, by image size."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.bench.harness.timing import median_seconds, peak_bytes
from kvbind.models.vittt import SIZES, build
from kvbind.precision import matmul_precision

CLASSES = 1000
TOKENS = 50176
"""Patches in a batch unless it is given or does not fit: 256 images of 224 x 224 in patches of 16."""


@dataclass(frozen=True)
class VisionRow:
    """One model at one image size.

    Attributes:
        model: its name.
        size: side of the images, in pixels.
        tokens: patches of an image.
        batch: images at once, the same for all models of a size.
        forward: images per second, without gradients.
        training: images per second of a step: forward, backward and AdamW.
        forward_bytes: the most memory that a forward pass held beyond weights and input, per image.
        training_bytes: the most memory that a step held beyond weights, optimizer and input, per image.
    """

    model: str
    size: int
    tokens: int
    batch: int
    forward: float
    training: float
    forward_bytes: int
    training_bytes: int


def bench_vision(
    model: str,
    peer: str | None,
    sizes: Sequence[int],
    device: torch.device,
    *,
    batch: int = 0,
    seconds: float = 3.0,
    compiled: bool = False,
) -> list[VisionRow]:
    """Time both models at each size, in turns, under bfloat16 autocast on a GPU (float32 on a CPU).

    Args:
        model: a plain size of `kvbind.models.vittt.SIZES`.
        peer: a vision transformer of timm's, or None for none.
        sizes: sides of the images, multiples of the patch's.
        device: where to run.
        batch: images at once; 0 for a power of two of about `TOKENS` patches, halved until training fits in memory.
        seconds: how long to time each size, forward and training each, all models together.
        compiled: let `torch.compile` make both models' kernels.

    Raises:
        ValueError: an unknown model, or a size that its patches do not tile.
        ImportError: a peer, and timm is not installed.
    """
    plain = {name: fields for name, fields in SIZES.items() if "patch_size" in fields}
    if model not in plain:
        raise ValueError(f"model must be one of {', '.join(plain)}; got {model!r}")
    patch = plain[model]["patch_size"]
    for size in sizes:
        if size % patch or size < patch:
            raise ValueError(f"sizes must be multiples of the patch's side, {patch}; got {size}")
    rows = []
    with matmul_precision("high"):
        for size in sizes:
            tokens = (size // patch) ** 2
            makers: dict[str, Callable[[], nn.Module]] = {model: partial(build, model, num_classes=CLASSES)}
            if peer is not None:
                makers[peer] = partial(vision_transformer, peer, size)
            rows += _bench_size(makers, size, tokens, batch or fitting_batch(tokens), device, seconds, compiled)
    return rows


def fitting_batch(tokens: int) -> int:
    """The largest power of two whose images have up to `TOKENS` patches together, at least 1."""
    return 1 << max(math.floor(math.log2(TOKENS / tokens)), 0)


def vision_transformer(name: str, size: int) -> nn.Module:
    """A vision transformer of timm's, with random weights, for images of one size.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "bench vision compares with a vision transformer of the package 'timm', which is not installed; --peer none "
            "measures ViTTT alone"
        ) from error
    model: nn.Module = timm.create_model(name, pretrained=False, img_size=size, num_classes=CLASSES)
    return model


def _bench_size(
    makers: dict[str, Callable[[], nn.Module]],
    size: int,
    tokens: int,
    batch: int,
    device: torch.device,
    seconds: float,
    compiled: bool,
) -> list[VisionRow]:
    """The rows of one size; the batch is halved until every model's training step fits."""
    models = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        models[name] = make().to(device)
        if compiled:
            models[name].compile()
    steps = {name: training_step(models[name], device) for name in models}
    while not all(fits(step, models[name], *draw(batch, size, device)) for name, step in steps.items()):
        if batch == 1:
            raise ValueError(f"sizes must be such that one image can be trained on in the memory of {device}; got {size}")
        batch //= 2
    images, labels = draw(batch, size, device)

    trainings = [partial(step, images, labels) for step in steps.values()]
    forwards = [partial(forward, module, images) for module in models.values()]
    training_seconds = median_seconds(trainings, device, least=3, seconds=seconds)
    training_bytes = [peak_bytes(work, device) for work in trainings]
    forward_seconds = median_seconds(forwards, device, least=3, seconds=seconds)
    forward_bytes = [peak_bytes(work, device) for work in forwards]
    return [
        VisionRow(
            model=name,
            size=size,
            tokens=tokens,
            batch=batch,
            forward=batch / forward_seconds[i],
            training=batch / training_seconds[i],
            forward_bytes=forward_bytes[i] // batch,
            training_bytes=training_bytes[i] // batch,
        )
        for i, name in enumerate(models)
    ]


def fits(step: Callable[[Tensor, Tensor], None], model: nn.Module, images: Tensor, labels: Tensor) -> bool:
    """Whether a training step has memory enough; if not, what it held is given back."""
    enough = True
    try:
        step(images, labels)
    except torch.cuda.OutOfMemoryError:
        enough = False
    if not enough:  # only now, as the error held on to the step's tensors
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return enough


def draw(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


def autocast(device: torch.device) -> torch.autocast:
    """The precision that is measured."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, in evaluation mode."""
    model.eval()
    with autocast(images.device):
        logits: Tensor = model(images)
    return logits


def training_step(model: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A function of images and classes that takes one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        model.train()
        with autocast(device):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(rows: Sequence[VisionRow], model: str, peer: str) -> dict[str, Any]:
    """How many times as fast, and with what share of the memory, `model` runs beside `peer`, and where they cross.

    Args:
        rows: of both models, at all sizes.
        model: its name in the rows.
        peer: the name of what it stands beside.

    Returns:
        For "forward" and "training": "speed", the ratio of images per second by size, "memory", that of bytes per image,
        and "crossing", the side in pixels at which speeds are equal, by logarithmic interpolation; None where one is faster
        at all measured sizes.
    """
    by = {(row.model, row.size): row for row in rows}
    sizes = sorted({row.size for row in rows})
    found: dict[str, Any] = {}
    for work in ("forward", "training"):
        speed = {size: getattr(by[model, size], work) / getattr(by[peer, size], work) for size in sizes}
        memory = {
            size: getattr(by[model, size], f"{work}_bytes") / max(getattr(by[peer, size], f"{work}_bytes"), 1)
            for size in sizes
        }
        found[work] = {"speed": speed, "memory": memory, "crossing": crossing(speed)}
    return found


def crossing(ratios: dict[int, float]) -> float | None:
    """The side at which a ratio that is known at some sides becomes 1, linear between their logarithms; None if it does not.

    Args:
        ratios: by side, rising.
    """
    for (one, low), (other, high) in pairwise(ratios.items()):
        a, b = math.log(low), math.log(high)
        if a * b <= 0 and a != b:
            return math.exp(math.log(one) + a / (a - b) * (math.log(other) - math.log(one)))
    return None
