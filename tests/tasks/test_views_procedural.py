"""Procedural scenes: what ray casting must get right, and what decides a scene."""

import math
from threading import get_ident

import pytest
import torch

from kvbind.models.lact_nvs import project, rays
from kvbind.models.lact_nvs.cameras import check_poses
from kvbind.tasks.views import raycast
from kvbind.tasks.views.meshes import MESHES
from kvbind.tasks.views.orbit import look_at, middle, orbit, upwards
from kvbind.tasks.views.procedural import OBJECTS, Cameras, make_cameras, make_scenes
from kvbind.tasks.views.raycast import RAYS_AT_ONCE, World, cross_triangles, nearest_hits, render, shadowed

UP = torch.tensor([0.0, 0, 1])


def empty_world(**fields):
    """One scene: a grey ground, white sky, the sun straight above, and what is given; no other primitive is there."""
    objects = 4
    whole = {
        "spheres": torch.zeros(1, 1, 3, 4),
        "boxes": torch.zeros(1, 1, 3, 4),
        "triangles": torch.zeros(1, 1, 1, 3, 4),
        "normals": torch.zeros(1, 1, 1, 3, 3),
        "bounds": torch.zeros(1, 1, 4),
        "frames": torch.eye(3, 4).expand(1, objects, 3, 4),
        "colours": torch.full((1, objects, 2, 3), 0.2),
        "pattern": torch.zeros(1, objects, dtype=torch.int64),
        "waves": torch.ones(1, objects, 3),
        "gloss": torch.zeros(1, objects),
        "sun": torch.tensor([[0.0, 0, 1]]),
        "sky": torch.ones(1, 2, 3),
    }
    return World(**(whole | fields))


def moved(scale, centre):
    """World to a unit shape that is scaled and moved, `[1, 1, 3, 4]`."""
    return torch.cat((torch.eye(3) / scale, -torch.tensor(centre)[:, None] / scale), 1)[None, None]


def test_a_sphere_and_a_box_are_hit_where_geometry_says():
    origins = torch.tensor([[[0.0, -5, 1]]])
    directions = torch.tensor([[[0.0, 1, 0], [0, 0.6, -0.8], [0, -1, 0], [0, 0, 1]]])
    sphere = empty_world(spheres=moved(0.5, [0.0, 0, 1]))
    distance, normal, thing = nearest_hits(sphere, origins, directions)
    assert distance[0].tolist() == pytest.approx([4.5, 1.25, math.inf, math.inf])
    assert normal[0, :2].flatten().tolist() == pytest.approx([0, -1, 0, 0, 0, 1])
    assert thing[0, :2].tolist() == [0, 3]
    box = empty_world(boxes=moved(0.5, [0.25, 0, 1]))
    distance, normal, _ = nearest_hits(box, origins, directions)
    assert distance[0, 0].item() == pytest.approx(4.5)
    assert normal[0, 0].tolist() == [0, -1, 0]


def test_rays_cross_triangles_where_their_points_lie_inside():
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    edges = torch.stack((corners[1] - corners[0], corners[2] - corners[0]), 1)
    frame = torch.cat((edges, torch.linalg.cross(edges[:, 0], edges[:, 1])[:, None]), 1)
    back = torch.linalg.inv(frame)
    weights = torch.tensor([[0.2, 0.3], [0.7, 0.2], [0.7, 0.4], [-0.1, 0.5]], dtype=torch.float64)
    aims = corners[0] + weights @ edges.T
    origin = torch.tensor([3.0, 4, 5], dtype=torch.float64)
    start = back @ (origin - corners[0])
    step = (aims - origin) @ back.T
    found = cross_triangles(tuple(start.expand(4, 3).T), tuple(step.T))
    assert found[:2].tolist() == pytest.approx([1, 1])
    assert found[2:].isinf().all()


def test_what_stands_between_a_point_and_the_sun_shadows_it():
    world = empty_world(spheres=moved(0.5, [0.0, 0, 1]), boxes=moved(0.5, [4.0, 0, 1]))
    points = torch.tensor([[[0.0, 0, 0], [0.4, 0, 0], [0.6, 0, 0], [0, 0, 1.6], [4.4, 0.4, 0], [4.6, 0, 0]]])
    assert shadowed(world, points, world.sun[:, None])[0].tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_closed_stand_on_the_ground_and_know_their_outside(name):
    mesh = MESHES[name]()
    corners, normals = torch.from_numpy(mesh.corners), torch.from_numpy(mesh.normals)
    assert corners[..., 2].min().item() == pytest.approx(0)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(normals.shape[:-1], dtype=torch.float64))
    # each edge of a closed surface belongs to two triangles
    edges = {}
    for triangle in corners.round(decimals=6).tolist():
        for a, b in ((0, 1), (1, 2), (2, 0)):
            edge = frozenset((tuple(x + 0.0 for x in triangle[a]), tuple(x + 0.0 for x in triangle[b])))
            edges[edge] = edges.get(edge, 0) + 1
    assert set(edges.values()) == {2}
    # the flux of a vector field outwards is the volume inside: orientation by the stored normals
    a, b, c = corners.unbind(1)
    area = torch.linalg.cross(b - a, c - a) / 2
    outwards = area * (area * normals.mean(1)).sum(-1, keepdim=True).sign()
    assert (outwards * corners.mean(1)).sum().item() / 3 > 0.3


