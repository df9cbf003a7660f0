"""Cameras of view synthesis: rays, projection, normalization, checks."""

import math

import pytest
import torch

from kvbind.models.lact_nvs import invert_pose, mean_frame, normalize_cameras, project, ray_maps, rays
from kvbind.models.lact_nvs.cameras import check_intrinsics, check_poses


def turned(generator, *shape):
    """Random rotations `[..., 3, 3]`."""
    q, r = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q * torch.linalg.det(q).sign()[..., None, None]


def random_cameras(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.zeros(*shape, 4, 4, dtype=torch.float64)
    c2w[..., :3, :3] = turned(generator, *shape)
    c2w[..., :3, 3] = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    c2w[..., 3, 3] = 1
    intrinsics = torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 20 + 20
    return c2w, intrinsics


def looking_ahead(views=5, seed=0):
    """Cameras that look more or less along the world's z axis."""
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    small = torch.randn(views, 3, generator=generator, dtype=torch.float64) * 0.2
    for i, (a, b, c) in enumerate(small.tolist()):
        x = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]], dtype=torch.float64)
        y = torch.tensor([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]], dtype=torch.float64)
        z = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]], dtype=torch.float64)
        c2w[i, :3, :3] = z @ y @ x
    c2w[:, :3, 3] = torch.randn(views, 3, generator=generator, dtype=torch.float64) * 3 + 10
    return c2w


def test_known_points_project_where_they_must():
    # a camera at (0, 0, -4) that looks along z: right is x, down is y
    c2w = torch.eye(4)
    c2w[2, 3] = -4
    intrinsics = torch.tensor([100.0, 50.0, 32.0, 24.0])
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 4], [0, 0, -5]])
    pixels, depth = project(points, c2w, intrinsics)
    assert pixels[:4].tolist() == [[32, 24], [57, 24], [32, 36.5], [44.5, 30.25]]
    assert depth.tolist() == [4, 4, 4, 8, -1]


def test_a_camera_turned_right_sees_what_is_to_its_right_ahead():
    # a quarter turn about the y axis: the camera's z axis is the world's x axis, its x axis the world's -z axis
    c2w = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    pixels, depth = project(torch.tensor([[5.0, 0, 0], [5, 1, 0], [5, 0, -1]]), c2w, torch.tensor([10.0, 10, 8, 8]))
    assert depth.tolist() == [5, 5, 5]
    assert pixels.tolist() == [[8, 8], [8, 10], [10, 8]]


def test_every_ray_projects_onto_the_centre_of_its_pixel():
    c2w, intrinsics = random_cameras(2, 3)
    origins, directions = rays(c2w, intrinsics, (6, 9))
    assert origins.shape == directions.shape == (2, 3, 3, 6, 9)
    points = (origins + 2.5 * directions).flatten(-2).mT
    pixels, depth = project(points, c2w, intrinsics)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij")
    centres = torch.stack((columns + 0.5, rows + 0.5), dim=-1).double().flatten(0, 1)
    torch.testing.assert_close(pixels, centres.expand_as(pixels))
    assert (depth > 0).all()
    torch.testing.assert_close(directions.norm(dim=2), torch.ones(2, 3, 6, 9, dtype=torch.float64))
    torch.testing.assert_close(origins[1, 2, :, 4, 7], c2w[1, 2, :3, 3])


def test_the_middle_of_an_image_looks_along_the_cameras_axis():
    c2w, _ = random_cameras(1)
    _, directions = rays(c2w, torch.tensor([[30.0, 30, 2.5, 1.5]], dtype=torch.float64), (3, 5))
    torch.testing.assert_close(directions[0, :, 1, 2], c2w[0, :3, 2])


def test_ray_maps_hold_origin_direction_and_moment():
    c2w, intrinsics = random_cameras(2)
    origins, directions = rays(c2w, intrinsics, (4, 4))
    maps = ray_maps(c2w, intrinsics, (4, 4))
    o, d = origins[1, :, 3, 2], directions[1, :, 3, 2]
    moment = [o[1] * d[2] - o[2] * d[1], o[2] * d[0] - o[0] * d[2], o[0] * d[1] - o[1] * d[0]]
    torch.testing.assert_close(maps[1, :, 3, 2], torch.cat((o, d, torch.stack(moment))))


