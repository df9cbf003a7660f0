"""Images where they are: in memory, in files, in the rows of a table; and the two splits of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import EXPANDED_GIB, inside, name_bytes
from kvbind.tasks.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image


class Readable(Protocol):
    """Images that are read one by one."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each, `[N]`."""
        ...

    def read(self, index: int) -> Image:
        """One image, in its own size, as 8-bit RGB.

        Raises:
            ValueError: it cannot be read as one; the message names it.
        """
        ...

    def fingerprint(self) -> str:
        """What differs where the images do."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images of one size, held as tensors.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        classes: int64 `[N]`.
    """

    images: Tensor
    classes: Tensor

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each, `[N]`."""
        return self.classes.numpy()

    def select(self, rows: NDArray[np.int64]) -> InMemory:
        """Some of them."""
        return InMemory(self.images[rows], self.classes[rows])

    def fingerprint(self) -> str:
        """A hash of every pixel and label."""
        return digest([self.images.numpy().tobytes(), self.labels.tobytes()])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files.

    Attributes:
        root: the folder that their names start from.
        names: of the files.
        labels: the class of each, `[N]`.
        expanded_gib: the most GiB that an image may take.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    expanded_gib: float = EXPANDED_GIB

    def read(self, index: int) -> Image:
        return open_picture(self.root / self.names[index], upright=True, expanded_gib=self.expanded_gib)

    def select(self, rows: NDArray[np.int64]) -> ImageFiles:
        """Some of them."""
        return replace(self, names=tuple(self.names[row] for row in rows), labels=self.labels[rows])

    def fingerprint(self) -> str:
        """A hash of every name and label; files are not opened."""
        return digest([*(name_bytes(name) for name in self.names), self.labels.tobytes()])


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of a table that the `datasets` library opened.

    Attributes:
        table: the table.
        column: that of the images.
        labels: the class of each row, `[N]`.
        what: the table's name.
        folder: of a local table, the one that image files which it names must lie in.
        expanded_gib: the most GiB that an image may take.
    """

    table: Any
    column: str
    labels: NDArray[np.int64]
    what: str
    folder: Path | None = None
    expanded_gib: float = EXPANDED_GIB

    def read(self, index: int) -> Image:
        stored, what = self.table[index][self.column], f"row {index + 1} of {self.what}"
        if stored is None:
            raise ValueError(f"data.image_column must hold images; {self.column!r} of {what} holds null")
        file: Path | io.BytesIO
        if stored["bytes"] is not None:
            file = io.BytesIO(stored["bytes"])
        else:
            file = inside(self.folder, stored["path"], what) if self.folder else Path(stored["path"])
        return open_picture(file, what, upright=True, expanded_gib=self.expanded_gib)

    def select(self, rows: NDArray[np.int64]) -> ImageRows:
        """Some of them."""
        return replace(self, table=self.table.select(rows), labels=self.labels[rows])

    def fingerprint(self) -> str:
        """The table's name and a hash of the labels; images are not opened."""
        return f"{self.what} {digest([self.labels.tobytes()])}"


Images = InMemory | ImageFiles | ImageRows

Some = TypeVar("Some", InMemory, ImageFiles, ImageRows)


@dataclass(frozen=True)
class Splits:
    """A source, opened.

    Attributes:
        train: images to train on.
        held_out: images to evaluate on.
        names: of the classes.
        contents: what they are read from.

    Raises:
        ValueError: a label that is no class.
    """

    train: Images
    held_out: Images
    names: tuple[str, ...]
    contents: Contents = field(default_factory=Contents)

    def __post_init__(self) -> None:
        # on a GPU such a label would end the process long after, and without saying why
        for part, images in (("training", self.train), ("held-out", self.held_out)):
            low, high = int(images.labels.min(initial=0)), int(images.labels.max(initial=0))
            if low < 0 or high >= len(self.names):
                raise ValueError(
                    f"data.source must hold labels from 0 to {len(self.names) - 1}, the classes of training; its {part} "
                    f"images have labels from {low} to {high}"
                )


def digest(parts: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits that differ where the parts do."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()[:16]
