"""The source "procedural": scenes made by chance, rendered once and held in memory.

A process that trains several models on the same scenes, as the rows of a table are, renders them for the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import digest
from kvbind.tasks.views.config import PROCEDURAL, ProceduralConfig
from kvbind.tasks.views.procedural import VERSION, Cameras, make_cameras, make_scenes
from kvbind.tasks.views.raycast import render
from kvbind.tasks.views.scenes import SceneSource, SceneViews, Split

MOST_KEPT = 2 << 30
"""Bytes of pictures of one split beyond which they are gone with the pool that has rendered them."""

_kept: dict[Split, tuple[tuple[str, torch.device], Tensor]] = {}
"""By split, the pictures that were rendered last: what they depend on, and themselves."""


class ScenePool(SceneSource):
    """Procedural scenes, rendered on the device that first asks for their pixels, unless an equal pool has done so.

    Args:
        config: their views and cameras.
        split: "train" or "held_out", which have scenes of their own.
        scenes: how many.
        size: height and width of the images.
    """

    def __init__(self, config: ProceduralConfig, split: Split, scenes: int, size: tuple[int, int]) -> None:
        self.config, self.split, self.image_size = config, split, size
        self.what, self.chunks = PROCEDURAL, (scenes,)
        self._images: Tensor | None = None

    @cached_property
    def cameras(self) -> tuple[Tensor, Tensor]:
        """Poses `[scenes, views, 4, 4]` and intrinsics `[scenes, views, 4]`."""
        return make_cameras(self.split, len(self), self.config.views, self.image_size, Cameras(sector=self.config.sector))

    def name(self, scene: int) -> str:
        return f"scene {scene} of {self.what}, split {self.split}"

    def count(self, scene: int) -> int:
        return self.config.views

    def read(self, scene: int, views: Sequence[int]) -> SceneViews:
        c2w, intrinsics = (x[scene, list(views)] for x in self.cameras)
        return {"image": torch.tensor(views) + scene * self.config.views, "c2w": c2w, "fxfycxcy": intrinsics}

    def prepared(self, device: torch.device) -> bool:
        return self._known(device) is not None

    def prepare(self, device: torch.device, tell: Callable[[int], None] | None = None) -> None:
        self._rendered(device, tell)

    def pixels(self, image: Tensor, device: torch.device) -> Tensor:
        return self._rendered(device)[image.to(device)].float() / 255

    def _known(self, device: torch.device) -> Tensor | None:
        """The pictures, of this pool or an equal one, where a device has them."""
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one device to a tensor alone
        if self._images is None or self._images.device != device:
            of, images = _kept.get(self.split, (None, None))
            if of != (self.fingerprint(), device):
                return None
            self._images = images
        return self._images

    def _rendered(self, device: torch.device, tell: Callable[[int], None] | None = None) -> Tensor:
        known = self._known(device)
        if known is not None:
            return known
        _kept.pop(self.split, None)  # room for these
        world = make_scenes(self.split, len(self)).to(device)
        images = render(world, *self.cameras, self.image_size, self.config.samples, tell).flatten(0, 1)
        if images.nbytes <= MOST_KEPT:
            _kept[self.split] = (self.fingerprint(), images.device), images
        self._images = images
        return images

    def __getstate__(self) -> dict[str, Any]:
        # processes that read need no pictures, least of all those on a GPU
        return vars(self) | {"_images": None}

    def fingerprint(self) -> str:
        return digest([PROCEDURAL, str(VERSION), self.split, str(len(self)), str(self.config), str(self.image_size)])

    def contents(self) -> Contents:
        return Contents(others={f"{PROCEDURAL}, {self.split}": self.fingerprint()})
