"""The view synthesis task: posed images, LaCT view synthesis, squared error, PSNR of held-out views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.models.lact_nvs import LactNvs
from kvbind.tasks.contents import Contents
from kvbind.tasks.start import Start
from kvbind.tasks.views.config import ViewsConfig, model_config
from kvbind.tasks.views.drawing import Batch, Batches, evaluation_batches, load_batches
from kvbind.tasks.views.metrics import nearest_inputs, psnr, ssim
from kvbind.tasks.views.perceptual import open_lpips, perceptual_loss
from kvbind.tasks.views.sources import open_held_out, open_training
from kvbind.train.loop import pick_device
from kvbind.train.ranks import WHOLE, Share


class ViewsTask:
    """Data, model, loss and metrics of a view synthesis run; what `kvbind.train.train` asks of a task.

    Opening it opens both splits, so that a source that does not exist is known at once.

    Args:
        config: the run.
        training: whether scenes will be trained on; False to evaluate alone.

    Raises:
        ValueError, TypeError: a configuration that describes no model, sizes that its patches do not tile, or a source that
            does not exist or holds no scenes.
        ImportError: a perceptual loss that is asked for and not installed.
    """

    unit = "views"

    def __init__(self, config: ViewsConfig, training: bool = True) -> None:
        self.config, self.batch = config, config.data.batch
        patch, size = model_config(config.model).patch_size, config.data.size
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"data.size must be multiples of the model's patch_size, {patch}; got {list(size)}")
        self.start = Start.of(config.start, training)
        self.held_out = open_held_out(config.data)
        self.scenes = open_training(config.data) if training else None
        self._perceptual: nn.Module | None = open_lpips() if training and config.loss.perceptual else None
        self._evaluation: list[Batch] = []

    def build(self) -> LactNvs:
        """A model with fresh weights, drawn from the run's seed, or with those of the model that the run starts from."""
        torch.manual_seed(self.config.seed)
        model = LactNvs(model_config(self.config.model))
        return model if self.start is None else self.start.into(model)

    def make_ready(self, device: torch.device, tell: Callable[[str], None]) -> None:
        """Render the scenes that have to be, of both splits; `tell` is told how many of them there are."""
        pools = [pool for pool in (self.scenes, self.held_out) if pool is not None and not pool.prepared(device)]
        if not pools:
            return
        total = sum(map(len, pools))
        tell(f"rendering {total:,} scenes")
        before = 0

        def count(done: int) -> None:
            tell(f"rendering {total:,} scenes, {before + done:,} done")

        for pool in pools:
            pool.prepare(device, count)
            before += len(pool)
        tell(f"{total:,} scenes are rendered")

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless training batches, each with the position behind it."""
        if self.scenes is None:
            raise ValueError("this task was opened with training=False")
        data = self.config.data
        self.scenes.prepare(pick_device(self.config.train.device))  # here it counts for no step
        return load_batches(Batches(self.scenes, data, self.config.seed, share), data.workers, position)

    def size(self, batch: Batch) -> int:
        """Views in a batch, those that are read and those that are rendered."""
        return batch["c2w"].shape[0] * (batch["c2w"].shape[1] + batch["target_c2w"].shape[1])

    def weight(self, batch: Batch) -> float:
        """All batches count alike: they are of one size."""
        return 1.0

    @staticmethod
    def blocks(model: LactNvs) -> Iterable[nn.Module]:
        """The model's layers."""
        return model.blocks

    def flops(self, model: LactNvs) -> float:
        """Model FLOPs of training for each unit."""
        from kvbind.tasks.flops import flops_per_unit

        return flops_per_unit(model.config, self.config.data)

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """A batch with its pictures as RGB in [0, 1], float32, on `device`, and `perceptual` in place of its number."""
        if self.scenes is None:
            raise ValueError("this task was opened with training=False")
        ready = {name: x for name, x in batch.items() if name != "number"}
        for name in ("image", "target_image"):
            ready[name] = self.scenes.pixels(batch[name], device)
        step = batch["number"] // self.config.train.accumulate
        return ready | {"perceptual": self._perceptual is not None and step >= self.config.loss.perceptual_from}

    def loss(self, model: LactNvs, batch: Batch) -> Tensor:
        """Mean squared error of the targets, with the perceptual loss where the configuration has it.

        Of a batch as it comes, or prepared. Where the run's targets are the outputs of the model that it starts from, the
        targets are as that model renders them.
        """
        device = batch["c2w"].device
        ready = batch if "perceptual" in batch else self.prepare(batch, device)
        true, predicted = ready["target_image"], predict(model, ready["image"], ready)
        if self.start is not None and self.start.distils:
            true = predict(partial(self.start.outputs, device=device), ready["image"], ready)
        loss = F.mse_loss(predicted, true)
        if self._perceptual is not None and ready["perceptual"]:
            network = self._perceptual.to(device)
            extra = perceptual_loss(network, predicted.flatten(0, 1), true.flatten(0, 1))
            loss = loss + self.config.loss.perceptual * extra
        return loss

    def evaluate(self, model: LactNvs, share: Share = WHOLE) -> dict[str, Any]:
        """Held-out metrics, averaged over target views.

        "psnr" in dB, "ssim", "mse"; "nearest_view_psnr", that of the nearest input view taken as it is; and the numbers of
        targets and scenes.
        """
        device = next(model.parameters()).device
        if not self._evaluation:
            self._evaluation = list(evaluation_batches(self.held_out, self.config.data))
        names = ("psnr", "ssim", "mse", "nearest_view_psnr")
        sums = torch.zeros(len(names) + 2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        for cpu_batch, counts in share.of_items(self._evaluation):
            batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in cpu_batch.items()}
            inputs, true = (self.held_out.pixels(batch[name], device) for name in ("image", "target_image"))
            nearest = torch.stack([views[chosen] for views, chosen in zip(inputs, nearest_inputs(batch), strict=True)])
            true, predicted, nearest = (x.flatten(0, 1) for x in (true, predict(model, inputs, batch), nearest))
            with torch.autocast(device.type, enabled=False):
                errors = (predicted - true).square().flatten(1).mean(1)
                found = [psnr(predicted, true), ssim(predicted, true), errors, psnr(nearest, true)]
            if counts:
                sums[:-2] += torch.stack([x.sum() for x in found]).to(sums)
                sums[-2:] += torch.tensor([len(true), len(inputs)]).to(sums)
        *totals, targets, scenes = share.sum(sums).tolist()
        means = {name: total / targets for name, total in zip(names, totals, strict=True)}
        return means | {"views": round(targets), "scenes": round(scenes)}

    def save(self, model: LactNvs, folder: Path) -> None:
        """Write a model as `LactNvs.from_pretrained` reads it."""
        model.save_pretrained(folder)

    def contents(self) -> Contents:
        """What the scenes are read from, for noticing that it has changed."""
        found = self.held_out.contents()
        return found if self.scenes is None else self.scenes.contents() | found

    def fingerprint(self) -> dict[str, str]:
        """What scenes these are, for telling runs apart."""
        found = {"held_out": self.held_out.fingerprint()}
        if self.scenes is not None:
            found["train"] = self.scenes.fingerprint()
        return found


def predict(model: Callable[..., Tensor], image: Tensor, batch: Batch) -> Tensor:
    """The targets of a batch as a model renders them, float32 `[B, Vt, 3, h, w]`.

    Args:
        model: any, or what takes its arguments.
        image: the inputs, RGB in [0, 1], `[B, V, 3, h, w]`.
        batch: with the cameras of inputs and targets.
    """
    rendered: Tensor = model(image, batch["c2w"], batch["fxfycxcy"], batch["target_c2w"], batch["target_fxfycxcy"])
    return rendered.float()
