"""Ray casting in batched PyTorch: ellipsoids, boxes, triangle meshes and a ground, one sun with shadows.

Every primitive is a unit shape (a unit sphere, the cube [-1, 1]^3, the triangle u, v >= 0, u + v <= 1 in the plane z = 0)
under an affine map, and a ray is taken into its space by the inverse of that map, which scenes store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from kvbind.models.lact_nvs.cameras import rays
from kvbind.precision import matmul_precision

Point = tuple[Tensor, Tensor, Tensor]

PATTERNS = ("plain", "checks", "stripes", "dots", "marble")
# what fits a core's caches; what fills a GPU without taking more than some 2 GB of it
RAYS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 19}
NEAR = 1e-4
GAMMA = 2.2
FOG = (5.0, 11.0)
"""Distances from the origin between which the ground fades into the horizon."""


@dataclass(frozen=True)
class World:
    """A batch of N scenes, float32 unless said otherwise. The last object, K - 1, is the ground.

    Attributes:
        spheres: world to unit sphere, `[N, A, 3, 4]`; a map of zeros is never hit.
        boxes: world to unit cube, `[N, B, 3, 4]`.
        triangles: world to unit triangle, `[N, M, T, 3, 4]`, those of M meshes.
        normals: at the triangles' corners, `[N, M, T, 3, 3]`.
        bounds: centre and radius of a sphere around each mesh, `[N, M, 4]`; of radius 0 where there is none.
        frames: world to the coordinates of each object's pattern, `[N, K, 3, 4]`, objects in the order spheres, boxes,
            meshes, ground.
        colours: two of each object, linear RGB, `[N, K, 2, 3]`.
        pattern: index into `PATTERNS`, `[N, K]`, int64.
        waves: per object the direction of its stripes times their frequency, `[N, K, 3]`.
        gloss: strength of each object's highlight, `[N, K]`.
        sun: unit direction towards the sun, `[N, 3]`.
        sky: colours at the horizon and at the zenith, `[N, 2, 3]`.
    """

    spheres: Tensor
    boxes: Tensor
    triangles: Tensor
    normals: Tensor
    bounds: Tensor
    frames: Tensor
    colours: Tensor
    pattern: Tensor
    waves: Tensor
    gloss: Tensor
    sun: Tensor
    sky: Tensor

    def __getitem__(self, index: Tensor | slice) -> Self:
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """These scenes on a device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 proper, whatever training does: TF32 would show as ragged edges."""
    with matmul_precision("highest"), torch.autocast(device.type, enabled=False), torch.no_grad():
        yield


@contextmanager
def part_by_part(
    work: Callable[[Tensor], Tensor], parts: Iterable[Tensor], device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """What `work` makes of each part, in their order; on a CPU as many parts at once as PyTorch has threads.

    Operations on a part are short. Threads that divide each of them wait for one another after every one, which takes many
    times as long where other processes use the cores; threads that take whole parts do not.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield map(work, parts)
        return
    torch.set_num_threads(1)  # threads that begin from here on have one as well
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def render(
    world: World,
    c2w: Tensor,
    fxfycxcy: Tensor,
    size: tuple[int, int],
    samples: int = 2,
    tell: Callable[[int], None] | None = None,
) -> Tensor:
    """Pictures of scenes, one or more views each.

    Args:
        world: N scenes.
        c2w: poses `[N, V, 4, 4]`, outside of all objects and above the ground.
        fxfycxcy: intrinsics `[N, V, 4]` in pixels.
        size: height and width in pixels.
        samples: rays along each side of a pixel, whose colours are averaged.
        tell: told of how many scenes have all of their pictures, every so often.

    Returns:
        RGB, uint8 `[N, V, 3, h, w]`, on the scenes' device.
    """
    device = world.sun.device
    height, width = size
    scenes, views = c2w.shape[:2]
    which = torch.arange(scenes, device=device).repeat_interleave(views)
    poses, intrinsics = c2w.to(device).flatten(0, 1), fxfycxcy.to(device).flatten(0, 1)
    at_once = max(1, RAYS_AT_ONCE.get(device.type, 1 << 14) // (height * width * samples**2))

    @torch.no_grad()  # which each thread has of its own
    def draw(some: Tensor) -> Tensor:
        origins, directions = rays(poses[some], intrinsics[some] * samples, (height * samples, width * samples))
        colour = shade(world[which[some]], origins.flatten(2)[:, :, :1].mT, directions.flatten(2).mT)
        fine = colour.mT.reshape(-1, 3, height, samples, width, samples)
        return (255 * fine.mean((3, 5)).clamp(0, 1) ** (1 / GAMMA)).round().to(torch.uint8)

    pictures, done = [], 0
    parts = torch.arange(scenes * views, device=device).split(at_once)
    with full_precision(device), part_by_part(draw, parts, device) as found:
        for some in found:
            pictures.append(some)
            before, done = done // views, done + len(some)
            if tell is not None and done // views > before:
                tell(done // views)
    return torch.cat(pictures).unflatten(0, (scenes, views))


def shade(world: World, origins: Tensor, directions: Tensor) -> Tensor:
    """Linear RGB `[N, R, 3]` along rays: origins `[N, 1, 3]`, unit directions `[N, R, 3]`."""
    distance, normal, thing = nearest_hits(world, origins, directions)
    hit = distance < torch.inf
    points = origins + torch.where(hit, distance, 0.0)[..., None] * directions
    normal = torch.where((normal * directions).sum(-1, keepdim=True) > 0, -normal, normal)

    albedo = surface(world, points, thing)
    sun = world.sun[:, None]
    facing = (normal * sun).sum(-1)
    lit = (facing > 0) & hit
    lit &= ~shadowed(world, points + 2e-3 * normal, sun)
    direct = torch.where(lit, facing.clamp(min=0), 0.0)
    halfway = sun - directions
    gleam = ((normal * halfway).sum(-1) / halfway.norm(dim=-1)).clamp(min=0) ** 40
    gleam = torch.where(lit, gleam * torch.gather(world.gloss, 1, thing), 0.0)

    horizon, zenith = world.sky[:, :1], world.sky[:, 1:]
    from_above = (0.5 + 0.5 * normal[..., 2:]) * (0.55 * horizon + 0.45 * zenith)
    colour = albedo * (0.5 * from_above + 0.08 + 0.85 * direct[..., None]) + gleam[..., None]
    sky = horizon + (zenith - horizon) * directions[..., 2:].clamp(0, 1) ** 0.6
    far = ((points.norm(dim=-1) - FOG[0]) / (FOG[1] - FOG[0])).clamp(0, 1)
    far = torch.where(hit, far * far * (3 - 2 * far), 1.0)[..., None]
    return colour + (torch.where(hit[..., None], horizon, sky) - colour) * far


def nearest_hits(world: World, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first surface along each ray.

    Returns:
        Distance `[N, R]`, infinite where there is none; unit normal `[N, R, 3]`, towards either side; and the object's
        index `[N, R]`, int64.
    """
    spheres, boxes, meshes = world.spheres.shape[1], world.boxes.shape[1], world.triangles.shape[1]
    ground = torch.where(directions[..., 2] < -1e-6, -origins[..., 2] / directions[..., 2], torch.inf)
    best, thing = ground, torch.full_like(ground, spheres + boxes + meshes, dtype=torch.int64)
    normal = torch.zeros_like(directions)
    normal[..., 2] = 1

    for first, maps, crossing, outwards in (
        (0, world.spheres, cross_spheres, lambda p: p),
        (spheres, world.boxes, cross_boxes, main_axis),
    ):
        distance, chosen = crossing(into(maps, origins), along(maps, directions)).min(-1)
        closer = distance < best
        points = origins + torch.where(closer, distance, 0.0)[..., None] * directions
        own = torch.gather(maps.flatten(2), 1, chosen[..., None].expand(-1, -1, 12)).unflatten(-1, (3, 4))
        local = (own[..., :3] @ points[..., None])[..., 0] + own[..., 3]
        turned = (own[..., :3].mT @ outwards(local)[..., None])[..., 0]
        best, thing = torch.where(closer, distance, best), torch.where(closer, chosen + first, thing)
        normal = torch.where(closer[..., None], torch.nn.functional.normalize(turned, dim=-1), normal)

    for mesh in range(meshes):
        picked = may_hit(world.bounds[:, mesh], origins, directions)
        towards = picked.take(directions)
        maps = world.triangles[:, mesh]
        start, step = into(maps, origins), along(maps, towards)
        distance, chosen = cross_triangles(start, step).min(-1)
        at = [chosen[..., None], chosen[..., None].expand(-1, -1, 9)]
        u, v = (
            torch.gather((o + torch.where(distance < torch.inf, distance, 0.0)[..., None] * d), -1, at[0])
            for o, d in zip(start[:2], step[:2], strict=True)
        )
        a, b, c = torch.gather(world.normals[:, mesh].flatten(2), 1, at[1]).unflatten(-1, (3, 3)).unbind(-2)
        smooth = torch.nn.functional.normalize(a + u * (b - a) + v * (c - a), dim=-1)
        distance, smooth = picked.put(distance, torch.inf), picked.put(smooth, 0.0)
        closer = distance < best
        best, normal = torch.where(closer, distance, best), torch.where(closer[..., None], smooth, normal)
        thing = torch.where(closer, spheres + boxes + mesh, thing)
    return best, normal, thing


def shadowed(world: World, points: Tensor, sun: Tensor) -> Tensor:
    """Whether anything stands between points `[N, R, 3]` and the sun, in direction `[N, 1, 3]`; bool `[N, R]`."""
    dark = cross_spheres(into(world.spheres, points), along(world.spheres, sun)).amin(-1) < torch.inf
    dark |= cross_boxes(into(world.boxes, points), along(world.boxes, sun)).amin(-1) < torch.inf
    for mesh in range(world.triangles.shape[1]):
        picked = may_hit(world.bounds[:, mesh], points, sun)
        maps = world.triangles[:, mesh]
        blocked = cross_triangles(into(maps, picked.take(points)), along(maps, sun)).amin(-1) < torch.inf
        dark |= picked.put(blocked, False)
    return dark


def along(maps: Tensor, vectors: Tensor) -> Point:
    """Vectors `[N, R, 3]` in the space of each primitive `[N, P, 3, 4]`: three coordinates `[N, R, P]`."""
    x, y, z = (vectors @ maps[:, :, i, :3].mT for i in range(3))
    return x, y, z


def into(maps: Tensor, points: Tensor) -> Point:
    """Points `[N, R, 3]` in the space of each primitive `[N, P, 3, 4]`: three coordinates `[N, R, P]`."""
    x, y, z = (part + maps[:, None, :, i, 3] for i, part in enumerate(along(maps, points)))
    return x, y, z


def cross_spheres(origin: Point, direction: Point) -> Tensor:
    """Distances at which rays enter the unit sphere; infinite where they do not."""
    a = sum_of_squares(direction)
    b = origin[0] * direction[0] + origin[1] * direction[1] + origin[2] * direction[2]
    inside_root = b * b - a * (sum_of_squares(origin) - 1)
    distance = (-b - inside_root.clamp(min=0).sqrt()) / a
    return torch.where((inside_root > 0) & (distance > NEAR), distance, torch.inf)


def cross_boxes(origin: Point, direction: Point) -> Tensor:
    """Distances at which rays enter the cube [-1, 1]^3; infinite where they do not."""
    enter = leave = None
    for o, d in zip(origin, direction, strict=True):
        slope = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
        one, other = (-1 - o) * slope, (1 - o) * slope
        near, far = torch.minimum(one, other), torch.maximum(one, other)
        enter = near if enter is None else torch.maximum(enter, near)
        leave = far if leave is None else torch.minimum(leave, far)
    if enter is None or leave is None:
        raise ValueError("origin must have three coordinates; got none")
    return torch.where((enter < leave) & (enter > NEAR), enter, torch.inf)


def cross_triangles(origin: Point, direction: Point) -> Tensor:
    """Distances at which rays cross the triangle u, v >= 0, u + v <= 1 of the plane z = 0; infinite where they do not."""
    distance = -origin[2] / direction[2]
    u = origin[0] + distance * direction[0]
    v = origin[1] + distance * direction[1]
    return torch.where((u >= 0) & (v >= 0) & (u + v <= 1) & (distance > NEAR), distance, torch.inf)


def sum_of_squares(x: Point) -> Tensor:
    """The squared length of vectors given by coordinates."""
    return x[0] * x[0] + x[1] * x[1] + x[2] * x[2]


def main_axis(x: Tensor) -> Tensor:
    """Points on the cube [-1, 1]^3 `[..., 3]` as the outward normal of their face."""
    axis = x.abs().argmax(-1, keepdim=True)
    return torch.zeros_like(x).scatter_(-1, axis, torch.gather(x, -1, axis).sign())


@dataclass(frozen=True)
class Picked:
    """Some rays of each scene, equally many in all, brought together.

    Attributes:
        index: their places, `[N, r]`, int64.
        total: how many rays each scene has, R.
    """

    index: Tensor
    total: int

    def take(self, x: Tensor) -> Tensor:
        """`[N, R, 3]` or `[N, 1, 3]` to `[N, r, 3]`."""
        return torch.gather(x.expand(-1, self.total, -1), 1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, x: Tensor, elsewhere: float) -> Tensor:
        """`[N, r, ...]` to `[N, R, ...]`, with another value for the rays that were not picked."""
        whole = x.new_full((x.shape[0], self.total, *x.shape[2:]), elsewhere)
        return whole.scatter_(1, self.index.reshape(*self.index.shape, *([1] * (x.dim() - 2))).expand_as(x), x)


def may_hit(bound: Tensor, origins: Tensor, directions: Tensor) -> Picked:
    """The rays that pass through a sphere `[N, 4]` around a mesh, and a few more where scenes differ in their number."""
    towards = bound[:, None, :3] - origins
    ahead = (towards * directions).sum(-1)
    hits = (towards.square().sum(-1) - ahead.square() < bound[:, None, 3].square()) & (ahead > -bound[:, None, 3])
    rank = hits.cumsum(-1)
    most = max(int(rank[:, -1].max()), 1)
    # hits move to the front in their order; what is left of a scene's row stays ray 0, which does no harm
    places = torch.where(hits, rank - 1, most)
    front = torch.zeros(len(hits), most + 1, dtype=torch.int64, device=hits.device)
    front.scatter_(1, places, torch.arange(hits.shape[1], device=hits.device).expand_as(places))
    return Picked(front[:, :most], hits.shape[1])


def surface(world: World, points: Tensor, thing: Tensor) -> Tensor:
    """The colour of objects `[N, R]` at points `[N, R, 3]` of theirs, linear RGB `[N, R, 3]`."""

    def own(x: Tensor) -> Tensor:
        rest = x.shape[2:]
        flat = x.flatten(2) if rest else x[..., None]
        return torch.gather(flat, 1, thing[..., None].expand(-1, -1, flat.shape[-1])).reshape(*thing.shape, *rest)

    frames, waves, kind = own(world.frames), own(world.waves), own(world.pattern)
    local = (frames[..., :3] @ points[..., None])[..., 0] + frames[..., 3]
    frequency = waves.norm(dim=-1, keepdim=True)
    cell = local * frequency
    phase = (local * waves).sum(-1)
    turbulence = torch.sin(cell * 4.1 + torch.sin(cell.roll(1, -1) * 2.7)).sum(-1)
    mixes = (
        torch.zeros_like(phase),
        cell.floor().sum(-1).remainder(2),
        (4 * torch.sin(2 * torch.pi * phase)).clamp(-1, 1) / 2 + 0.5,
        (0.36 - (cell - cell.floor() - 0.5).norm(dim=-1) > 0).to(phase),
        0.5 + 0.5 * torch.sin(2 * torch.pi * phase + 1.3 * turbulence),
    )
    mix = torch.gather(torch.stack(mixes, -1), -1, kind[..., None])
    first, second = own(world.colours).unbind(-2)
    return first + mix * (second - first)
