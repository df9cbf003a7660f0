"""`kvbind bench views`: reading and rendering scenes of many views, beside the same transformer with full attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvbind.bench.harness.timing import median_seconds, peak_bytes
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig, mean_frame
from kvbind.models.lact_nvs.model import Images
from kvbind.tasks.views.procedural import Cameras, make_cameras


class FullAttentionNvs(LactNvs):
    """LaCT view synthesis with softmax attention over all input tokens in place of the fast weights.

    Widths, layers and everything around them are the same. What it keeps of a scene are every layer's keys and values, which
    grow with the number of views.

    Args:
        config: the sizes; its inner loop is not used.
    """

    def __init__(self, config: LactNvsConfig) -> None:
        super().__init__(config.replace(fast_weights=False))

    def forward(self, image: Images, c2w: Tensor, fxfycxcy: Tensor, target_c2w: Tensor, target_fxfycxcy: Tensor) -> Tensor:
        """Images of target cameras, which attend to all input views and nothing else; arguments as `LactNvs` takes them."""
        assert isinstance(image, Tensor)
        size = (image.shape[-2], image.shape[-1])
        return self.view(self.read(image, c2w, fxfycxcy), target_c2w, target_fxfycxcy, size)

    def read(self, image: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> list[Any]:
        """The keys and values of input views; arguments as `LactNvs.reconstruct` takes them."""
        size = (image.shape[-2], image.shape[-1])
        return list(self._run(self._tokens(c2w, fxfycxcy, size, image), size, None, None)[1])

    def view(self, scene: list[Any], c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int]) -> Tensor:
        """Images from other cameras; arguments as `LactNvs.render` takes them."""
        x, _ = self._run(self._tokens(c2w, fxfycxcy, size, None), size, slice(0, 0), scene)
        return self._pixels(x, size)


@dataclass(frozen=True)
class Viewing:
    """One model on scenes of one number of input views.

    Attributes:
        model: "LaCT" or "full attention".
        views: input views.
        tokens: that these views are made of.
        fits: whether the device's memory was enough; the rest is None where it was not.
        read_seconds: to read a scene.
        frames_per_second: rendered from it, several at a time.
        read_bytes: the most memory held at once while reading, beyond the parameters.
        render_bytes: the same while rendering, beyond the scene.
        scene_bytes: what is kept of a scene.
    """

    model: str
    views: int
    tokens: int
    fits: bool
    read_seconds: float | None = None
    frames_per_second: float | None = None
    read_bytes: int | None = None
    render_bytes: int | None = None
    scene_bytes: int | None = None


Read = Callable[..., Any]

LONG = 10
"""A first reading that takes this many times as long as asked for is not repeated."""


@torch.no_grad()
def bench_views(
    config: LactNvsConfig,
    views: Sequence[int],
    size: tuple[int, int],
    device: torch.device,
    *,
    frames: int = 8,
    seconds: float = 1.0,
) -> Iterator[Viewing]:
    """Time both models on random images, one scene at a time, under bfloat16 autocast on a GPU (float32 on a CPU).

    Rows come as they are measured.

    Args:
        config: of both models.
        views: numbers of input views, rising; a model for which one is too many is not tried on more.
        size: height and width of all images.
        device: where to run.
        frames: rendered in one pass.
        seconds: how long to time each; the first reading of a scene counts where it alone takes `LONG` times that.
    """
    torch.manual_seed(0)
    with torch.device(device):
        lact, full = LactNvs(config).eval(), FullAttentionNvs(config).eval()

    def render(scene: Any, c2w: Tensor, fxfycxcy: Tensor) -> Tensor:
        return lact.render(scene, c2w, fxfycxcy, size, views_at_once=frames)

    def view(scene: Any, c2w: Tensor, fxfycxcy: Tensor) -> Tensor:
        return full.view(scene, c2w, fxfycxcy, size)

    models: dict[str, tuple[Read, Read]] = {"LaCT": (lact.reconstruct, render), "full attention": (full.read, view)}
    too_many = set()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for count in views:
            poses, intrinsics = make_cameras("train", 1, count + frames, size, Cameras(sector=180))
            poses = mean_frame(poses[:, :count]).normalize(poses)
            cameras = [x.to(device) for x in (poses, intrinsics)]
            inputs = [x[:, :count] for x in cameras]
            image = torch.rand(1, count, 3, *size, device=device)
            targets = [x[:, count:] for x in cameras]
            tokens = count * size[0] * size[1] // config.patch_size**2
            for name, (read, draw) in models.items():
                row = Viewing(name, count, tokens, fits=False)
                if name not in too_many:
                    try:
                        row = _measure(row, partial(read, image, *inputs), draw, targets, device, seconds)
                    except torch.OutOfMemoryError:
                        too_many.add(name)
                yield row
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _measure(
    row: Viewing, read: Callable[[], Any], draw: Read, targets: list[Tensor], device: torch.device, seconds: float
) -> Viewing:
    kept: list[Any] = []
    began = time.perf_counter()
    read_bytes = peak_bytes(lambda: kept.append(read()), device)
    read_seconds = time.perf_counter() - began
    (scene,) = kept
    if not seconds or read_seconds < LONG * seconds:
        del scene, kept[:]
        (read_seconds,) = median_seconds([read], device, least=2, seconds=seconds)
        scene = read()
    render_bytes = peak_bytes(lambda: draw(scene, *targets), device)
    (render_seconds,) = median_seconds([lambda: draw(scene, *targets)], device, least=2, seconds=seconds)
    return replace(
        row,
        fits=True,
        read_seconds=read_seconds,
        frames_per_second=targets[0].shape[1] / render_seconds,
        read_bytes=read_bytes,
        render_bytes=render_bytes,
        scene_bytes=_scene_bytes(scene),
    )


def _scene_bytes(scene: Any) -> int:
    if isinstance(scene, list):
        held = [x for pair in scene for x in pair]
    else:
        held = [x for state in scene.states for x in state.tensors.values()]
    return sum(x.numel() * x.element_size() for x in held)
