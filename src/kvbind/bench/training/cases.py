"""Models whose training steps are timed: each on batches of one size, with its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.systems import ladder
from kvbind.models import PRESETS, LactCache, LactConfig, LactForCausalLM, lact_nvs, vittt
from kvbind.models.flops import lact_flops, lact_nvs_flops, vittt_flops
from kvbind.sequence.boundaries import Boundaries, with_room
from kvbind.train import TrainConfig
from kvbind.train.ranks import WHOLE, Share

DISTINCT = 4
"""Batches that take turns."""


@dataclass(frozen=True)
class TrainingCase:
    """One model on batches of one size.

    Attributes:
        name: of the row.
        unit: what is counted.
        units: of a batch.
        build: makes the model, on the current device.
        draw: a batch on the CPU, by its number.
        loss: of a model and a batch.
        blocks: the model's repeated parts.
        compared: steps to compare losses over; 0 for none.
        flops: model FLOPs of training on one unit, `kvbind.models.flops`; None where they are not known.
    """

    name: str
    unit: str
    units: int
    build: Callable[[], Any]
    draw: Callable[[int], dict[str, Tensor]]
    loss: Callable[[Any, dict[str, Tensor]], Tensor]
    blocks: Callable[[Any], Iterable[nn.Module]]
    compared: int = 0
    flops: float | None = None


class Random:
    """A task whose batches are random, as `kvbind.train.train` wants one.

    Args:
        case: what draws the batches.
        ends: the batch at which the process is interrupted, or None.
    """

    batch = 1

    def __init__(self, case: TrainingCase, ends: int | None = None) -> None:
        self.case, self.ends, self.unit = case, ends, case.unit
        pinned = torch.cuda.is_available()
        drawn = (case.draw(number) for number in range(DISTINCT))
        self.drawn = [{name: x.pin_memory() if pinned else x for name, x in batch.items()} for batch in drawn]

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The few batches in turn."""
        for number in itertools.count(position["next"] if position else 0):
            if number == self.ends:
                raise KeyboardInterrupt
            yield self.drawn[number % DISTINCT], {"next": number + 1}

    def size(self, batch: Any) -> int:
        """Units in a batch."""
        return self.case.units

    def weight(self, batch: Any) -> float:
        """All count alike."""
        return 1.0

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of the case's model on a batch."""
        return self.case.loss(model, batch)

    def blocks(self, model: Any) -> Iterable[nn.Module]:
        """The repeated parts of the case's model."""
        return self.case.blocks(model)

    def evaluate(self, model: Any, share: Share = WHOLE) -> dict[str, Any]:
        """The loss of a batch without gradients; a language model also goes on with a few tokens."""
        device = next(model.parameters()).device
        batch = {name: x.to(device) for name, x in self.drawn[0].items()}
        if isinstance(model, LactForCausalLM):
            cache, ids = LactCache(), batch["input_ids"][:1, :64]
            for _ in range(4):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
        return {"loss": float(self.case.loss(model, batch))}


def cases(sizes: str = "full") -> Iterator[TrainingCase]:
    """What is measured.

    Args:
        sizes: "full", or "tiny" for a look on a CPU.
    """
    tiny = sizes == "tiny"
    small, length, rows = ("tiny", 64, 1) if tiny else ("30m", 8192, 3)
    for rung in ("rung2", "rung6", "rung0"):
        # the rungs share what is compared: how steps are taken
        yield language(f"lact-{small}-{rung}", small, rung, length, rows, 256, compared=50 if rung == "rung2" else 0)
    yield images(*(("tiny", 2, 32) if tiny else ("base", 256, 224)))
    yield views(*((1, 32, 1, 2, 16) if tiny else (12, 768, 4, 8, 128)))
    if not tiny:
        for rung in ("rung2", "rung0", "rung6"):
            yield language(f"lact-760m-{rung}", "760m", rung, 32768, 1, 32000)
    yield packed(f"lact-{small}-rung2-packed", small, "rung2", length, rows, 256, compared=40)


