"""The image task: a ViTTT classifier, DeiT's augmentation, top-1 accuracy on held-out images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.models.saving import without_bars
from kvbind.tasks.contents import Contents
from kvbind.tasks.images.augment import Augment, ReadEvaluation, ReadTraining, check_fits_memory, normalized
from kvbind.tasks.images.config import (
    SHRUNK,
    SMALL_SIZE,
    ImagesConfig,
    inner_loops,
)
from kvbind.tasks.images.loading import Batch, Order, Reads, evaluation_batches, training_batches
from kvbind.tasks.images.model import build_model
from kvbind.tasks.images.sources import Images, InMemory, Readable
from kvbind.tasks.start import Start, divergence
from kvbind.train.ranks import WHOLE, Share

if TYPE_CHECKING:
    from kvbind.models.vittt import VitttForImageClassification

log = logging.getLogger("kvbind.tasks")


TOP = 5
"""Of so many of the likeliest classes, one may be an image's for it to count as top-5."""


class ImagesTask:
    """Data, model, loss and metrics of an image run; what `kvbind.train.train` asks of a task.

    Opening it opens both splits, so that a source that does not exist is known at once.

    Args:
        config: the run, as `resolve` gives it.
        training: whether training images will be read; False to evaluate alone.

    Raises:
        ValueError: a configuration that does not fit the images, or that still counts in epochs.
        ImportError: a library that is asked for and not installed.
    """

    unit = "images"

    def __init__(self, config: ImagesConfig, training: bool = True) -> None:
        data, self.config, self.batch = config.data, config, config.data.batch
        if config.epochs or config.warmup_epochs:
            raise ValueError(
                "config must count in steps: kvbind.tasks.images.resolve(config) writes out what its epochs come to"
            )
        if data.looks:
            raise ValueError(
                "config.data must say size, channels, mean, std and batch: kvbind.tasks.images.resolve(config) looks at the "
                "images for them"
            )
        inner_loops(config.model)  # inner loops that are none are better known before any image is read
        self.start = Start.of(config.start, training)
        splits = data.open()
        self.names, self._contents = splits.names, splits.contents
        counted = len(splits.train.labels)
        if data.images not in (0, counted):
            raise ValueError(f"data.images must be 0 or the number of training images, {counted}; got {data.images}")
        self.splits = {"train": splits.train, "held_out": splits.held_out} if training else {"held_out": splits.held_out}
        self.sources = {split: self._source(split, images) for split, images in self.splits.items()}
        self.augment = Augment(config.augment, data.mean, data.std, len(self.names))
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def _source(self, split: str, images: Images) -> InMemory | Reads:
        """What batches of a split are made of: images that have the task's size, or that are given it as they are read."""
        data, augment = self.config.data, self.config.augment
        if not isinstance(images, InMemory):
            if split == "train":
                self._tell_shrunk(images)
            prepare = ReadTraining(augment, data.size) if split == "train" else ReadEvaluation(data.size, data.kept)
            return Reads(images, prepare, data.channels, self.config.seed)
        shape = tuple(images.images.shape[1:])
        if shape != (data.channels, data.size, data.size):
            raise ValueError(
                f"data.channels and data.size must be those of the images of {data.source}, which are {list(shape)}; got "
                f"{data.channels} and {data.size}"
            )
        check_fits_memory(augment)
        return images

    def _tell_shrunk(self, images: Readable) -> None:
        """Warn where photos become thumbnails."""
        data = self.config.data
        if data.size <= SMALL_SIZE and min(width_height := images.read(0).size) >= SHRUNK * data.size:
            log.warning(
                "the first image of %s, %d x %d, is shrunk to %d x %d %s; --preset photos, or data.size, would keep more",
                data.source, *width_height, data.size, data.size, "grey" if data.channels == 1 else "colour",
            )  # fmt: skip

    def build(self) -> VitttForImageClassification:
        """A model with fresh weights, drawn from the run's seed, or with those of the model that the run starts from."""
        model = build_model(self.config, self.names)
        return model if self.start is None else self.start.into(model)

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless training batches, each with the position behind it."""
        if "train" not in self.sources:
            raise ValueError("this task was opened with training=False")
        data, images = self.config.data, self.sources["train"]
        order = Order(len(self.splits["train"].labels), data.batch, self.config.seed)
        return training_batches(images, order, data.workers, position, share, self.augment.mixes)

    def size(self, batch: Batch) -> int:
        """Images in a batch."""
        lead = batch["among"].lead if "among" in batch else 0
        return len(batch["rows"] if "rows" in batch else batch["labels"]) - lead

    def weight(self, batch: Batch) -> float:
        """All batches count alike: they are of one size."""
        return 1.0

    @staticmethod
    def blocks(model: VitttForImageClassification) -> Iterable[nn.Module]:
        """The model's layers."""
        from kvbind.models.vittt.blocks import VitttBlock

        return [module for module in model.modules() if isinstance(module, VitttBlock)]

    def pixels(self, batch: Batch, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images of a batch, uint8 `[B, C, H, W]`, and their classes `[B]`, on `device`.

        Those that are held in memory move there whole when they are first asked for.
        """
        if "rows" not in batch:
            return batch["images"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)
        if (split, device) not in self._resident:
            held = self.splits[split]
            self._resident[split, device] = held.images.to(device), held.classes.to(device)  # type: ignore[union-attr]
        images, classes = self._resident[split, device]
        chosen = batch["rows"].to(device, non_blocking=True)
        return images[chosen], classes[chosen]

    def flops(self, model: VitttForImageClassification) -> float:
        """Model FLOPs of training for each unit."""
        from kvbind.tasks.flops import flops_per_unit

        return flops_per_unit(model.config, self.config.data)

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """A batch with all that is random about it drawn: `x` and `targets`, as `Augment` gives them, on `device`."""
        images, labels = self.pixels(batch, "train", device)
        x, targets = self.augment(images, labels, batch["seed"], batch.get("among"))
        return {"x": x, "targets": targets}

    def loss(self, model: VitttForImageClassification, batch: Batch) -> Tensor:
        """Mean cross-entropy against the augmented targets, in nats; of a batch as it comes, or prepared.

        Where the targets are the outputs of the model that the run starts from, the divergence from those.
        """
        ready = batch if "targets" in batch else self.prepare(batch, model.device)
        if self.start is not None and self.start.distils:
            return divergence(model(ready["x"]).logits, self.start.outputs(ready["x"], device=ready["x"].device).logits)
        loss: Tensor = model(ready["x"], labels=ready["targets"]).loss
        return loss

    def evaluate(self, model: VitttForImageClassification, share: Share = WHOLE) -> dict[str, Any]:
        """Top-1 and, of more than five classes, top-5 accuracy in percent, cross-entropy in nats, and the number of images.

        All of them are held out.
        """
        data, device = self.config.data, model.device
        most = min(TOP, len(self.names))
        total = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        size = data.evaluation_batch or data.batch
        for batch, counts in evaluation_batches(self.sources["held_out"], size, data.workers, share):
            images, labels = self.pixels(batch, "held_out", device)
            logits = model(normalized(images, data.mean, data.std)).logits.float()
            hits = logits.topk(most).indices == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="sum")
            if counts:
                total[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), losses]).to(total)
                total[3] += len(labels)
        *sums, count = share.sum(total).tolist()
        top1, top5, loss = (x / count for x in sums)
        few = len(self.names) <= TOP  # the five likeliest are all
        return {"top1": 100 * top1, **({} if few else {"top5": 100 * top5}), "loss": loss, "images": round(count)}

    def held_out_image(self, number: int) -> tuple[Tensor, int]:
        """A held-out image as the model sees it but for normalization, uint8 `[C, H, W]`, and its class.

        Raises:
            ValueError: a number that is none of theirs.
        """
        images = self.sources["held_out"]
        count = len(self.splits["held_out"].labels)
        if not 0 <= number < count:
            raise ValueError(f"image must be from 0 to {count - 1}, the held-out images; got {number}")
        if isinstance(images, InMemory):
            return images.images[number], int(images.classes[number])
        return images[0, number]

    def save(self, model: VitttForImageClassification, folder: Path) -> None:
        """Write a model in transformers' format, with the processor that makes its input of pictures."""
        from kvbind.models.vittt import VitttImageProcessor

        data = self.config.data
        with without_bars():
            model.save_pretrained(folder)
        VitttImageProcessor(data.size, data.channels, data.mean, data.std, data.kept).save_pretrained(folder)

    def contents(self) -> Contents:
        """What the images are read from, for noticing that it has changed."""
        return self._contents

    def fingerprint(self) -> dict[str, str]:
        """What images these are, for telling runs apart."""
        return {split: images.fingerprint() for split, images in self.splits.items()}
