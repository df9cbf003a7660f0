import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kvbind.models.pictures import centred
from kvbind.tasks.images.augment import (
    Augment,
    AugmentConfig,
    ReadEvaluation,
    ReadTraining,
    blended,
    cut_in,
    erased,
    flipped,
    normalized,
    random_box,
    shifted,
)

IMAGES = torch.randint(1, 256, (64, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(64) % 5
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def generator():
    return torch.Generator().manual_seed(3)


def apply(seed=1, **fields):
    return Augment(AugmentConfig(**fields), MEAN, STD, 5)(IMAGES, LABELS, seed)


def test_without_anything_images_are_normalized_and_targets_one_hot():
    x, targets = apply()
    expected = (IMAGES.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(targets, torch.nn.functional.one_hot(LABELS, 5).float())


def test_shifts_move_whole_images_by_all_distances():
    moved, seen = shifted(IMAGES, 2, generator()), set()
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2))
    for i in range(len(IMAGES)):
        places = [(y, x) for y in range(5) for x in range(5) if torch.equal(moved[i], padded[i, :, y : y + 9, x : x + 7])]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 15


def test_flips_mirror_as_many_images_as_asked_for():
    x = IMAGES.repeat(20, 1, 1, 1)
    mirrored = flipped(x, 0.3, generator())
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, x, strict=True)]
    assert all(done or torch.equal(a, b) for done, a, b in zip(turned, mirrored, x, strict=True))
    assert np.mean(turned) == pytest.approx(0.3, abs=0.05)


def test_erasing_makes_one_rectangle_noise_in_some_images():
    x = torch.zeros(2000, 1, 16, 16)
    changed = erased(x, 0.25, generator())[:, 0] != 0
    some = changed.flatten(1).any(1)
    assert some.float().mean() == pytest.approx(0.25, abs=0.03)
    shares = []
    for mask in changed[some]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        shares.append(float(mask.float().mean()))
    assert 0.01 < min(shares) < 0.05 < 0.3 < max(shares) < 0.36
    corners = changed[some][:, [0, 0, -1, -1], [0, -1, 0, -1]].any(0)
    assert corners.all()


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_targets_follow_what_is_left_of_each_image(share, seed):
    # image i is all i, so that its mean says what it is made of
    x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 6, 8)
    one_hot = torch.eye(4)
    for mixed, targets in (blended(x, one_hot, share), cut_in(x, one_hot, share, np.random.default_rng(seed))):
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0))
    kept = float(cut_in(x, one_hot, share, np.random.default_rng(seed))[1][0, 0])
    assert kept >= share - 1e-6


def test_cutmix_pastes_a_rectangle_of_another_image():
    x = torch.arange(4.0)[:, None, None, None].expand(4, 1, 12, 12)
    mixed, _ = cut_in(x, torch.eye(4), 0.6, np.random.default_rng(0))
    assert set(mixed[1].flatten().tolist()) == {0.0, 1.0}


def test_smoothing_gives_its_share_to_all_classes():
    _, targets = apply(smoothing=0.1)
    assert targets[3].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.92, 0.02])


EVERYTHING = {"crop": "shift", "shift": 1, "flip": 0.5, "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def test_the_seed_decides_every_draw_and_nothing_else_does():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = apply(seed=7, **EVERYTHING)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    same, other = apply(seed=7, **EVERYTHING), apply(seed=8, **EVERYTHING)
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_mixup_and_cutmix_take_turns():
    kinds = set()
    for seed in range(30):
        x, targets = apply(seed=seed, mixup=0.8, cutmix=1.0)
        torch.testing.assert_close(targets.sum(1), torch.ones(64))
        kinds.add(bool(torch.isin(x[1], normalized(IMAGES, MEAN, STD)[:2]).all()))
    assert kinds == {True, False}


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_random_boxes_lie_inside(width, height, seed):
    left, upper, right, lower = random_box((width, height), (0.08, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_resized_crops_have_the_shares_and_shapes_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((400, 300), (0.2, 0.5), rng) for _ in range(300)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, shape = width * height / 120000, width / height
    assert 0.19 < share.min() < 0.23 < 0.47 < share.max() < 0.51
    assert 0.74 < shape.min() < 0.8 < 1.25 < shape.max() < 1.35


def test_a_crop_is_decided_by_its_seed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    read = ReadTraining(AugmentConfig(crop="resized"), 16)
    one, same, other = (np.asarray(read(image, (0, 3, seed))) for seed in (1, 1, 2))
    assert one.shape == (16, 16, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_evaluation_sees_the_centre():
    pixels = np.zeros((40, 60), np.uint8)
    pixels[10:30, 20:40] = 255
    image = Image.fromarray(pixels)
    # bicubic resizing looks beyond the edge a little
    assert np.asarray(ReadEvaluation(8, 0.5)(image, ())).min() > 200
    assert np.asarray(ReadEvaluation(8, 1.0)(image, ())).min() == 0
    assert centred(image.crop((0, 0, 8, 8)), 8).size == (8, 8)


class StandIn:
    """What torchvision's RandAugment is called with, and that it draws from torch's generator."""

    def __init__(self, num_ops, magnitude):
        self.settings = (num_ops, magnitude)

    def __call__(self, image):
        return Image.new("RGB", image.size, tuple(torch.randint(256, (3,)).tolist()))


@pytest.fixture
def torchvision(monkeypatch):
    transforms = types.ModuleType("torchvision.transforms")
    transforms.v2 = types.SimpleNamespace(RandAugment=StandIn)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)


def test_randaugment_is_torchvisions_and_decided_by_the_images_seed(torchvision):
    read = ReadTraining(AugmentConfig(randaugment=2, magnitude=7), 8)
    assert read.randaugment.settings == (2, 7)
    image = Image.new("RGB", (8, 8))
    state = torch.get_rng_state()
    one, same, other = (np.asarray(read(image, (0, 3, seed))) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_real_randaugment_keeps_the_size():
    pytest.importorskip("torchvision")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    read = ReadTraining(AugmentConfig(crop="resized", randaugment=2), 16)
    varied = [np.asarray(read(image, (0, 0, i))) for i in (1, 1, 2)]
    assert varied[0].shape == (16, 16, 3)
    assert np.array_equal(varied[0], varied[1])


def test_randaugment_without_torchvision_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ImportError, match=r"augment\.randaugment=2 needs the package 'torchvision'"):
        ReadTraining(AugmentConfig(randaugment=2), 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "resize"}, r"augment\.crop must be one of .*did you mean 'resized'"),
        ({"flip": 1.5}, r"augment\.flip must lie from 0 to 1; got 1\.5"),
        ({"mixup": -1}, r"augment\.mixup must be at least 0"),
        ({"crop": "shift"}, r"augment\.shift must be above 0 with crop='shift'"),
        ({"shift": 2}, r"augment\.shift must be above 0 with crop='shift', and 0 with another; got 2 and 'none'"),
        ({"scale": (0.5, 0.2)}, r"augment\.scale must be two rising numbers"),
        ({"magnitude": 31}, r"augment\.magnitude must lie from 0 to 30"),
    ],
)
def test_augmentation_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**fields)
