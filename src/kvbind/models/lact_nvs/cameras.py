"""Pinhole cameras: rays, projection, checks, and the frame in which a scene is normalized.

Conventions (OpenCV):

    camera axes                 pixels of an image, width w, height h

         z (forward)              (0, 0) +---------------> u      pixel (row i, column j) covers
        /                                |                        u in [j, j + 1], v in [i, i + 1];
       +-----> x (right)                 |   . (cx, cy)           its ray goes through its centre,
       |                                 |                        (j + 1/2, i + 1/2)
       v                                 v
       y (down)                          v                (w, h)

- A pose is a matrix `[4, 4]`. `c2w` takes points from camera to world coordinates: its last column is the camera's
  centre, its first three columns are the camera's axes in the world. `w2c` is its inverse (`invert_pose`).
- Intrinsics are `fx, fy, cx, cy` in pixels of the image at hand: the point `(x, y, z)` in camera coordinates is seen at
  `u = fx x / z + cx`, `v = fy y / z + cy`. Resizing an image by s multiplies all four by s; cropping subtracts the corner
  from `cx, cy`.
- Images are `[3, h, w]`, RGB in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIGID_TOLERANCE = 1e-3
"""How far a rotation may be from orthonormal, per entry: room for poses written with few digits."""

NORMALIZED_FOCAL = 10.0
"""Focal lengths below this, with a principal point inside the first pixel, are fractions of the image's size."""

DEGENERATE = 1e-4


def rays(c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The ray through the centre of every pixel, in world coordinates.

    Args:
        c2w: poses `[..., 4, 4]`.
        fxfycxcy: intrinsics `[..., 4]` in pixels.
        size: height and width of the image in pixels.

    Returns:
        Origins and unit directions, each `[..., 3, h, w]`, in float32 (float64 where an input is).
    """
    dtype = torch.promote_types(torch.promote_types(c2w.dtype, fxfycxcy.dtype), torch.float32)
    c2w, fxfycxcy = c2w.to(dtype), fxfycxcy.to(dtype)
    height, width = size
    fx, fy, cx, cy = (part[..., None] for part in fxfycxcy.unbind(-1))
    x = (torch.arange(width, dtype=dtype, device=c2w.device) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=dtype, device=c2w.device) + 0.5 - cy) / fy
    right, down, forward = (axis[..., None, None] for axis in c2w[..., :3, :3].unbind(-1))
    turned = x[..., None, None, :] * right + y[..., None, :, None] * down + forward
    directions = turned / torch.linalg.vector_norm(turned, dim=-3, keepdim=True)
    origins = c2w[..., :3, 3, None, None].expand_as(directions)
    return origins, directions


def ray_maps(c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int]) -> Tensor:
    """What a model is told of each pixel's ray: origin, direction, and their cross product (the ray's moment).

    Args:
        c2w: poses `[..., 4, 4]`.
        fxfycxcy: intrinsics `[..., 4]` in pixels.
        size: height and width of the image in pixels.

    Returns:
        `[..., 9, h, w]`, float32 or wider.
    """
    origins, directions = rays(c2w, fxfycxcy, size)
    return torch.cat((origins, directions, _cross(origins, directions, dim=-3)), dim=-3)


def _cross(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """The cross product along an axis of three, by its parts.

    Compiled, `torch.linalg.cross` looks its parts up by computed indices. With PyTorch 2.11 and Triton 3.6 such a kernel
    gave wrong rays where the compiler had chosen blocks of 512 and 8 warps, which was so in half of all compilations.
    """
    (a1, a2, a3), (b1, b2, b3) = a.unbind(dim), b.unbind(dim)
    return torch.stack((a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1), dim)


def project(points: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> tuple[Tensor, Tensor]:
    """Where cameras see points.

    Args:
        points: world coordinates `[..., N, 3]`.
        c2w: poses `[..., 4, 4]`.
        fxfycxcy: intrinsics `[..., 4]` in pixels.

    Returns:
        Pixel coordinates `(u, v)` `[..., N, 2]`, and depths `[..., N]` along the camera's z axis: a point is in front of the
        camera where its depth is above 0.
    """
    relative = points - c2w[..., None, :3, 3]
    x, y, depth = _product(relative, c2w[..., :3, :3]).unbind(-1)
    fx, fy, cx, cy = (part[..., None] for part in fxfycxcy.unbind(-1))
    return torch.stack((fx * x / depth + cx, fy * y / depth + cy), dim=-1), depth


def invert_pose(pose: Tensor) -> Tensor:
    """`c2w` from `w2c`, or back: the inverse of rigid motions `[..., 4, 4]`."""
    turn = pose[..., :3, :3].mT
    inverse = torch.zeros_like(pose)
    inverse[..., :3, :3] = turn
    inverse[..., :3, 3] = -_product(turn, pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


@dataclass(frozen=True, eq=False)
class SceneFrame:
    """A coordinate frame for a scene: world coordinates `x` become `(R^T (x - centre)) / scale`.

    Attributes:
        pose: the frame's axes R and centre, a rigid motion from frame to world coordinates `[..., 4, 4]`.
        scale: the length in the world that becomes 1, `[...]`.
    """

    pose: Tensor
    scale: Tensor

    def normalize(self, c2w: Tensor) -> Tensor:
        """Poses `[..., V, 4, 4]` in world coordinates, as poses in this frame."""
        inside = _product(invert_pose(self.pose).unsqueeze(-3), c2w)
        return _with_centres(inside, inside[..., :3, 3] / self.scale[..., None, None])

    def restore(self, c2w: Tensor) -> Tensor:
        """Poses `[..., V, 4, 4]` in this frame, as poses in world coordinates."""
        scaled = _with_centres(c2w, c2w[..., :3, 3] * self.scale[..., None, None])
        return _product(self.pose.unsqueeze(-3), scaled)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of small matrices, in their own dtype: autocast and TF32 leave a camera three digits."""
    return (a[..., None] * b[..., None, :, :]).sum(-2)


