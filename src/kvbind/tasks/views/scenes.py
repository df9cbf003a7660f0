"""Scenes of posed images: what every source offers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from kvbind.models.lact_nvs.cameras import check_intrinsics, check_poses
from kvbind.tasks.contents import Contents

Split = Literal["train", "held_out"]


class SceneViews(TypedDict):
    """Views of one scene.

    `image` is uint8 `[V, 3, h, w]`, or, of scenes that are held in memory, the places of the images there, int64 `[V]`.
    `c2w` are poses `[V, 4, 4]` from camera to world, `fxfycxcy` intrinsics `[V, 4]` in pixels of the images, both float32.
    """

    image: Tensor
    c2w: Tensor
    fxfycxcy: Tensor


class SceneSource(abc.ABC):
    """A numbered list of scenes, in chunks that are read together; each scene is a numbered list of views.

    Attributes:
        what: what to call the source in errors.
        chunks: how many scenes each chunk holds, in the order of their numbers.
    """

    what: str
    chunks: Sequence[int]

    def __len__(self) -> int:
        return sum(self.chunks)

    @abc.abstractmethod
    def name(self, scene: int) -> str:
        """What to call a scene."""

    @abc.abstractmethod
    def count(self, scene: int) -> int:
        """How many views a scene has."""

    @abc.abstractmethod
    def read(self, scene: int, views: Sequence[int]) -> SceneViews:
        """Some views of a scene.

        Raises:
            ValueError: cameras or images that do not fit; the message names the scene.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short text that differs where the scenes do."""

    @abc.abstractmethod
    def contents(self) -> Contents:
        """What the scenes are read from, for noticing that it has changed."""

    def prepared(self, device: torch.device) -> bool:
        """Whether there is nothing for `prepare` to do."""
        return True

    def prepare(self, device: torch.device, tell: Callable[[int], None] | None = None) -> None:  # noqa: B027
        """Do beforehand what `pixels` would have to do once.

        Args:
            device: where pixels will be asked for.
            tell: told of how many scenes are made, every so often.
        """

    def pixels(self, image: Tensor, device: torch.device) -> Tensor:
        """RGB in [0, 1] on `device`, float32 `[..., 3, h, w]`, of what `read` gave as `image`, stacked in any way."""
        return image.to(device, non_blocking=True).float() / 255


def check_cameras(scene: str, pose: str, poses: Tensor, fxfycxcy: Tensor) -> None:
    """Refuse what are no cameras.

    Args:
        scene: what to call the scene.
        pose: what to call the poses, "c2w" or "w2c".
        poses: `[V, 4, 4]`.
        fxfycxcy: `[V, 4]`.

    Raises:
        ValueError: matrices that are no rigid motions, or intrinsics that are not in pixels.
    """
    try:
        check_poses(pose, poses)
        check_intrinsics("fxfycxcy", fxfycxcy)
    except ValueError as error:
        raise ValueError(f"{scene}: {error}") from None
