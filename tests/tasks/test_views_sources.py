"""Posed images in files: the released JSON, and RealEstate10K in chunks of tensors."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from kvbind.models.lact_nvs import invert_pose, project
from kvbind.tasks.views.chunks import ViewChunks, load_chunk
from kvbind.tasks.views.config import ViewsDataConfig
from kvbind.tasks.views.drawing import Batches, draw_views, evaluation_batches, load_batches, scene_order
from kvbind.tasks.views.orbit import look_at
from kvbind.tasks.views.pictures import open_picture, resize_and_crop
from kvbind.tasks.views.sources import open_held_out, open_training


def poses(count, seed=0):
    """Upright cameras around the origin, `[count, 4, 4]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 3, generator=generator, dtype=torch.float64) + torch.tensor([4.0, 0, 1.5])
    return look_at(centres, torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0, 1], dtype=torch.float64))


def picture(seed, size=(12, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def write_scene(folder, views=6, seed=0, size=(12, 20), **changes):
    """A scene in the released form; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, w2c in enumerate(invert_pose(poses(views, seed))):
        picture(seed + i, size).save(folder / f"{i}.png")
        entry = {"file_path": f"{i}.png", "fx": 30.0, "fy": 31.0, "cx": size[1] / 2, "cy": size[0] / 2, "w2c": w2c.tolist()}
        entries.append(entry | {name: change(entry[name]) for name, change in changes.items()})
    file = folder / "scene.json"
    file.write_text(json.dumps(entries))
    return file


def write_chunks(folder, scenes, views=6, first=0):
    """RealEstate10K's form: `scenes` scenes, two to a chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for begin in range(0, scenes, 2):
        entries = []
        for scene in range(begin, min(begin + 2, scenes)):
            images = []
            for view in range(views):
                buffer = io.BytesIO()
                picture(100 * scene + view, (18, 32)).save(buffer, "JPEG", quality=95)
                images.append(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
            w2c = invert_pose(poses(views, seed=first + scene))[:, :3].flatten(1).float()
            fractions = torch.tensor([0.9, 1.6, 0.5, 0.5]).expand(views, 4)
            cameras = torch.cat((fractions, torch.zeros(views, 2), w2c), 1)
            entries.append(
                {
                    "key": f"k{first + scene}",
                    "url": "",
                    "timestamps": torch.arange(views),
                    "images": images,
                    "cameras": cameras,
                }
            )
            index[f"k{first + scene}"] = f"{begin:06d}.torch"
        torch.save(entries, folder / f"{begin:06d}.torch")
    (folder / "index.json").write_text(json.dumps(index))


def small(**fields):
    return ViewsDataConfig(**({"size": (8, 8), "inputs": 2, "targets": 3, "batch": 2, "held_out": 0.4} | fields))


def test_resizing_and_cropping_keep_what_pixels_show():
    """A marked pixel stays where the moved intrinsics say that its ray goes."""
    marked = np.zeros((40, 90, 3), np.uint8)
    marked[12:20, 40:48] = 255
    given = torch.tensor([50.0, 52, 44, 21], dtype=torch.float64)
    ray = ((44 - 44) / 50.0, (16 - 21) / 52.0, 1.0)
    for size in ((16, 16), (20, 10), (40, 60)):
        image, moved = resize_and_crop(Image.fromarray(marked), given, size)
        assert image.shape == (3, *size)
        weight = image[0].double() / image[0].double().sum()
        rows, columns = (torch.arange(n) + 0.5 for n in size)
        found = [float((weight.sum(0) * columns).sum()), float((weight.sum(1) * rows).sum())]
        expected = [float(moved[0]) * ray[0] + float(moved[2]), float(moved[1]) * ray[1] + float(moved[3])]
        assert found == pytest.approx(expected, abs=0.15)


def test_what_is_transparent_shows_white(tmp_path):
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    layer.putpixel((1, 0), (0, 0, 0, 128))
    layer.save(tmp_path / "a.png")
    assert [open_picture(tmp_path / "a.png").getpixel((i, 0)) for i in (0, 1)] == [(255, 255, 255), (127, 127, 127)]
    Image.new("L", (1, 1), 77).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)


def test_a_folder_of_scenes_is_split_and_read(tmp_path):
    for i in range(12):
        write_scene(tmp_path / "all" / f"s{i}", seed=i)
    data = small(source=str(tmp_path / "all"))
    training, held_out = open_training(data), open_held_out(data)
    names = [{source.name(i) for i in range(len(source))} for source in (training, held_out)]
    assert len(names[0] | names[1]) == 12
    assert not names[0] & names[1]
    views = training.read(0, [4, 1])
    scene = int(training.files[0].split("/")[0][1:])
    torch.testing.assert_close(views["c2w"], poses(6, scene)[[4, 1]].float())
    assert views["image"].shape == (2, 3, 8, 8)
    assert views["image"].dtype == torch.uint8
    # 12 x 20 becomes 8 x 13 and loses 2 columns on the left
    assert views["fxfycxcy"][0].tolist() == pytest.approx([30 * 13 / 20, 31 * 8 / 12, 10 * 13 / 20 - 2, 6 * 8 / 12])
    assert training.fingerprint() != held_out.fingerprint()


def test_an_index_of_scenes_and_a_single_scene_are_read(tmp_path):
    for i in range(3):
        write_scene(tmp_path / f"s{i}", seed=i)
    index = tmp_path / "index.json"
    index.write_text(json.dumps(["s2/scene.json", "s0/scene.json"]))
    both = open_training(small(source=str(index), held_out_source=str(tmp_path / "s1" / "scene.json")))
    assert [both.name(i).split("/")[-2] for i in range(len(both))] == ["s2", "s0"]
    alone = open_held_out(small(source=str(index), held_out_source=str(tmp_path / "s1" / "scene.json")))
    assert len(alone) == 1
    # in a folder, the index is none of the scenes
    assert len(open_training(small(source=str(tmp_path), held_out_source=str(index)))) == 3


def test_chunks_of_realestate10k_are_read(tmp_path):
    write_chunks(tmp_path / "train", 5)
    write_chunks(tmp_path / "test", 3, first=50)
    data = small(source=str(tmp_path))
    training, held_out = open_training(data), open_held_out(data)
    assert (len(training), list(training.chunks), len(held_out)) == (5, [2, 2, 1], 3)
    assert held_out.scenes[2][1] == "k52"
    views = training.read(3, [5, 0])
    torch.testing.assert_close(views["c2w"], poses(6, 3)[[5, 0]].float(), rtol=0, atol=1e-5)
    # 18 x 32 becomes 8 x 14 and loses 3 columns on the left
    assert views["fxfycxcy"][0].tolist() == pytest.approx([0.9 * 14, 1.6 * 8, 0.5 * 14 - 3, 0.5 * 8])
    expected, _ = resize_and_crop(picture(305, (18, 32)), torch.zeros(4), (8, 8))
    assert (views["image"][0].float() - expected.float()).abs().mean() < 12
    # a folder of chunks by itself is split by keys
    one = small(source=str(tmp_path / "train"))
    keys = [{key for _, key in source.scenes} for source in (open_training(one), open_held_out(one))]
    assert keys[0] | keys[1] == {f"k{i}" for i in range(5)}
    assert not keys[0] & keys[1]


def test_cameras_of_a_batch_are_normalized_by_its_inputs_and_see_the_same(tmp_path):
    write_scene(tmp_path / "s", views=7)
    raw, mean = (
        Batches(open_training(data), data, seed=3)[5]
        for data in (small(source=str(tmp_path), held_out_source=str(tmp_path), normalize=kind) for kind in ("none", "mean"))
    )
    assert torch.equal(raw["target_image"], mean["target_image"])
    assert raw["c2w"].shape == (2, 2, 4, 4)
    assert raw["target_c2w"].shape == (2, 3, 4, 4)
    assert mean["c2w"][..., :3, 3].abs().amax((1, 2)).tolist() == pytest.approx([1, 1])
    relative = [invert_pose(x["c2w"][:, 0]) @ x["target_c2w"][:, 1] for x in (raw, mean)]
    torch.testing.assert_close(relative[0][:, :3, :3], relative[1][:, :3, :3], rtol=0, atol=1e-5)
    points = torch.tensor([[[0.0, 0, 5]]]).expand(2, 1, 3)
    assert project(points, mean["c2w"][:, 0], mean["fxfycxcy"][:, 0])[1].shape == (2, 1)


def test_an_epoch_goes_through_every_scene_once_chunks_nearby():
    order = scene_order((3, 2, 4, 1), 2, 0, 0)
    assert sorted(order.tolist()) == list(range(10))
    chunk = np.repeat(np.arange(4), (3, 2, 4, 1))[order]
    first = set(chunk[: sum((3, 2, 4, 1)[i] for i in dict.fromkeys(chunk.tolist()) if i in set(chunk[:3]))])
    assert len(first) <= 3
    assert order.tolist() != scene_order((3, 2, 4, 1), 2, 0, 1).tolist()


def test_views_are_drawn_once_each_and_from_a_span():
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = draw_views(rng, 40, 6, 9)
        assert len(set(drawn)) == 6
        assert max(drawn) - min(drawn) < 9
    assert sorted(draw_views(rng, 6, 6, 0)) == list(range(6))
    assert sorted(draw_views(rng, 7, 7, 30)) == list(range(7))


def test_batches_do_not_depend_on_who_reads_them(tmp_path):
    for i in range(5):
        write_scene(tmp_path / f"s{i}", seed=i)
    data = small(source=str(tmp_path), held_out_source=str(tmp_path))
    batches = Batches(open_training(data), data, seed=1)

    def first(workers, position, count):
        taken = []
        for batch, behind in load_batches(batches, workers, position):
            taken.append((batch, behind))
            if len(taken) == count:
                return taken

    alone, helped = first(0, None, 5), first(2, None, 5)
    later = first(0, alone[1][1], 3)
    for (a, place), (b, same) in [*zip(alone, helped, strict=True), *zip(alone[2:], later, strict=True)]:
        assert place == same
        for name in ("image", "target_image", "c2w", "target_fxfycxcy"):
            assert torch.equal(a[name], b[name])


def test_scenes_with_too_few_views_are_refused_or_left_out(tmp_path):
    write_scene(tmp_path / "long", views=6)
    write_scene(tmp_path / "short", views=4)
    refusing = small(source=str(tmp_path), held_out_source=str(tmp_path))
    batches = Batches(open_training(refusing), refusing, seed=0)
    with pytest.raises(ValueError, match=r"short/scene\.json has 4, and 2 \+ 3 are asked for"):
        [batches[i] for i in range(4)]
    with pytest.raises(ValueError, match=r"short/scene\.json has 4"):
        list(evaluation_batches(open_held_out(refusing), refusing))
    lenient = small(source=str(tmp_path), held_out_source=str(tmp_path), skip_short=True)
    batches = Batches(open_training(lenient), lenient, seed=0)
    assert {batches.scene(i) for i in range(6)} == {0}
    assert sum(len(batch["c2w"]) for batch in evaluation_batches(open_held_out(lenient), lenient)) == 1
    (tmp_path / "long" / "scene.json").unlink()
    batches = Batches(open_training(lenient), lenient, seed=0)
    with pytest.raises(ValueError, match="must have a scene of at least 5 views"):
        batches[0]


def mirrored(w2c):
    return [[-x for x in w2c[0]], *w2c[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2c": mirrored}, r"scene\.json: w2c must hold rigid motions.*determinant is -1"),
        ({"w2c": lambda m: [[2 * x for x in row] for row in m[:3]] + m[3:]}, "scaled or skewed"),
        ({"w2c": lambda m: m[:3]}, r"view 0's w2c must be 4 rows of 4 numbers; got rows of \[4, 4, 4\]"),
        (
            {"fx": lambda f: f / 20, "fy": lambda f: f / 12, "cx": lambda c: 0.5, "cy": lambda c: 0.5},
            "fractions of the image's size",
        ),
        ({"w2c": lambda m: [[None, *m[0][1:]], *m[1:]]}, r"view 0's intrinsics and w2c must be numbers; got None"),
        ({"w2c": lambda m: 1}, r"view 0's w2c must be 4 rows of 4 numbers; got rows of \[\]"),
        ({"fx": str}, r"view 0's intrinsics and w2c must be numbers; got '30\.0'"),
        ({"file_path": lambda name: "gone.png"}, r"gone\.png must be an image"),
    ],
)
def test_views_that_are_none_are_refused_with_their_scene(tmp_path, change, message):
    write_scene(tmp_path, **change)
    data = small(source=str(tmp_path), held_out_source=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_training(data).read(0, [0, 1])


def test_cameras_in_pixels_are_refused_in_chunks(tmp_path):
    write_chunks(tmp_path, 1)
    entries = torch.load(tmp_path / "000000.torch")
    entries[0]["cameras"][:, :4] *= 32
    torch.save(entries, tmp_path / "000000.torch")
    source = open_training(small(source=str(tmp_path), held_out_source=str(tmp_path)))
    with pytest.raises(ValueError, match=r"scene k0: cameras must begin with fx, fy, cx, cy as fractions"):
        source.read(0, [0])


@pytest.mark.parametrize("legacy", [False, True])
def test_chunks_are_read_in_either_format_and_refused_where_they_are_cut_short(tmp_path, legacy):
    write_chunks(tmp_path, 1)
    path = tmp_path / "000000.torch"
    data = small(source=str(tmp_path), held_out_source=str(tmp_path))
    expected = open_training(data).read(0, [3])["image"]
    load_chunk.cache_clear()
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(open_training(data).read(0, [3])["image"], expected)
    load_chunk.cache_clear()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000000\.torch must be a chunk of scenes that torch\.load reads safely"):
        open_training(data).read(0, [3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"fx": 1}]', "view 0 must have file_path; it has fx"),
        ("[{]", "must be a JSON file"),
    ],
)
def test_scene_files_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "scene.json").write_text(content)
    source = (
        open_training(small(source=str(tmp_path / "scene.json"), held_out_source=str(tmp_path))) if "fx" in content else None
    )
    with pytest.raises(ValueError, match=message):
        (source or open_training(small(source=str(tmp_path / "scene.json"), held_out_source=str(tmp_path)))).count(0)


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source must be 'procedural', or a folder or JSON file that exists"):
        open_training(small(source=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"data\.source must hold scenes for the split 'train'"):
        open_training(small(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": "median"}, "did you mean 'mean'"),
        ({"span": 4}, r"data\.span must be 0 or at least data\.inputs \+ data\.targets = 5"),
        ({"size": (4, 8)}, r"data\.size must be a height and a width of at least 6; got \[4, 8\]"),
        ({"inputs": 0}, r"data\.inputs must be at least 1"),
        ({"inputs": 14}, r"data\.procedural\.views must be at least data\.inputs \+ data\.targets = 17"),
        ({"held_out": 1.0}, r"data\.held_out must lie between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "link/outside.png", "out.png", 7])
def test_image_files_outside_of_their_scene_s_folder_are_refused_by_name(tmp_path, name):
    picture(0).save(tmp_path / "outside.png")
    scene = write_scene(tmp_path / "scenes" / "s0", file_path=lambda path: name if path == "1.png" else path)
    (scene.parent / "link").symlink_to(tmp_path)
    (scene.parent / "out.png").symlink_to(tmp_path / "outside.png")
    source = open_training(small(source=str(tmp_path / "scenes"), held_out_source=str(scene)))
    what = "view 1's file_path must be a path" if name == 7 else r"file_path must stay inside .*s0"
    for ask in (lambda: source.read(0, [1]), source.contents):
        with pytest.raises(ValueError, match=rf"scene\.json: {what}; got {re.escape(repr(name))}"):
            ask()


def test_lists_of_scenes_and_of_chunks_name_files_in_their_folder_alone(tmp_path):
    write_scene(tmp_path / "s0")
    write_chunks(tmp_path / "chunks", 2)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "index.json").write_text(json.dumps(["../s0/scene.json"]))
    (tmp_path / "chunks" / "index.json").write_text(json.dumps({"k0": "000000.torch", "k1": "../chunks/000000.torch"}))
    for where in ("lists/index.json", "chunks"):
        with pytest.raises(ValueError, match=r"index\.json: a .* must stay inside .*; got '\.\./"):
            open_training(small(source=str(tmp_path / where), held_out_source="procedural"))
    (tmp_path / "chunks" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json must be a JSON file"):
        open_training(small(source=str(tmp_path / "chunks"), held_out_source="procedural"))


def test_hidden_scenes_and_chunks_are_none(tmp_path):
    write_scene(tmp_path / "s0")
    write_scene(tmp_path / ".s1")
    (tmp_path / "s0" / "._scene.json").write_bytes(b"[{\0\5\x16\7")
    assert open_training(small(source=str(tmp_path), held_out_source="procedural")).files == ("s0/scene.json",)
    (tmp_path / "index.json").write_text("[]")
    (tmp_path / "._a.torch").write_bytes(b"\0\5\x16\7")
    assert not ViewChunks.recognizes(tmp_path)


def test_chunks_that_were_compressed_or_hold_something_else_are_refused(tmp_path):
    write_chunks(tmp_path, 1)
    path, source = tmp_path / "000000.torch", open_training(small(source=str(tmp_path), held_out_source="procedural"))
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    load_chunk.cache_clear()
    entries = torch.load(path)
    (tmp_path / "small").replace(path)
    with pytest.raises(
        ValueError, match=r"000000\.torch must be a chunk of scenes as torch\.save writes it; it is compressed"
    ):
        source.count(0)
    for change in ({"key": ["k0"]}, {"images": [b"x"]}, {"cameras": 3}, {"images": [torch.zeros(3)]}):
        torch.save([entries[0] | change], path)
        with pytest.raises(ValueError, match=r"000000\.torch must be a list of scenes with key, images"):
            source.count(0)


def test_scenes_are_told_by_their_files_and_pictures(tmp_path):
    scene = write_scene(tmp_path / "s0", views=2)
    found = open_training(small(source=str(tmp_path), held_out_source="procedural")).contents()
    assert set(found.files.values()) == {scene, scene.parent / "0.png", scene.parent / "1.png"}
    write_chunks(tmp_path / "train", 3)
    found = open_training(small(source=str(tmp_path), held_out_source="procedural")).contents()
    assert {path.name for path in found.files.values()} == {"index.json", "000000.torch", "000002.torch"}
