"""The source of RealEstate10K in chunks of tensors, the form in which pixelSplat (arXiv 2312.12337) distributes it.

A folder holds `index.json`, which names the chunk of each scene, and the chunks: files of `torch.save`, each a list of
dicts with "key", "images" (uint8 tensors, the bytes of a JPEG each) and "cameras" `[n, 18]`: fx, fy, cx, cy as fractions of
the image's width and height, two zeros, and the 3x4 matrix from world to camera by rows.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kvbind.models.lact_nvs.cameras import NORMALIZED_FOCAL, invert_pose
from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import split_of
from kvbind.tasks.files import EXPANDED_GIB, files_named, inside, load_json
from kvbind.tasks.views.pictures import open_picture, resize_and_crop
from kvbind.tasks.views.scenes import SceneSource, SceneViews, Split, check_cameras, digest

INDEX = "index.json"
FOLDERS: dict[Split, str] = {"train": "train", "held_out": "test"}
"""The folders of the two splits, where there are such."""


class ViewChunks(SceneSource):
    """Scenes in chunks.

    Args:
        root: the folder that was asked for.
        scenes: the path of each scene's chunk and its key, scenes of a chunk together.
        size: height and width of the images that are read.
        expanded_gib: the most GiB that an image may expand to.
    """

    def __init__(
        self, root: Path, scenes: Sequence[tuple[Path, str]], size: tuple[int, int], expanded_gib: float = EXPANDED_GIB
    ) -> None:
        by_chunk: dict[Path, list[str]] = {}
        for path, key in scenes:
            by_chunk.setdefault(path, []).append(key)
        self.what, self.image_size, self.expanded_gib = str(root), size, expanded_gib
        self.scenes = [(path, key) for path, keys in by_chunk.items() for key in keys]
        self.chunks = [len(keys) for keys in by_chunk.values()]

    @staticmethod
    def recognizes(path: Path) -> bool:
        """Whether a folder holds chunks, or the splits' folders of them."""
        return any(has_chunks(folder) for folder in (path, *(path / name for name in FOLDERS.values())))

    @classmethod
    def open(
        cls, path: Path, split: Split | None, held_out: float, size: tuple[int, int], expanded_gib: float = EXPANDED_GIB
    ) -> Self:
        """The scenes of a split.

        Args:
            path: a folder of chunks, or its parent with `train/` and `test/`.
            split: which; None for all.
            held_out: the fraction that is held out, by a hash of each scene's key, where there are no such folders.
            size: height and width of the images that are read.
            expanded_gib: the most GiB that an image may expand to.
        """
        if has_chunks(path):
            scenes = indexed(path)
            own = set(split_of([key for _, key in scenes], split, held_out))
            return cls(path, [scene for scene in scenes if scene[1] in own], size, expanded_gib)
        folders = [path / name for kind, name in FOLDERS.items() if split in (kind, None)]
        return cls(
            path, [scene for folder in folders if has_chunks(folder) for scene in indexed(folder)], size, expanded_gib
        )

    def name(self, scene: int) -> str:
        path, key = self.scenes[scene]
        return f"{path}, scene {key}"

    def count(self, scene: int) -> int:
        return len(self._entry(scene)["images"])

    def read(self, scene: int, views: Sequence[int]) -> SceneViews:
        entry, what = self._entry(scene), self.name(scene)
        cameras = entry["cameras"][list(views)].double()
        fractions = cameras[:, :4]
        if not bool((fractions[:, :2].abs() < NORMALIZED_FOCAL).all()):
            raise ValueError(
                f"{what}: cameras must begin with fx, fy, cx, cy as fractions of the image's size; got "
                f"{[round(x, 4) for x in fractions[0].tolist()]}"
            )
        w2c = torch.eye(4, dtype=torch.float64).repeat(len(views), 1, 1)
        w2c[:, :3] = cameras[:, 6:].unflatten(1, (3, 4))
        images, intrinsics = [], []
        for view, fraction in zip(views, fractions, strict=True):
            stored = io.BytesIO(entry["images"][view].numpy().tobytes())
            picture = open_picture(stored, f"{what}, view {view}", expanded_gib=self.expanded_gib)
            given = fraction * fraction.new_tensor([picture.width, picture.height] * 2)
            image, moved = resize_and_crop(picture, given, self.image_size)
            images.append(image)
            intrinsics.append(moved)
        fxfycxcy = torch.stack(intrinsics)
        check_cameras(what, "w2c", w2c, fxfycxcy)
        return {"image": torch.stack(images), "c2w": invert_pose(w2c).float(), "fxfycxcy": fxfycxcy.float()}

    def fingerprint(self) -> str:
        return digest(f"{path.name}:{key}" for path, key in self.scenes)

    def contents(self) -> Contents:
        paths = dict.fromkeys(path for path, _ in self.scenes)
        indices = dict.fromkeys(path.parent / INDEX for path in paths)
        return Contents({str(path): path for path in (*indices, *paths)})

    def _entry(self, scene: int) -> dict[str, Any]:
        path, key = self.scenes[scene]
        entries = load_chunk(path)
        if key not in entries:
            raise ValueError(f"{path} must hold scene {key}, as {INDEX} says; it holds {len(entries)} others")
        entry = entries[key]
        shape = list(entry["cameras"].shape)
        if shape != [len(entry["images"]), 18]:
            raise ValueError(f"{path}, scene {key}: cameras must be [{len(entry['images'])}, 18]; got {shape}")
        return entry


def has_chunks(folder: Path) -> bool:
    """Whether a folder itself holds chunks and their index."""
    return (folder / INDEX).is_file() and bool(files_named(folder, "*.torch"))


def indexed(folder: Path) -> list[tuple[Path, str]]:
    """The scenes that a folder's index lists: the path of each one's chunk, and its key.

    Raises:
        ValueError: an index that is none, or that names files outside of its folder.
    """
    index = load_json(folder / INDEX)
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{folder / INDEX} must map each scene's key to the file of its chunk")
    chunks = {file: inside(folder, file, f"{folder / INDEX}: a chunk") for file in dict.fromkeys(index.values())}
    return [(chunks[file], key) for key, file in index.items()]


@lru_cache(maxsize=32)
def load_chunk(path: Path) -> dict[str, dict[str, Any]]:
    """A chunk's scenes by key. Tensors stay in the file until they are looked at, where its format allows it.

    Raises:
        ValueError: a file that is missing or no chunk.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a chunk of scenes, as {INDEX} says; there is no such file")
    try:
        # the format of before PyTorch 1.6 is no zip file, and cannot be mapped into memory
        mapped = zipfile.is_zipfile(path)
        if mapped and any(part.compress_type != zipfile.ZIP_STORED for part in zipfile.ZipFile(path).infolist()):
            raise ValueError(f"{path} must be a chunk of scenes as torch.save writes it; it is compressed")
        entries = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise ValueError(f"{path} must be a chunk of scenes that torch.load reads safely; {reason}") from error
    if not isinstance(entries, list) or not all(map(_is_scene, entries)):
        raise ValueError(f"{path} must be a list of scenes with key, images (tensors of bytes) and cameras (a tensor)")
    return {entry["key"]: entry for entry in entries}


def _is_scene(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or not isinstance(entry.get("images"), list):
        return False
    images = all(isinstance(image, Tensor) and image.dtype == torch.uint8 for image in entry["images"])
    return images and isinstance(entry.get("cameras"), Tensor) and entry["cameras"].is_floating_point()
