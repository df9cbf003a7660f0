"""Scenes made by chance: boxes, ellipsoids and meshes on a patterned ground under a sun, and cameras around them.

A scene is decided by its split, its number and nothing else, and is the same on every machine; scenes of different splits
are drawn from different random streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbind.tasks.views.meshes import MESHES
from kvbind.tasks.views.orbit import look_at
from kvbind.tasks.views.raycast import GAMMA, PATTERNS, World
from kvbind.tasks.views.scenes import Split

Array = NDArray[np.floating]

VERSION = 1
"""Raised whenever a scene of some number comes to look different."""

BLOCK = 64
SPHERES, BOXES, MESH_SLOTS = 2, 2, 2
OBJECTS = SPHERES + BOXES + MESH_SLOTS
SPACING = 1.15


@dataclass(frozen=True)
class Cameras:
    """Where cameras stand: around the middle of the scene, looking at it, upright.

    Attributes:
        sector: degrees of azimuth that a scene's cameras are spread over, around a direction drawn for each scene; 360 for
            all around.
        radius: their distance from the middle, between these.
        elevation: degrees above the horizon, between these.
        view: the horizontal field of view in degrees.
    """

    sector: float = 360.0
    radius: tuple[float, float] = (3.9, 4.9)
    elevation: tuple[float, float] = (14.0, 50.0)
    view: float = 48.0


def make_scenes(split: Split, count: int) -> World:
    """The first `count` scenes of a split, on the CPU."""
    blocks = [_block(split, i) for i in range(-(-count // BLOCK))]
    return World(**{name: torch.cat([block[name] for block in blocks])[:count] for name in blocks[0]})


def make_cameras(split: Split, scenes: int, views: int, size: tuple[int, int], cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Cameras of the first scenes of a split.

    Returns:
        Poses `[scenes, views, 4, 4]`, camera to world, and intrinsics `[scenes, views, 4]` in pixels, float32.
    """
    poses = []
    for scene in range(scenes):
        rng = _stream(split, 1, scene)
        middle = rng.uniform(0, 360)
        azimuth, elevation = np.radians(
            [middle + cameras.sector * rng.uniform(-0.5, 0.5, views), rng.uniform(*cameras.elevation, views)]
        )
        outwards = np.stack(
            (np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)), axis=1
        )
        target = rng.normal(0, 0.12, (views, 3)) + np.array([0, 0, 0.35])
        centre = target + rng.uniform(*cameras.radius, (views, 1)) * outwards
        poses.append(look_at(torch.from_numpy(centre), torch.from_numpy(target), torch.tensor([0.0, 0, 1]).double()))
    focal = 0.5 * size[1] / math.tan(math.radians(cameras.view) / 2)
    intrinsics = torch.tensor([focal, focal, size[1] / 2, size[0] / 2]).expand(scenes, views, 4)
    return torch.stack(poses).float(), intrinsics.contiguous()


def _stream(split: Split, what: int, number: int) -> np.random.Generator:
    return np.random.default_rng((VERSION, ("train", "held_out").index(split), what, number))


@cache
def _mesh_arrays() -> tuple[Array, Array, NDArray[np.int64]]:
    """Corners and normals `[kinds, T, 3, 3]` of all meshes, padded to the largest, and how many triangles each has."""
    meshes = [make() for make in MESHES.values()]
    counts = np.array([len(mesh.corners) for mesh in meshes])
    corners, normals = (np.zeros((len(meshes), counts.max(), 3, 3)) for _ in range(2))
    for i, mesh in enumerate(meshes):
        corners[i, : counts[i]], normals[i, : counts[i]] = mesh.corners, mesh.normals
    return corners, normals, counts


