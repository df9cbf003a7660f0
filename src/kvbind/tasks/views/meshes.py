"""Triangle meshes made from formulas, each about one unit in radius and standing on the plane z = 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Corners = NDArray[np.int64]


@dataclass(frozen=True)
class TriangleMesh:
    """Triangles.

    Attributes:
        corners: `[T, 3, 3]`, the three corners of each triangle.
        normals: `[T, 3, 3]`, the unit normal at each corner: that of the triangle where the surface has edges, that of the
            curved surface which the triangles stand for where it is smooth.
    """

    corners: Array
    normals: Array


def unit(x: Array) -> Array:
    """Vectors brought to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def flat(vertices: Array, faces: Corners) -> TriangleMesh:
    """A mesh with edges: each triangle has its own normal, pointing away from the middle of the mesh."""
    corners = vertices[faces]
    normal = unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    outwards = np.sign(np.sum(normal * (corners.mean(1) - vertices.mean(0)), axis=-1, keepdims=True))
    return TriangleMesh(corners, np.repeat((normal * outwards)[:, None], 3, axis=1))


def icosahedron() -> tuple[Array, Corners]:
    """The 12 vertices, at distance 1 from the origin, and 20 faces of an icosahedron."""
    golden = (1 + 5**0.5) / 2
    signs = [(a, b) for a in (-1, 1) for b in (-1, 1)]
    vertices = np.array(
        [p for a, b in signs for p in ((0, a, b * golden), (a, b * golden, 0), (b * golden, 0, a))], dtype=np.float64
    )
    # faces are the triples of vertices at the least distance from one another
    distance = np.linalg.norm(vertices[:, None] - vertices[None], axis=-1)
    near = (distance > 0) & (distance < 2.1)
    faces = [(i, j, k) for i in range(12) for j in range(i) for k in range(j) if near[i, j] and near[j, k] and near[i, k]]
    return unit(vertices), np.array(faces)


def subdivided(vertices: Array, faces: Corners) -> tuple[Array, Corners]:
    """Each triangle of a sphere cut into four, the new vertices moved out to the sphere."""
    points = [tuple(p) for p in vertices]
    middle: dict[tuple[int, int], int] = {}

    def between(i: int, j: int) -> int:
        edge = (min(i, j), max(i, j))
        if edge not in middle:
            middle[edge] = len(points)
            points.append(tuple(unit(vertices[i] + vertices[j])))
        return middle[edge]

    finer = []
    for a, b, c in faces.tolist():
        ab, bc, ca = between(a, b), between(b, c), between(c, a)
        finer += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.array(points), np.array(finer)


def gem() -> TriangleMesh:
    """An icosahedron of 20 flat faces that stands on the ground."""
    vertices, faces = icosahedron()
    return on_ground(flat(vertices, faces))


def rock() -> TriangleMesh:
    """A sphere of 80 triangles whose radius undulates."""
    vertices, faces = subdivided(*icosahedron())
    waves = np.sin(vertices @ np.array([[3.1, -2.0], [1.7, 4.3], [-2.3, 2.9]]) + np.array([0.4, 1.9])).sum(1)
    return on_ground(flat(vertices * (1 + 0.13 * waves[:, None]), faces))


def revolved(profile: Array, normals: Array, around: int, closed: bool = False) -> TriangleMesh:
    """The surface that a curve of points (radius, height) sweeps around the z axis.

    Args:
        profile: `[P, 2]`.
        normals: `[P - 1, 2, 2]` (`[P, 2, 2]` if closed), unit (radius, height) normals at both ends of each piece.
        around: pieces of a turn.
        closed: whether the curve goes on from its last point to its first.
    """
    pieces = len(profile) - (0 if closed else 1)
    corners, directions = [], []
    for piece in range(pieces):
        ends = (profile[piece], profile[(piece + 1) % len(profile)])
        for step in range(around):
            angles = 2 * np.pi * np.array([step, step + 1]) / around
            place = {
                (e, s): (ends[e][0] * np.cos(a), ends[e][0] * np.sin(a), ends[e][1])
                for e in (0, 1) for s, a in enumerate(angles)
            }  # fmt: skip
            facing = {
                (e, s): (normals[piece][e][0] * np.cos(a), normals[piece][e][0] * np.sin(a), normals[piece][e][1])
                for e in (0, 1) for s, a in enumerate(angles)
            }  # fmt: skip
            for triangle in (((0, 0), (0, 1), (1, 1)), ((0, 0), (1, 1), (1, 0))):
                points = [place[key] for key in triangle]
                if len({tuple(np.round(p, 9)) for p in points}) == 3:  # at the axis a triangle may vanish
                    corners.append(points)
                    directions.append([facing[key] for key in triangle])
    return on_ground(TriangleMesh(np.array(corners), np.array(directions)))


def cone() -> TriangleMesh:
    """A cone with its base."""
    profile = np.array([[0.0, 0.0], [0.85, 0.0], [0.0, 1.9]])
    side = unit(np.array([1.9, 0.85]))
    return revolved(profile, np.array([[[0.0, -1], [0, -1]], [side, side]]), around=24)


def cylinder() -> TriangleMesh:
    """A cylinder with both ends."""
    profile = np.array([[0.0, 0.0], [0.8, 0.0], [0.8, 1.5], [0.0, 1.5]])
    ends = np.array([[[0.0, -1], [0, -1]], [[1, 0], [1, 0]], [[0, 1], [0, 1]]])
    return revolved(profile, ends, around=24)


def vase() -> TriangleMesh:
    """A surface of revolution with a waist."""
    height = np.linspace(0, 1, 7)
    radius = 0.62 + 0.28 * np.sin(1.2 + 4.6 * height)
    profile = np.concatenate(([[0.0, 0.0]], np.stack((radius, 1.9 * height), axis=1), [[0.0, 1.9]]))
    slope = 0.28 * 4.6 * np.cos(1.2 + 4.6 * height) / 1.9
    side = unit(np.stack((np.ones_like(slope), -slope), axis=1))
    ends = [np.array([[0.0, -1], [0, -1]]), *(side[i : i + 2] for i in range(6)), np.array([[0.0, 1], [0, 1]])]
    return revolved(profile, np.array(ends), around=12)


def torus() -> TriangleMesh:
    """A ring that lies on the ground."""
    angles = 2 * np.pi * np.arange(7) / 7
    outwards = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    normals = np.stack((outwards, np.roll(outwards, -1, axis=0)), axis=1)
    return revolved(np.array([0.68, 0.0]) + 0.32 * outwards, normals, around=14, closed=True)


def on_ground(mesh: TriangleMesh) -> TriangleMesh:
    """A mesh moved along z until it touches the plane z = 0 from above."""
    low = np.array([0, 0, mesh.corners[..., 2].min()])
    return TriangleMesh(mesh.corners - low, mesh.normals)


MESHES: dict[str, Callable[[], TriangleMesh]] = {
    "gem": gem,
    "rock": rock,
    "cone": cone,
    "cylinder": cylinder,
    "vase": vase,
    "torus": torus,
}
"""Every mesh by name."""
