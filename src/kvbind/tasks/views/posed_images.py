"""The source of posed images: per scene a JSON file that lists image files with their cameras, as LaCT's release reads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from kvbind.models.lact_nvs.cameras import invert_pose
from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import split_of
from kvbind.tasks.files import EXPANDED_GIB, SCENE_SUFFIXES, files_below, inside, load_json
from kvbind.tasks.views.pictures import open_picture, resize_and_crop
from kvbind.tasks.views.scenes import SceneSource, SceneViews, Split, check_cameras, digest

INTRINSICS = ("fx", "fy", "cx", "cy")


class PosedImages(SceneSource):
    """Scenes, each a JSON file: a list of `{"file_path", "fx", "fy", "cx", "cy", "w2c"}`.

    `file_path` is relative to the file, and below its folder; intrinsics are in pixels of the image as it is stored; `w2c`
    is a 4x4 matrix, by rows.

    Args:
        root: the folder below which scenes are named.
        files: of the scenes, below it.
        size: height and width of the images that are read.
        expanded_gib: the most GiB that an image file may expand to.
    """

    def __init__(self, root: Path, files: Sequence[str], size: tuple[int, int], expanded_gib: float = EXPANDED_GIB) -> None:
        self.root, self.files, self.image_size, self.expanded_gib = root, tuple(files), size, expanded_gib
        self.what, self.chunks = str(root), (len(self.files),)

    @classmethod
    def open(
        cls, path: Path, split: Split | None, held_out: float, size: tuple[int, int], expanded_gib: float = EXPANDED_GIB
    ) -> Self:
        """The scenes of a split.

        Args:
            path: a scene's file, a JSON file that lists the files of scenes, or a folder of scenes.
            split: which, by a hash of each file's path; None for all.
            held_out: the fraction that is held out.
            size: height and width of the images that are read.
            expanded_gib: the most GiB that an image file may expand to.

        Raises:
            ValueError: a file that is neither, or a list of files that leave its folder.
        """
        if path.is_dir():
            root = path
            names = [name for name in files_below(path, SCENE_SUFFIXES) if _begins_as_scene(path / name)]
        else:
            root, content = path.parent, load_json(path)
            whole = isinstance(content, list) and bool(content) and all(isinstance(x, str) for x in content)
            names = content if whole else [path.name]
            for name in names:
                inside(root, name, f"{path}: a scene's file")
        return cls(root, split_of(names, split, held_out), size, expanded_gib)

    def name(self, scene: int) -> str:
        return str(self.root / self.files[scene])

    def count(self, scene: int) -> int:
        return len(scene_entries(self.root / self.files[scene]))

    def read(self, scene: int, views: Sequence[int]) -> SceneViews:
        path = self.root / self.files[scene]
        entries = [scene_entries(path)[i] for i in views]
        w2c = torch.tensor([entry["w2c"] for entry in entries], dtype=torch.float64)
        given = torch.tensor([[entry[name] for name in INTRINSICS] for entry in entries], dtype=torch.float64)
        check_cameras(str(path), "w2c", w2c, given)
        images, intrinsics = [], []
        for entry, fxfycxcy in zip(entries, given, strict=True):
            # as it is stored: that is how intrinsics count pixels
            picture = open_picture(image_file(path, entry), expanded_gib=self.expanded_gib)
            image, moved = resize_and_crop(picture, fxfycxcy, self.image_size)
            images.append(image)
            intrinsics.append(moved)
        return {
            "image": torch.stack(images),
            "c2w": invert_pose(w2c).float(),
            "fxfycxcy": torch.stack(intrinsics).float(),
        }

    def fingerprint(self) -> str:
        return digest(f"{name}:{(self.root / name).stat().st_size}" for name in self.files)

    def contents(self) -> Contents:
        files = {}
        for name in self.files:
            path = self.root / name
            files[str(path)] = path
            files |= {str(picture): picture for picture in (image_file(path, entry) for entry in scene_entries(path))}
        return Contents(files)


def image_file(scene: Path, entry: dict[str, Any]) -> Path:
    """The image file of a view.

    Raises:
        ValueError: it leaves the folder of its scene.
    """
    return inside(scene.parent, entry["file_path"], f"{scene}: file_path")


@lru_cache(maxsize=256)
def scene_entries(path: Path) -> list[dict[str, Any]]:
    """The views that a scene's file lists.

    Raises:
        ValueError: a file that is no scene; the message says what is missing.
    """
    entries = load_json(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must hold a scene: a list of views, each with file_path, fx, fy, cx, cy and w2c")
    for i, entry in enumerate(entries):
        for name in ("file_path", *INTRINSICS, "w2c"):
            if name not in entry:
                raise ValueError(f"{path}: view {i} must have {name}; it has {', '.join(entry) or 'nothing'}")
        if not isinstance(entry["file_path"], str):
            raise ValueError(f"{path}: view {i}'s file_path must be a path; got {entry['file_path']!r}")
        rows = entry["w2c"] if isinstance(entry["w2c"], list) else []
        shape = [len(row) if isinstance(row, list) else 0 for row in rows]
        if shape != [4, 4, 4, 4]:
            raise ValueError(f"{path}: view {i}'s w2c must be 4 rows of 4 numbers; got rows of {shape}")
        for x in (*(entry[name] for name in INTRINSICS), *(x for row in entry["w2c"] for x in row)):
            if not isinstance(x, int | float):
                raise ValueError(f"{path}: view {i}'s intrinsics and w2c must be numbers; got {x!r}")
    return entries


def _begins_as_scene(path: Path) -> bool:
    """Whether a file begins as a list of mappings, which an index of scenes does not."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(file.read(256).split()).startswith("[{")