def _with_centres(pose: Tensor, centres: Tensor) -> Tensor:
    moved = pose.clone()
    moved[..., :3, 3] = centres
    return moved


def mean_frame(c2w: Tensor) -> SceneFrame:
    """The frame of the mean camera of a scene, scaled so that no camera's coordinate exceeds 1.

    Its centre is the cameras' mean centre, its z axis their mean z axis, its y axis the nearest to their mean y axis at
    a right angle to it; its scale the largest coordinate of a camera in that frame (1 where all cameras sit in one place).
    This is how the scenes of the released models are normalized (arXiv 2505.23884).

    Cameras all around an object have no mean camera: their mean z axis vanishes or is parallel to their mean y axis. There,
    and only there, the axes are those of the first camera. A pose like those of the other cameras is what a model has been
    trained to expect; the world's own axes, or those of the rounding errors that such means come down to, are not.

    Args:
        c2w: poses of the scene's cameras `[..., V, 4, 4]`.

    Returns:
        The frame, to apply to these and to all further cameras of the scene.

    Raises:
        TypeError, ValueError: matrices that are no rigid motions, or none at all.
    """
    check_poses("c2w", c2w)
    if not c2w.shape[-3]:
        raise ValueError(f"c2w must hold at least one camera; got shape {list(c2w.shape)}")
    centre, forward, down = (c2w[..., :3, axis].mean(-2) for axis in (3, 2, 1))
    forward, flat = _unit(forward)
    right, parallel = _unit(_cross(down, forward, dim=-1))
    turn = torch.stack((right, _cross(forward, right, dim=-1), forward), dim=-1)
    turn = torch.where((flat | parallel)[..., None, None], c2w[..., 0, :3, :3], turn)
    axes = torch.cat((turn, centre[..., None]), dim=-1)
    bottom = torch.zeros_like(axes[..., :1, :])
    bottom[..., 3] = 1
    pose = torch.cat((axes, bottom), dim=-2)
    extent = _product(invert_pose(pose).unsqueeze(-3), c2w)[..., :3, 3].abs().amax((-2, -1))
    return SceneFrame(pose, torch.where(extent > 0, extent, torch.ones_like(extent)))


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    """A vector brought to length 1, and whether it is too short for that."""
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    short = length < DEGENERATE
    # where the result is not used, its gradient must still be finite
    return torch.where(short, 0.0, vector) / torch.where(short, 1.0, length), short[..., 0]