def _block(split: Split, number: int) -> dict[str, Tensor]:
    """`BLOCK` scenes, drawn together, as `World` holds them."""
    rng = _stream(split, 0, number)
    n = BLOCK
    # objects stand in different cells of a grid, so that they do not run through one another
    cells = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(9, 2) * SPACING
    order = np.argsort(rng.random((n, 9)), axis=1)[:, :OBJECTS]
    place = cells[order] + rng.uniform(-0.2, 0.2, (n, OBJECTS, 2))
    present = rng.random((n, OBJECTS)) < 0.75
    present[np.arange(n), rng.integers(0, OBJECTS, n)] = True
    yaw = rng.uniform(0, 2 * np.pi, (n, OBJECTS))
    width = rng.uniform(0.3, 0.55, (n, OBJECTS))
    other, height = width * rng.uniform(0.7, 1.0, (n, OBJECTS)), width * rng.uniform(0.6, 1.7, (n, OBJECTS))

    turn = np.zeros((n, OBJECTS, 3, 3))
    turn[..., 0, 0], turn[..., 0, 1] = np.cos(yaw), -np.sin(yaw)
    turn[..., 1, 0], turn[..., 1, 1] = np.sin(yaw), np.cos(yaw)
    turn[..., 2, 2] = 1
    scale = np.stack((width, other, height), axis=-1)
    centre = np.concatenate((place, np.zeros((n, OBJECTS, 1))), axis=-1)
    solid = SPHERES + BOXES
    centre[:, :solid, 2] = height[:, :solid]
    inverse = _inverse(turn * scale[..., None, :], centre) * present[..., None, None]

    world: dict[str, NDArray[np.generic]] = {"spheres": inverse[:, :SPHERES], "boxes": inverse[:, SPHERES:solid]}
    kinds = rng.integers(0, len(MESHES), (n, MESH_SLOTS))
    world |= _placed_meshes(kinds, turn[:, solid:], scale[:, solid:] * 0.95, centre[:, solid:], present[:, solid:])

    frames = np.zeros((n, OBJECTS + 1, 3, 4))
    frames[:, :OBJECTS] = _inverse(turn, centre)
    frames[:, OBJECTS, :3, :3] = np.eye(3)
    frames[..., 3] += rng.uniform(0, 1, (n, OBJECTS + 1, 3))
    direction = rng.normal(size=(n, OBJECTS + 1, 3))
    direction[:, OBJECTS, 2] = 0
    frequency = rng.uniform(1.6, 3.2, (n, OBJECTS + 1, 1))
    frequency[:, OBJECTS] = rng.uniform(0.6, 1.3, (n, 1))
    pattern = rng.integers(0, len(PATTERNS), (n, OBJECTS + 1))
    pattern[:, OBJECTS] = rng.integers(1, len(PATTERNS), n)
    hue, other_hue = rng.random((2, n, OBJECTS + 1))
    colours = np.stack(
        (
            _colour(hue, rng.uniform(0.45, 0.9, hue.shape), rng.uniform(0.55, 0.95, hue.shape)),
            _colour(other_hue, rng.uniform(0.2, 0.85, hue.shape), rng.uniform(0.35, 1.0, hue.shape)),
        ),
        axis=2,
    )
    muted = _colour(hue[:, OBJECTS], np.full(n, 0.25), rng.uniform(0.6, 0.85, n))
    colours[:, OBJECTS] = np.stack((muted, muted * rng.uniform(0.35, 0.7, (n, 1))), axis=1)

    azimuth, altitude = rng.uniform(0, 2 * np.pi, n), np.radians(rng.uniform(35, 65, n))
    sky_hue = rng.uniform(0.52, 0.64, n)
    horizon = _colour(sky_hue, rng.uniform(0.05, 0.2, n), np.full(n, 0.93))
    world |= {
        "frames": frames,
        "colours": colours,
        "pattern": pattern,
        "waves": direction / np.linalg.norm(direction, axis=-1, keepdims=True) * frequency,
        "gloss": rng.uniform(0, 0.5, (n, OBJECTS + 1)) * (np.arange(OBJECTS + 1) < OBJECTS),
        "sun": np.stack((np.cos(altitude) * np.cos(azimuth), np.cos(altitude) * np.sin(azimuth), np.sin(altitude)), axis=-1),
        "sky": np.stack((horizon, _colour(sky_hue, np.full(n, 0.55), rng.uniform(0.7, 0.9, n))), axis=1),
    }
    return {name: torch.from_numpy(x).to(torch.int64 if name == "pattern" else torch.float32) for name, x in world.items()}


def _inverse(linear: Array, offset: Array) -> Array:
    """The inverse `[..., 3, 4]` of the maps x -> linear x + offset."""
    back = np.linalg.inv(linear)
    return np.concatenate((back, -back @ offset[..., None]), axis=-1)


def _placed_meshes(
    kinds: NDArray[np.int64], turn: Array, scale: Array, centre: Array, present: NDArray[np.bool_]
) -> dict[str, NDArray[np.generic]]:
    """Triangles, normals and bounding spheres of meshes `[n, M]` that are scaled, turned and moved."""
    corners, normals, counts = _mesh_arrays()
    size, slots = corners.shape[1], kinds.shape
    linear = turn * scale[..., None, :]
    placed = corners[kinds] @ linear[:, :, None].swapaxes(-1, -2) + centre[:, :, None, None]
    facing = normals[kinds] @ np.linalg.inv(linear)[:, :, None]
    length = np.linalg.norm(facing, axis=-1, keepdims=True)
    facing = facing / np.where(length > 0, length, 1)

    there = (np.arange(size) < counts[kinds][..., None]) & present[..., None]
    a, b, c = placed[..., 0, :], placed[..., 1, :], placed[..., 2, :]
    frame = np.stack((b - a, c - a, np.cross(b - a, c - a)), axis=-1)
    frame[~there] = np.eye(3)
    maps = _inverse(frame, a)
    maps[~there] = 0
    maps[~there, 2, 3] = 1  # above a plane that no ray descends to

    middle = np.where(there[..., None, None], placed, 0).sum((2, 3)) / np.maximum(3 * there.sum(2), 1)[..., None]
    reach = np.linalg.norm(placed - middle[:, :, None, None], axis=-1).max(-1)
    radius = np.where(there, reach, 0).max(-1)
    return {
        "triangles": maps.reshape(*slots, size, 3, 4),
        "normals": facing,
        "bounds": np.concatenate((middle, 1.001 * radius[..., None]), axis=-1),
    }


def _colour(hue: Array, saturation: Array, value: Array) -> Array:
    """HSV to linear RGB `[..., 3]`."""
    offsets = np.array([5.0, 3.0, 1.0])
    sector = (offsets + 6 * hue[..., None]) % 6
    shown = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1))
    return shown**GAMMA
