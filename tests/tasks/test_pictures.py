"""Picture files of every kind, as both tasks that read them see them."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kvbind.tasks.images.loading import Reads
from kvbind.tasks.images.sources import files_in
from kvbind.tasks.pictures import open_picture
from kvbind.tasks.views.posed_images import PosedImages

GREY = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
WIDE = GREY.astype(np.uint16) * 257
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], -1)


def by_images(file):
    folder = file.parent.parent
    reads = Reads(files_in(folder, (file.parent.name,)), lambda image, seed: image, 3, 0)
    return reads[0, reads.images.names.index(f"{file.parent.name}/{file.name}")][0]


def by_views(file):
    width, height = Image.open(file).size
    eye = np.eye(4).tolist()
    entry = {"file_path": file.name, "fx": 9, "fy": 9, "cx": width / 2, "cy": height / 2, "w2c": eye}
    scene = file.with_suffix(".json")
    scene.write_text(json.dumps([entry]))
    return PosedImages(file.parent, [scene.name], (height, width)).read(0, [0])["image"][0]


READERS = pytest.mark.parametrize("read", [by_images, by_views])


def shows(pixels, expected):
    return torch.equal(pixels, torch.from_numpy(np.ascontiguousarray(expected)).permute(2, 0, 1))


def folder_for(tmp_path):
    (tmp_path / "a").mkdir(exist_ok=True)
    return tmp_path / "a"


def png(path, pixels, size=None):
    """A PNG file, `[h, w, channels]`, that says it is of `size` where that is given."""
    width, height = size or pixels.shape[1::-1]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = {b"IHDR": head, b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts.items())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def twelve_bits(path):
    """The grey picture as a TIFF file of 12 bits a pixel."""
    levels = np.rint(GREY / 255 * 4095).astype(int).reshape(-1, 2)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in levels.tolist())
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(data)}
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


@READERS
@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm.png", "big-endian.tif", "float.tif", "8.png"])
def test_a_grey_picture_is_the_same_at_any_depth(tmp_path, read, name):
    file = folder_for(tmp_path) / name
    if name == "float.tif":
        Image.fromarray((GREY / 255).astype(np.float32)).save(file)
    elif name == "big-endian.tif":
        Image.frombytes("I;16B", (8, 8), WIDE.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(GREY if name == "8.png" else WIDE).save(file, "PPM" if "pgm" in name else None)
    assert shows(read(file), np.repeat(GREY[..., None], 3, 2))


@READERS
def test_a_picture_of_twelve_bits_is_as_bright_as_one_of_eight(tmp_path, read):
    twelve_bits(folder_for(tmp_path) / "12.tif")
    assert shows(read(tmp_path / "a" / "12.tif"), np.repeat(GREY[..., None], 3, 2))


@READERS
def test_a_grey_tiff_may_have_white_at_zero(tmp_path, read):
    for name, pixels in (("8", 255 - GREY), ("16", 65535 - WIDE)):
        file = folder_for(tmp_path) / f"{name}.tif"
        Image.fromarray(pixels).save(file)
        content = bytearray(file.read_bytes())
        at = content.index(struct.pack("<HHI", 262, 3, 1))
        content[at + 8 : at + 10] = struct.pack("<H", 0)
        file.write_bytes(content)
        assert shows(read(file), np.repeat(GREY[..., None], 3, 2)), name


@READERS
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_and_alpha_of_sixteen_bits_are_read(tmp_path, read, channels):
    deep = COLOUR.astype(np.uint16) * 257
    alpha = np.full((8, 8, 1), 65535, np.uint16)
    pixels = {2: np.concatenate([WIDE[..., None], alpha], 2), 3: deep, 4: np.concatenate([deep, alpha], 2)}[channels]
    png(folder_for(tmp_path) / "x.png", pixels)
    assert shows(read(tmp_path / "a" / "x.png"), np.repeat(GREY[..., None], 3, 2) if channels == 2 else COLOUR)


@READERS
def test_what_is_transparent_shows_white_however_it_is_said(tmp_path, read):
    folder, expected = folder_for(tmp_path), COLOUR.copy()
    expected[0] = 255
    opaque = np.full((8, 8), 255, np.uint8)
    opaque[0] = 0
    Image.fromarray(np.dstack([COLOUR, opaque])).save(folder / "alpha.png")
    assert shows(read(folder / "alpha.png"), expected)
    grey = np.repeat(GREY[..., None], 3, 2).copy()
    grey[0] = 255
    Image.fromarray(np.dstack([GREY, opaque])).save(folder / "grey.png")
    assert shows(read(folder / "grey.png"), grey)
    grey = np.repeat(GREY[..., None], 3, 2).copy()
    grey[0, 0] = 255
    Image.fromarray(WIDE).save(folder / "key.png", transparency=0)
    assert shows(read(folder / "key.png"), grey)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    palette.save(folder / "palette.png", transparency=0)
    green = np.full((8, 8, 3), (0, 255, 0), np.uint8)
    green[0, 0] = 255
    assert shows(read(folder / "palette.png"), green)


@READERS
@pytest.mark.parametrize("name", ["ink.tif", "ink.jpg"])
def test_ink_becomes_light(tmp_path, read, name):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(folder_for(tmp_path) / name, quality=100)
    assert shows(read(tmp_path / "a" / name), np.full((8, 8, 3), (255, 0, 0), np.uint8))


def test_photos_are_turned_upright_and_pixels_that_cameras_count_stay_where_they_are(tmp_path):
    file, tall = folder_for(tmp_path) / "x.png", COLOUR[:, :6]
    exif = Image.Exif()
    exif[0x0112] = 6  # seen turned by 90 degrees clockwise
    Image.fromarray(tall).save(file, exif=exif)
    assert shows(by_images(file), np.rot90(tall, -1))
    assert shows(by_views(file), tall)


@READERS
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.float32), "floating point pixels must lie between 0 and 1; they lie between 0 and 252"),
        (
            np.full((8, 8), np.nan, np.float32),
            "floating point pixels must lie between 0 and 1; they lie between nan and nan",
        ),
        (GREY.astype(np.int32), "integers of 32 bits or with a sign have no known white"),
    ],
)
def test_pictures_whose_white_is_not_known_are_refused_by_name(tmp_path, read, pixels, message):
    Image.fromarray(pixels).save(folder_for(tmp_path) / "x.tif")
    with pytest.raises(ValueError, match=rf"x\.tif must be an image; {message}"):
        read(tmp_path / "a" / "x.tif")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_colour_spaces_and_broken_files_are_refused_by_name(tmp_path):
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    with pytest.raises(ValueError, match=r"lab\.tif must be an image; CIE Lab"):
        open_picture(tmp_path / "lab.tif")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "tif", "bmp", "webp"):
        Image.fromarray(noise).save(tmp_path / f"x.{suffix}")
        whole = (tmp_path / f"x.{suffix}").read_bytes()
        for content in (whole[: len(whole) // 2], whole[:10], b"", b"no picture"):
            (tmp_path / f"x.{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=rf"x\.{suffix} must be an image"):
                open_picture(tmp_path / f"x.{suffix}")
    with pytest.raises(ValueError, match=r"none\.png must be an image; .*No such file"):
        open_picture(tmp_path / "none.png")


def test_pictures_expand_as_far_as_an_option_says(tmp_path):
    png(tmp_path / "x.png", WIDE[..., None], size=(20000, 20000))
    most = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"its 20000 x 20000 pixels take more than 1 GiB, which data\.expanded_gib raises"):
        open_picture(tmp_path / "x.png")
    assert most == Image.MAX_IMAGE_PIXELS
    Image.new("1", (100, 100)).save(tmp_path / "y.png")
    assert open_picture(tmp_path / "y.png", expanded_gib=40000 / 2**30).size == (100, 100)
    with pytest.raises(ValueError, match=r"data\.expanded_gib"):
        open_picture(tmp_path / "y.png", expanded_gib=39999 / 2**30)