def test_a_scene_is_decided_by_its_split_and_number_alone():
    few, many = make_scenes("train", 3), make_scenes("train", 70)
    for field in ("spheres", "triangles", "colours", "pattern", "sun"):
        assert torch.equal(getattr(few, field), getattr(many, field)[:3]), field
    other = make_scenes("held_out", 70)
    suns = torch.cat((many.sun, other.sun))
    assert torch.unique(suns, dim=0).shape[0] == 140
    cameras = make_cameras("train", 2, 5, (8, 8), Cameras())
    assert torch.equal(make_cameras("train", 4, 5, (8, 8), Cameras())[0][:2], cameras[0])
    assert many.frames.shape[1] == OBJECTS + 1


def test_cameras_look_at_the_middle_and_stay_in_their_sector():
    c2w, intrinsics = make_cameras("train", 3, 40, (16, 24), Cameras(sector=60))
    check_poses("c2w", c2w)
    seen, depth = project(torch.tensor([[0.0, 0, 0.35]]).expand(3, 40, 1, 3), c2w, intrinsics)
    assert (depth > 3).all()
    assert ((seen[..., 0, :] - torch.tensor([12.0, 8])).abs() < 8).float().mean() > 0.95
    azimuth = torch.atan2(c2w[..., 1, 3], c2w[..., 0, 3])
    spread = (azimuth - azimuth[:, :1] + math.pi).remainder(2 * math.pi) - math.pi
    assert (spread.amax(1) - spread.amin(1)).max() < math.radians(60 + 15)
    # upright: the image's x axis is level, its y axis points down
    assert c2w[..., 2, 0].abs().max() < 1e-6
    assert (c2w[..., 2, 1] < 0).all()


def test_known_points_appear_where_cameras_project_them():
    """A small red ball on the ground is seen at the pixel that `project` says."""
    world = empty_world(spheres=moved(0.12, [0.5, -0.3, 0.12]))
    colours = world.colours.clone()
    colours[0, 0] = torch.tensor([1.0, 0, 0])
    world = empty_world(spheres=world.spheres, colours=colours)
    c2w, intrinsics = make_cameras("train", 1, 6, (48, 64), Cameras())
    pictures = render(world, c2w, intrinsics, (48, 64), samples=1)[0].float() / 255
    redness = (pictures[:, 0] - pictures[:, 1]).clamp(min=0)
    seen, _ = project(torch.tensor([0.5, -0.3, 0.12]).expand(1, 6, 1, 3), c2w, intrinsics)
    rows, columns = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for view in range(6):
        weight = redness[view] / redness[view].sum()
        found = torch.stack(((weight * columns).sum(), (weight * rows).sum()))
        assert (found - seen[0, view, 0]).norm() < 1


def test_pictures_do_not_depend_on_how_many_are_rendered_together_or_on_autocast():
    world = make_scenes("train", 2)
    c2w, intrinsics = make_cameras("train", 2, 3, (16, 16), Cameras())
    together = render(world, c2w, intrinsics, (16, 16))
    assert together.shape == (2, 3, 3, 16, 16)
    assert together.dtype == torch.uint8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = render(world[1:], c2w[1:, 2:], intrinsics[1:, 2:], (16, 16))
    torch.testing.assert_close(alone[0, 0].int(), together[1, 2].int(), rtol=0, atol=1)
    assert together.float().std() > 20


def test_threads_share_pictures_and_leave_no_trace(monkeypatch):
    monkeypatch.setitem(RAYS_AT_ONCE, "cpu", 2 * 16 * 16)
    world, cameras = make_scenes("train", 3), make_cameras("train", 3, 5, (16, 16), Cameras())
    before, threads, told = torch.get_num_threads(), [], []
    try:
        torch.set_num_threads(1)
        alone = render(world, *cameras, (16, 16), 1)
        torch.set_num_threads(3)
        inner = raycast.shade
        monkeypatch.setattr(raycast, "shade", lambda *x: threads.append((torch.get_num_threads(), get_ident())) or inner(*x))
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            together = render(world.to(torch.device("cpu")), *cameras, (16, 16), 1, told.append)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
    assert {number for number, _ in threads} == {1}
    assert get_ident() not in {thread for _, thread in threads}
    assert told == [1, 2, 3]


def test_an_orbit_goes_all_around_where_cameras_do_and_else_to_and_fro():
    c2w, _ = make_cameras("train", 1, 30, (8, 8), Cameras(sector=360))
    path = orbit(c2w[0], 24)
    check_poses("path", path)
    torch.testing.assert_close(middle(c2w[0].double()), torch.tensor([0.0, 0, 0.35]).double(), rtol=0, atol=0.2)
    assert upwards(c2w[0].double()) @ UP.double() > 0.99
    angles = torch.atan2(path[:, 1, 3], path[:, 0, 3]).sort().values
    assert angles.diff().max() < 2 * math.pi / 12
    part, _ = make_cameras("train", 1, 30, (8, 8), Cameras(sector=40))
    centres = orbit(part[0], 24)[:, :3, 3]
    assert (centres - centres.mean(0)).norm(dim=1).max() < 2.5
    assert torch.cdist(centres, part[0, :, :3, 3]).amin(1).max() < 1.5


def test_an_orbit_of_parallel_cameras_looks_ahead():
    c2w = torch.eye(4).repeat(5, 1, 1)
    c2w[:, 0, 3] = torch.arange(5.0)
    path = orbit(c2w, 8)
    assert (path[:, 2, 2] > 0.5).all()
    assert (path[:, 1, 1] > 0.9).all()


def test_look_at_puts_the_target_in_the_middle():
    pose = look_at(torch.tensor([3.0, 1, 2]), torch.tensor([0.0, 0, 1]), UP)
    origins, directions = rays(pose, torch.tensor([10.0, 10, 0.5, 0.5]), (1, 1))
    towards = torch.tensor([0.0, 0, 1]) - origins[:, 0, 0]
    torch.testing.assert_close(directions[:, 0, 0], towards / towards.norm())
