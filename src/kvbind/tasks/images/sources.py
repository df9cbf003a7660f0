"""Where images come from, by the words of a configuration: held in memory whole, or read as they are asked for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import (
    ARROW_SUFFIXES,
    EXPANDED_GIB,
    PARQUET_SUFFIXES,
    PICTURE_SUFFIXES,
    files_below,
    files_named,
    folders_in,
    inside,
    is_named,
    read_bytes,
)
from kvbind.tasks.pictures import open_picture
from kvbind.tasks.tables import parquet_schema

if TYPE_CHECKING:
    from PIL.Image import Image

HUB, DIGITS = "hub:", "digits"

TRAIN_FOLDERS = ("train",)
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
"""Folders of class folders, in the order in which they are looked for."""

TABLES = ((".", "*.parquet"), ("data", "*.parquet"), (".", "*.arrow"))
"""Where a folder of tables has them: folders below it, and the files there."""

IDX_FILES = {"train": "train", "held_out": "t10k"}
"""The first word of the IDX files of each split, as MNIST and Fashion-MNIST name them."""

SPLIT_SEED = 0
"""Of the choice of what is held out, where a source has no split of its own: the same for every run."""


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
        return digest([*(name.encode() for name in self.names), self.labels.tobytes()])


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


@dataclass(frozen=True)
class ImageSource:
    """Images, and how to read them.

    Attributes:
        where: "digits", scikit-learn's 1,797 handwritten digits of 8 x 8; a folder of IDX files as MNIST and Fashion-MNIST
            come; a folder with a folder of images per class, in `train/` and `val/` or on its own; a folder of parquet or
            arrow files; or "hub:" and the name of a data set of the Hugging Face hub.
        held_out: the fraction of the images of each class that is held out, where the source has no split of its own.
        name: of hub data sets, the configuration.
        part: of tables, the split to train on.
        held_out_part: of tables, the split to evaluate on.
        image_column: of tables, that of the images.
        label_column: of tables, that of the classes.
        expanded_gib: the most GiB that a compressed file or an image may expand to.
    """

    where: str
    held_out: float = 0.2
    name: str | None = None
    part: str = "train"
    held_out_part: str = "validation"
    image_column: str = "image"
    label_column: str = "label"
    expanded_gib: float = EXPANDED_GIB

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1; got {self.held_out}")

    def open(self) -> Splits:
        """Open both splits.

        Raises:
            ValueError: a source that does not exist or does not hold what it should.
            ImportError: a source that needs a library which is not installed.
        """
        if self.where == DIGITS:
            images = digits()
            return self._divide(images, tuple("0123456789"), Contents(others={self.where: images.fingerprint()}))
        if self.where.startswith(HUB):
            return self._tables(self.where.removeprefix(HUB))
        path = Path(self.where).expanduser()
        if not path.is_dir():
            raise ValueError(
                f"data.source must be {DIGITS!r}, a folder of IDX files, of class folders or of parquet files, or "
                f"'{HUB}NAME' for a data set on the Hugging Face hub; got {self.where!r}, which does not exist"
            )
        if holds_idx(path):
            return idx_splits(path, self.where, self.expanded_gib)
        if any((path / below).is_dir() and files_named(path / below, pattern) for below, pattern in TABLES):
            return self._tables(str(path), path)
        return self._class_folders(path)

    def _contents(self, path: Path, names: Iterable[str]) -> Contents:
        """Files by their paths below the source."""
        return Contents({f"{self.where.rstrip('/')}/{name}": path / name for name in names})

    def _divide(self, images: Some, names: tuple[str, ...], contents: Contents) -> Splits:
        """Hold out a fraction of each class, the same whatever the run's seed."""
        labels, held_out = images.labels, np.zeros(len(images.labels), dtype=bool)
        rng = np.random.default_rng(SPLIT_SEED)
        for label in range(len(names)):
            rows = np.flatnonzero(labels == label)
            held_out[rng.permutation(rows)[: round(len(rows) * self.held_out)]] = True
        if not held_out.any():  # of few images, one of each class that has others
            for label in range(len(names)):
                rows = np.flatnonzero(labels == label)
                held_out[rows[1:][-1:]] = True
        if not held_out.any() or held_out.all():
            raise ValueError(
                f"data.held_out must leave images for training and evaluation; got {self.held_out} of {len(labels)} of "
                f"{self.where!r} (where folders of classes lie in train/ and val/, those are the two)"
            )
        train, evaluated = (images.select(np.flatnonzero(rows)) for rows in (~held_out, held_out))
        return Splits(train, evaluated, names, contents)

    def _class_folders(self, path: Path) -> Splits:
        train = next((path / name for name in TRAIN_FOLDERS if (path / name).is_dir()), None)
        held_out = next((path / name for name in HELD_OUT_FOLDERS if (path / name).is_dir()), None)
        if held_out and not train and folders_in(held_out):
            raise ValueError(
                f"data.source must hold the folder {TRAIN_FOLDERS[0]}/ beside {held_out.name}/; {str(path)!r} does not"
            )
        home = train or path
        names = tuple(folders_in(home))
        if not names:
            raise ValueError(
                "data.source must hold IDX files, parquet files, or a folder of images per class, in train/ and val/ or on "
                f"their own; {str(path)!r} holds none"
            )
        found = replace(files_in(home, names), expanded_gib=self.expanded_gib)
        evaluated = replace(files_in(held_out, names), expanded_gib=self.expanded_gib) if train and held_out else None
        files = [part.root / name for part in (found, evaluated) if part for name in part.names]
        contents = self._contents(path, (file.relative_to(path).as_posix() for file in files))
        return Splits(found, evaluated, names, contents) if evaluated else self._divide(found, names, contents)

    def _tables(self, name: str, folder: Path | None = None) -> Splits:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"data.source {self.where!r} is read through the library 'datasets', which is not installed; install kvbind "
                "with its extra 'data', or datasets itself"
            ) from error
        if folder is None:
            contents = Contents(others={self.where: str(datasets.load_dataset_builder(name, self.name).hash)})
        else:
            contents = self._contents(folder, files_below(folder, ARROW_SUFFIXES))
            for path in contents.files.values():
                if is_named(path.name, PARQUET_SUFFIXES):
                    parquet_schema(path)
        try:
            parts = datasets.load_dataset(name, self.name)
        except datasets.exceptions.DatasetGenerationError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"data.source must hold tables of the same columns; {self.where!r} does not: {reason}"
            ) from error
        if self.part not in parts:
            raise ValueError(f"data.part must be a split of {self.where}: {', '.join(parts)}; got {self.part!r}")
        features = parts[self.part].features
        for key in ("image_column", "label_column"):
            if getattr(self, key) not in features:
                raise ValueError(
                    f"data.{key} must be a column of {self.where}: {', '.join(features)}; got {getattr(self, key)!r}"
                )
        label = features[self.label_column]
        kind = getattr(label, "dtype", label)
        if "int" not in str(kind):
            raise ValueError(f"data.label_column must hold the classes as integers; {self.label_column!r} holds {kind}")
        train = self._rows(parts[self.part], folder)
        names = tuple(getattr(label, "names", None) or map(str, range(int(train.labels.max()) + 1)))
        if self.held_out_part in parts:
            return Splits(train, self._rows(parts[self.held_out_part], folder), names, contents)
        if len(parts) > 1:
            raise ValueError(
                f"data.held_out_part must be a split of {self.where}: {', '.join(parts)}; got {self.held_out_part!r}"
            )
        return self._divide(train, names, contents)

    def _rows(self, table: Any, folder: Path | None) -> ImageRows:
        import datasets

        # a table that says nothing of images holds their bytes; decoding is `open_picture`'s, as of any other image
        pictures = table.cast_column(self.image_column, datasets.Image(decode=False))
        labels = np.asarray(table[self.label_column][:], dtype=np.int64)
        return ImageRows(pictures, self.image_column, labels, self.where, folder, self.expanded_gib)