def language(name: str, preset: str, rung: str, length: int, rows: int, vocabulary: int, compared: int = 0) -> TrainingCase:
    """The LaCT language model of a preset, with a rung of the ladder."""
    sizes = PRESETS[preset]
    inner = ladder(sizes["inner"])[rung]
    config = LactConfig(**{**sizes, "inner": inner, "vocab_size": vocabulary, "max_position_embeddings": length})

    def draw(number: int) -> dict[str, Tensor]:
        ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, use_cache=False).loss
        return found

    build = partial(LactForCausalLM, config)
    flops = sum(lact_flops(config, length).values()) / length
    return TrainingCase(name, "tokens", rows * length, build, draw, loss, lambda model: model.model.layers, compared, flops)


def packed(name: str, preset: str, rung: str, length: int, rows: int, vocabulary: int, compared: int = 0) -> TrainingCase:
    """As `language`, of one row that is packed with some twelve documents, of 1 token or up to `length`."""
    whole = language(name, preset, rung, length, rows, vocabulary, compared)
    total = rows * length

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        inside = torch.randint(1, total, (8 + number,), generator=generator)
        bounds = torch.cat((torch.arange(rows + 1) * length, inside)).unique()
        ids = torch.randint(256, (1, total), generator=generator)
        return {"input_ids": ids, "labels": ids, "boundaries": with_room(bounds.to(torch.int32))}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        bounds = Boundaries(batch["boundaries"], ids.shape[1])
        found: Tensor = model(ids, labels=batch["labels"], cu_seqlens=bounds, use_cache=False).loss
        return found

    return replace(whole, draw=draw, loss=loss)


def images(size_of_model: str, batch: int, size: int) -> TrainingCase:
    """ViTTT on images of random pixels, which are made floats on the device."""

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        return {"x": pixels, "labels": torch.randint(1000, (batch,), generator=generator)}

    def loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch["x"].float() / 128 - 1).float(), batch["labels"])

    sizes = vittt.SIZES[f"vittt_{size_of_model}"]
    flops = sum(vittt_flops(vittt.VitttConfig(**sizes, num_labels=1000), (size, size)).values())
    build = partial(vittt.build, f"vittt_{size_of_model}", num_classes=1000)
    return TrainingCase(
        f"vittt-{size_of_model[0]}-training", "images", batch, build, draw, loss, lambda network: [], flops=flops
    )


def views(layers: int, dim: int, batch: int, inputs: int, side: int) -> TrainingCase:
    """LaCT view synthesis on scenes of random pictures, as many targets as inputs."""
    config = lact_nvs.LactNvsConfig(dim=dim, layers=layers, fast_head_dim=dim, head_dim=min(64, dim))

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (batch, 2 * inputs, 3, side, side), generator=generator, dtype=torch.uint8)
        poses = torch.eye(4).repeat(batch, 2 * inputs, 1, 1)
        poses[..., :3, 3] = 2 * torch.rand(batch, 2 * inputs, 3, generator=generator) - 1
        return {
            "pixels": pixels,
            "c2w": poses,
            "fxfycxcy": torch.tensor([side, side, side / 2, side / 2]).repeat(batch, 2 * inputs, 1),
        }

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        pixels, poses, lenses = batch["pixels"].float() / 255, batch["c2w"], batch["fxfycxcy"]
        found = model(pixels[:, :inputs], poses[:, :inputs], lenses[:, :inputs], poses[:, inputs:], lenses[:, inputs:])
        return F.mse_loss(found.float(), pixels[:, inputs:])

    build = partial(lact_nvs.LactNvs, config)
    flops = sum(lact_nvs_flops(config, (side, side), inputs, inputs).values()) / (2 * inputs)
    return TrainingCase(
        "lact-nvs-training", "views", 2 * inputs * batch, build, draw, loss, lambda model: model.blocks, flops=flops
    )


def configuration(device: torch.device, how: str, **fields: Any) -> TrainConfig:
    """How steps are taken."""
    return TrainConfig(
        **{"learning_rate": 3e-4, "warmup": 5, "device": str(device), "checkpoint_minutes": 0.0, "graphs": how, **fields}
    )


def build(case: TrainingCase, device: torch.device) -> nn.Module:
    """A model with the same random weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = case.build()
    return model.train()