def test_rays_are_in_full_precision_under_autocast_and_for_half_cameras():
    c2w, intrinsics = random_cameras(2)
    expected = ray_maps(c2w.float(), intrinsics.float(), (4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ray_maps(c2w.float(), intrinsics.float(), (4, 4)), expected, rtol=0, atol=0)
    assert ray_maps(c2w.half(), intrinsics.half(), (4, 4)).dtype == torch.float32


def test_no_cameras_have_no_mean():
    with pytest.raises(ValueError, match=r"c2w must hold at least one camera; got shape \[2, 0, 4, 4\]"):
        mean_frame(torch.zeros(2, 0, 4, 4))


def test_cameras_keep_their_digits_under_autocast():
    c2w = looking_ahead().float()
    points, intrinsics = torch.randn(5, 4, 3), torch.tensor([30.0, 30, 8, 8]).expand(5, 4)

    def worked_out():
        frame = mean_frame(c2w)
        inside = frame.normalize(c2w)
        return frame.pose, inside, frame.restore(inside), invert_pose(c2w), *project(points, c2w, intrinsics)

    expected = worked_out()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, known in zip(worked_out(), expected, strict=True):
            torch.testing.assert_close(found, known, rtol=0, atol=0)


def test_poses_invert():
    c2w, _ = random_cameras(3)
    torch.testing.assert_close(invert_pose(c2w) @ c2w, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    torch.testing.assert_close(invert_pose(c2w), torch.linalg.inv(c2w))


def test_a_normalized_scene_is_centred_in_its_mean_camera_and_reaches_one():
    c2w = normalize_cameras(looking_ahead())
    centres, axes = c2w[:, :3, 3], c2w[:, :3, :3].mean(0)
    torch.testing.assert_close(centres.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert centres.abs().max().item() == pytest.approx(1)
    # the mean z axis is z, the mean y axis has nothing sideways
    torch.testing.assert_close(axes[:2, 2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert axes[2, 2] > 0
    assert axes[1, 1] > 0
    assert axes[0, 1].abs() < 1e-12


def test_normalization_is_a_similarity_that_keeps_what_cameras_see():
    world = looking_ahead()
    frame = mean_frame(world)
    inside = frame.normalize(world)
    check_poses("c2w", inside)
    points = torch.randn(20, 3, dtype=torch.float64) + torch.tensor([10.0, 10, 40])
    moved = ((points - frame.pose[:3, 3]) @ frame.pose[:3, :3]) / frame.scale
    intrinsics = torch.tensor([30.0, 30, 16, 16], dtype=torch.float64).expand(5, 4)
    seen, depth = project(points.expand(5, 20, 3), world, intrinsics)
    seen_inside, depth_inside = project(moved.expand(5, 20, 3), inside, intrinsics)
    torch.testing.assert_close(seen_inside, seen)
    torch.testing.assert_close(depth_inside * frame.scale, depth)
    torch.testing.assert_close(frame.restore(inside), world)


def test_batches_of_scenes_are_normalized_one_by_one():
    scenes = torch.stack((looking_ahead(seed=0), looking_ahead(seed=1)))
    both = normalize_cameras(scenes)
    for scene, alone in zip(both, scenes, strict=True):
        torch.testing.assert_close(scene, normalize_cameras(alone))


def test_one_camera_becomes_the_origin():
    c2w, _ = random_cameras(1)
    torch.testing.assert_close(normalize_cameras(c2w), torch.eye(4, dtype=torch.float64)[None])


def ring(tilt, count=4):
    """Cameras at distance 2 all around the origin, which they look at; `tilt` radians downwards."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    c, s = math.cos(tilt), math.sin(tilt)
    down = torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]], dtype=torch.float64)
    for i in range(count):
        c, s = math.cos(2 * math.pi * i / count), math.sin(2 * math.pi * i / count)
        c2w[i, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64) @ down
    c2w[:, :3, 3] = -2 * c2w[:, :3, 2]
    return c2w


@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_cameras_all_around_take_the_first_ones_axes(tilt):
    """A level ring has no mean z axis; in a tilted one it is parallel to the mean y axis."""
    world = ring(tilt)
    frame = mean_frame(world)
    torch.testing.assert_close(frame.pose[:3, :3], world[0, :3, :3])
    torch.testing.assert_close(frame.pose[:3, 3], world[:, :3, 3].mean(0))
    inside = frame.normalize(world)
    check_poses("c2w", inside)
    assert inside[:, :3, 3].abs().max().item() == pytest.approx(1)
    torch.testing.assert_close(inside[0, :3, :3], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(frame.restore(inside), world)
    # a scene beside it in the batch is normalized as it would be alone
    other = looking_ahead(4)
    torch.testing.assert_close(normalize_cameras(torch.stack((world, other)))[1], normalize_cameras(other))


def broken(change):
    c2w = random_cameras(2, 3)[0]
    change(c2w[1, 2])
    return c2w


def mirror(pose):
    pose[:3, 0] *= -1


def scale(pose):
    pose[:3, :3] *= 1.5


def shear(pose):
    pose[:3, 0] += 0.1 * pose[:3, 1]


def transpose(pose):
    pose.copy_(pose.mT.clone())


def lose(pose):
    pose[0, 3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mirror, r"c2w\[1, 2\] must have a rotation, without mirroring"),
        (scale, r"c2w\[1, 2\] must have a rotation.*scaled or skewed"),
        (shear, "scaled or skewed"),
        (transpose, r"c2w\[1, 2\] must end in the row 0, 0, 0, 1"),
        (lose, r"c2w\[1, 2\] is not finite"),
    ],
)
def test_matrices_that_are_no_rigid_motion_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_poses("c2w", broken(change))


def test_poses_with_few_digits_are_accepted():
    check_poses("c2w", (random_cameras(2, 3)[0] * 1e4).round() / 1e4)


@pytest.mark.parametrize(
    ("intrinsics", "message"),
    [
        ([0.9, 1.2, 0.5, 0.5], "looks like fractions of the image's size; multiply fx, cx by its width"),
        ([-30.0, 30, 16, 16], "focal length that is not above 0"),
        ([float("inf"), 30, 16, 16], "not finite"),
    ],
)
def test_intrinsics_that_are_not_in_pixels_are_refused(intrinsics, message):
    with pytest.raises(ValueError, match=message):
        check_intrinsics("fxfycxcy", torch.tensor([[[30.0, 30, 16, 16], intrinsics]]))


def test_unusual_intrinsics_in_pixels_are_accepted():
    # a wide angle on 8 pixels, a crop far from the principal point, a crop around it
    check_intrinsics("fxfycxcy", torch.tensor([[4.0, 4, 4, 4], [500, 500, -30, 12], [500, 500, 0.5, 0.5]]))


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match=r"c2w must be \[B, V, 4, 4\]; got shape \[2, 3, 3, 4\]"):
        check_poses("c2w", torch.zeros(2, 3, 3, 4))
    with pytest.raises(TypeError, match=r"c2w must be a floating-point tensor \[B, V, 4, 4\]; got torch.int64"):
        check_poses("c2w", torch.eye(4, dtype=torch.int64)[None])
    with pytest.raises(TypeError, match="got list"):
        check_intrinsics("fxfycxcy", [[30.0, 30, 16, 16]])
    with pytest.raises(ValueError, match=r"fxfycxcy must be \[B, V, 4\], fx, fy, cx, cy; got shape \[1, 2, 3\]"):
        check_intrinsics("fxfycxcy", torch.ones(1, 2, 3))


def test_cameras_without_a_mean_have_finite_gradients():
    ahead, back = torch.eye(4), torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    ahead[2, 3], back[2, 3] = -2, 2
    poses = torch.stack((ahead, back)).requires_grad_()
    normalize_cameras(poses).square().sum().backward()
    assert poses.grad.isfinite().all()