def normalize_cameras(c2w: Tensor) -> Tensor:
    """A scene's poses `[..., V, 4, 4]` in the frame of their mean camera, `mean_frame(c2w).normalize(c2w)`.

    Raises:
        TypeError, ValueError: as `mean_frame`.
    """
    return mean_frame(c2w).normalize(c2w)


def check_poses(argument: str, c2w: Tensor, values: bool = True) -> None:
    """Refuse matrices that are no rigid motions.

    Args:
        argument: the name by which messages call them.
        c2w: `[..., V, 4, 4]`.
        values: also look at the numbers.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, numbers that are not finite, a last row other than 0, 0, 0, 1, or a rotation that is not
            orthonormal and right-handed.
    """
    if not isinstance(c2w, Tensor) or not c2w.is_floating_point():
        raise TypeError(f"{argument} must be a floating-point tensor [B, V, 4, 4]; got {_what(c2w)}")
    if c2w.dim() < 3 or c2w.shape[-2:] != (4, 4):
        raise ValueError(f"{argument} must be [B, V, 4, 4]; got shape {list(c2w.shape)}")
    if not values:
        return
    pose = c2w.detach().to("cpu", torch.float64)
    turn = pose[..., :3, :3]
    bottom = (pose[..., 3, :] - pose.new_tensor([0.0, 0, 0, 1])).abs().amax(-1)
    skew = (turn.mT @ turn - torch.eye(3, dtype=pose.dtype)).abs().amax((-2, -1))
    for reason, bad in (
        ("is not finite", ~pose.isfinite().all(-1).all(-1)),
        ("must end in the row 0, 0, 0, 1", bottom > RIGID_TOLERANCE),
        ("must have a rotation in its first 3 rows and columns, which is scaled or skewed", skew > RIGID_TOLERANCE),
        (
            "must have a rotation, without mirroring, in its first 3 rows and columns; its determinant is -1",
            torch.det(turn) < 0,
        ),
    ):
        if bool(bad.any()):
            where = torch.nonzero(bad)[0].tolist()
            rows = [[round(x, 4) for x in row] for row in pose[tuple(where)].tolist()]
            raise ValueError(
                f"{argument} must hold rigid motions, a rotation and a shift each: {argument}{where} {reason}; got {rows}"
            )


def check_intrinsics(argument: str, fxfycxcy: Tensor, values: bool = True) -> None:
    """Refuse intrinsics that are not in pixels.

    Args:
        argument: the name by which messages call them.
        fxfycxcy: `[..., V, 4]`.
        values: also look at the numbers.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, numbers that are not finite, focal lengths that are not above 0, or what looks like
            fractions of the image's size: focal lengths below 10 and a principal point inside the first pixel.
    """
    if not isinstance(fxfycxcy, Tensor) or not fxfycxcy.is_floating_point():
        raise TypeError(f"{argument} must be a floating-point tensor [B, V, 4]; got {_what(fxfycxcy)}")
    if fxfycxcy.dim() < 2 or fxfycxcy.shape[-1] != 4:
        raise ValueError(f"{argument} must be [B, V, 4], fx, fy, cx, cy; got shape {list(fxfycxcy.shape)}")
    if not values:
        return
    numbers = fxfycxcy.detach().to("cpu", torch.float64)
    focal, centre = numbers[..., :2], numbers[..., 2:]
    fractions = (focal < NORMALIZED_FOCAL).all(-1) & (centre >= 0).all(-1) & (centre <= 1).all(-1)
    for reason, bad in (
        ("is not finite", ~numbers.isfinite().all(-1)),
        ("has a focal length that is not above 0", (focal <= 0).any(-1)),
        ("looks like fractions of the image's size; multiply fx, cx by its width and fy, cy by its height", fractions),
    ):
        if bool(bad.any()):
            where = torch.nonzero(bad)[0].tolist()
            got = [round(x, 4) for x in numbers[tuple(where)].tolist()]
            raise ValueError(f"{argument} must be fx, fy, cx, cy in pixels: {argument}{where} {reason}; got {got}")


def _what(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
