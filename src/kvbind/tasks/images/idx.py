"""Images in the format of MNIST: idx files, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import (
    EXPANDED_GIB,
    files_named,
    read_bytes,
)
from kvbind.tasks.images.stores import InMemory, Splits

if TYPE_CHECKING:
    pass


IDX_FILES = {"train": "train", "held_out": "t10k"}
"""The first word of the IDX files of each split, as MNIST and Fashion-MNIST name them."""


def holds_idx(folder: Path) -> bool:
    """Whether a folder is one of IDX files, such as MNIST's."""
    return folder.is_dir() and bool(files_named(folder, "*-images*ubyte*"))


def idx_splits(folder: Path, where: str, expanded_gib: float = EXPANDED_GIB) -> Splits:
    """The images and labels of a folder of IDX files, plain or compressed by gzip.

    Args:
        folder: the folder.
        where: what to call it.
        expanded_gib: the most GiB that a compressed file may expand to.

    Raises:
        ValueError: a file that is missing, is none, or is too large.
    """
    parts: dict[str, InMemory] = {}
    files: dict[str, Path] = {}
    for split, word in IDX_FILES.items():
        paths = [one_file(folder, f"{word}-{kind}*ubyte*") for kind in ("images", "labels")]
        files |= {f"{where.rstrip('/')}/{path.name}": path for path in paths}
        images, labels = (idx_array(path, expanded_gib) for path in paths)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"IDX files must hold images [N, height, width] and as many labels; {folder / word}-* hold arrays of shapes "
                f"{list(images.shape)} and {list(labels.shape)}"
            )
        parts[split] = InMemory(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))
    names = tuple(map(str, range(int(parts["train"].labels.max()) + 1)))
    return Splits(parts["train"], parts["held_out"], names, Contents(files))


def one_file(folder: Path, pattern: str) -> Path:
    """The first file of a folder whose name fits.

    Raises:
        ValueError: none does.
    """
    found = files_named(folder, pattern)
    if not found:
        raise ValueError(f"data.source {str(folder)!r} must hold a file {pattern}; it has none")
    return found[0]


def idx_array(path: Path, expanded_gib: float = EXPANDED_GIB) -> NDArray[np.uint8]:
    """The array of unsigned bytes that an IDX file holds: two zeros, type 8, rank, sizes (big-endian int32), bytes.

    Raises:
        ValueError: a file of another kind, one cut short, or a compressed one that is broken or too large.
    """
    content = read_bytes(path, expanded_gib)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} must be an IDX file of unsigned bytes; it starts with {content[:4].hex()!r}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content, dtype=">i4", count=content[3], offset=4)
    if len(content) - start != shape.prod(dtype=np.int64):
        raise ValueError(f"{path} must hold {' x '.join(map(str, shape))} bytes; it holds {len(content) - start}")
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(shape)
