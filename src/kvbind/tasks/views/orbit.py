"""A camera path around a scene, found from the scene's own cameras."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvbind.models.lact_nvs.cameras import check_poses

PARALLEL = 1e-3
"""Below this spread of directions, optical axes are taken to be parallel."""


def middle(c2w: Tensor) -> Tensor:
    """The point nearest to the optical axes of cameras `[V, 4, 4]`, `[3]`.

    Axes that are all but parallel meet nowhere: then it is a point ahead, twice as far as the cameras are apart.
    """
    centres, forward = c2w[:, :3, 3], c2w[:, :3, 2]
    across = torch.eye(3, dtype=c2w.dtype) - forward[:, :, None] * forward[:, None]
    total = across.mean(0)
    if torch.linalg.eigvalsh(total)[0] < PARALLEL:
        apart = torch.cdist(centres, centres).max().clamp(min=1e-3)
        return centres.mean(0) + 2 * apart * forward.mean(0)
    return torch.linalg.solve(total, (across @ centres[..., None]).mean(0))[:, 0]


def upwards(c2w: Tensor) -> Tensor:
    """The direction, `[3]`, that is up for cameras `[V, 4, 4]` held upright: at right angles to their x axes."""
    right, up = c2w[:, :3, 0], -c2w[:, :3, 1].mean(0)
    up = up / up.norm().clamp(min=1e-6)
    # the mean of their own up axes decides where x axes leave a choice, and the sign
    spread = (right[:, :, None] * right[:, None]).mean(0) - 0.1 * up[:, None] * up
    found = torch.linalg.eigh(spread).eigenvectors[:, 0]
    return found if found @ up > 0 else -found


def orbit(c2w: Tensor, frames: int) -> Tensor:
    """A closed path at the cameras' mean height and distance, looking at what they look at.

    All around, where the cameras are; else to and fro through the directions in which they are.

    Args:
        c2w: the scene's cameras `[V, 4, 4]`.
        frames: how many.

    Returns:
        Poses `[frames, 4, 4]`, in the same coordinates.

    Raises:
        TypeError, ValueError: matrices that are no rigid motions.
    """
    check_poses("c2w", c2w)
    given, c2w = c2w.dtype, c2w.double()
    point, up = middle(c2w), upwards(c2w)
    offset = c2w[:, :3, 3] - point
    height = offset @ up
    flat = offset - height[:, None] * up
    ahead = flat.mean(0)
    if ahead.norm() < 1e-6:
        ahead = flat[0]
    ahead = ahead / ahead.norm().clamp(min=1e-9)
    side = torch.linalg.cross(up, ahead, dim=0)
    angle = torch.atan2(flat @ side, flat @ ahead)
    turn = torch.arange(frames, dtype=torch.float64) / frames
    gaps = torch.cat((angle, angle + 2 * math.pi)).sort().values.diff()
    if gaps.max() < math.pi / 2:
        path = 2 * math.pi * turn
    else:
        path = (angle.max() + angle.min()) / 2 + (angle.max() - angle.min()) / 2 * torch.sin(2 * math.pi * turn)
    around = torch.cos(path)[:, None] * ahead + torch.sin(path)[:, None] * side
    return look_at(point + height.mean() * up + flat.norm(dim=1).mean() * around, point, up).to(given)


def look_at(centre: Tensor, target: Tensor, up: Tensor) -> Tensor:
    """Upright poses `[..., 4, 4]`, camera to world with OpenCV's axes.

    Args:
        centre: of the cameras `[..., 3]`.
        target: what they look at `[..., 3]`.
        up: the world's direction that is up in the images `[3]`; no camera looks along it.
    """
    forward = torch.nn.functional.normalize(target - centre, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up.expand_as(forward), dim=-1), dim=-1)
    pose = torch.zeros(*centre.shape[:-1], 4, 4, dtype=centre.dtype)
    pose[..., :3, :] = torch.stack((right, torch.linalg.cross(forward, right, dim=-1), forward, centre), dim=-1)
    pose[..., 3, 3] = 1
    return pose