def holds_idx(folder: Path) -> bool:
    """Whether a folder is one of IDX files, such as MNIST's."""
    return folder.is_dir() and bool(files_named(folder, "*-images*ubyte*"))


def digits() -> InMemory:
    """Scikit-learn's handwritten digits, `[1797, 1, 8, 8]`; their 17 grey levels spread over 0 to 255.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data.source 'digits' needs the package 'scikit-learn', which is not installed; install kvbind with its extra "
            "'vision', or scikit-learn itself"
        ) from error
    found = load_digits()
    images = torch.from_numpy((found.images * (255 / 16)).round().astype(np.uint8))
    return InMemory(images[:, None], torch.from_numpy(found.target.astype(np.int64)))


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


def files_in(folder: Path, names: tuple[str, ...]) -> ImageFiles:
    """The image files of a folder's class folders, in the order of their names.

    Args:
        folder: of class folders, and of no others.
        names: of the classes.

    Raises:
        ValueError: a class folder that is not among `names`, or no images.
    """
    for name in folders_in(folder):
        if name not in names:
            raise ValueError(f"{folder / name} must be a class that training has: {', '.join(names)}")
    files, labels = [], []
    for label, name in enumerate(names):
        found = [f"{name}/{below}" for below in files_below(folder / name, PICTURE_SUFFIXES)]
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"data.source must hold images ({', '.join(PICTURE_SUFFIXES)}); {folder} has none in its class folders"
        )
    return ImageFiles(folder, tuple(files), np.asarray(labels, dtype=np.int64))


def digest(parts: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits that differ where the parts do."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()[:16]
