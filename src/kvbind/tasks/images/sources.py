"""Where images come from, by the words of a configuration: held in memory whole, or read as they are asked for."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

HUB = "hub:"
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
"""The files of a class folder that are read."""

TRAIN_FOLDERS = ("train",)
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
"""Folders of class folders, in the order in which they are looked for."""

TABLES = ("*.parquet", "data/*.parquet", "*.arrow")
"""Where a folder of tables has them."""

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
        """One image, in its own size and mode."""
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
class Files:
    """Image files.

    Attributes:
        root: the folder that their names start from.
        names: of the files.
        labels: the class of each, `[N]`.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]

    def read(self, index: int) -> Image:
        from PIL import Image

        with Image.open(self.root / self.names[index]) as image:
            image.load()
            return image

    def select(self, rows: NDArray[np.int64]) -> Files:
        """Some of them."""
        return Files(self.root, tuple(self.names[row] for row in rows), self.labels[rows])

    def fingerprint(self) -> str:
        """A hash of every name and label; files are not opened."""
        return digest([*(name.encode() for name in self.names), self.labels.tobytes()])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table that the `datasets` library opened.

    Attributes:
        table: the table.
        column: that of the images.
        labels: the class of each row, `[N]`.
        what: the table's name.
    """

    table: Any
    column: str
    labels: NDArray[np.int64]
    what: str

    def read(self, index: int) -> Image:
        image: Image = self.table[index][self.column]
        return image

    def select(self, rows: NDArray[np.int64]) -> Rows:
        """Some of them."""
        return Rows(self.table.select(rows), self.column, self.labels[rows], self.what)

    def fingerprint(self) -> str:
        """The table's name and a hash of the labels; images are not opened."""
        return f"{self.what} {digest([self.labels.tobytes()])}"


Images = InMemory | Files | Rows
Some = TypeVar("Some", InMemory, Files, Rows)


@dataclass(frozen=True)
class Splits:
    """A source, opened.

    Attributes:
        train: images to train on.
        held_out: images to evaluate on.
        names: of the classes.

    Raises:
        ValueError: a label that is no class.
    """

    train: Images
    held_out: Images
    names: tuple[str, ...]

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
class Source:
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
    """

    where: str
    held_out: float = 0.2
    name: str | None = None
    part: str = "train"
    held_out_part: str = "validation"
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1; got {self.held_out}")

    def open(self) -> Splits:
        """Open both splits.

        Raises:
            ValueError: a source that does not exist or does not hold what it should.
            ImportError: a source that needs a library which is not installed.
        """
        if self.where == "digits":
            return self._divide(digits(), tuple("0123456789"))
        path = Path(self.where).expanduser()
        if self.where.startswith(HUB):
            return self._tables(self.where.removeprefix(HUB))
        if not path.is_dir():
            raise ValueError(
                f"data.source must be 'digits', a folder of IDX files, of class folders or of parquet files, or '{HUB}NAME' "
                f"for a data set on the Hugging Face hub; got {self.where!r}, which does not exist"
            )
        if any(path.glob("*-images*ubyte*")):
            return idx_splits(path)
        if any(any(path.glob(pattern)) for pattern in TABLES):
            return self._tables(str(path))
        return self._class_folders(path)

    def _divide(self, images: Some, names: tuple[str, ...]) -> Splits:
        """Hold out a fraction of each class, the same whatever the run's seed."""
        labels, held_out = images.labels, np.zeros(len(images.labels), dtype=bool)
        rng = np.random.default_rng(SPLIT_SEED)
        for label in range(len(names)):
            rows = np.flatnonzero(labels == label)
            held_out[rng.permutation(rows)[: round(len(rows) * self.held_out)]] = True
        if not held_out.any() or held_out.all():
            raise ValueError(
                f"data.held_out must leave images for training and evaluation; got {self.held_out} of {len(labels)}"
            )
        return Splits(images.select(np.flatnonzero(~held_out)), images.select(np.flatnonzero(held_out)), names)

    def _class_folders(self, path: Path) -> Splits:
        train = next((path / name for name in TRAIN_FOLDERS if (path / name).is_dir()), None)
        held_out = next((path / name for name in HELD_OUT_FOLDERS if (path / name).is_dir()), None)
        if held_out and not train and any(entry.is_dir() for entry in held_out.iterdir()):
            raise ValueError(
                f"data.source must hold the folder {TRAIN_FOLDERS[0]}/ beside {held_out.name}/; {str(path)!r} does not"
            )
        home = train or path
        names = tuple(sorted(entry.name for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
        if not names:
            raise ValueError(
                "data.source must hold IDX files, parquet files, or a folder of images per class, in train/ and val/ or on "
                f"their own; {str(path)!r} holds none"
            )
        found = files_in(home, names)
        return Splits(found, files_in(held_out, names), names) if train and held_out else self._divide(found, names)

    def _tables(self, name: str) -> Splits:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"data.source {self.where!r} is read through the library 'datasets', which is not installed; install kvbind "
                "with its extra 'data', or datasets itself"
            ) from error
        parts = datasets.load_dataset(name, self.name)
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
        train = self._rows(parts[self.part])
        names = tuple(getattr(label, "names", None) or map(str, range(int(train.labels.max()) + 1)))
        if self.held_out_part in parts:
            return Splits(train, self._rows(parts[self.held_out_part]), names)
        if len(parts) > 1:
            raise ValueError(
                f"data.held_out_part must be a split of {self.where}: {', '.join(parts)}; got {self.held_out_part!r}"
            )
        return self._divide(train, names)

    def _rows(self, table: Any) -> Rows:
        import datasets

        # a table that says nothing of images holds their bytes
        pictures = table.cast_column(self.image_column, datasets.Image())
        return Rows(pictures, self.image_column, np.asarray(table[self.label_column][:], dtype=np.int64), self.where)


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


def idx_splits(folder: Path) -> Splits:
    """The images and labels of a folder of IDX files, plain or compressed by gzip.

    Raises:
        ValueError: a file that is missing or is none.
    """
    parts = {}
    for split, word in IDX_FILES.items():
        images, labels = (idx_array(one_file(folder, f"{word}-{kind}*ubyte*")) for kind in ("images", "labels"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"IDX files must hold images [N, height, width] and as many labels; {folder / word}-* hold arrays of shapes "
                f"{list(images.shape)} and {list(labels.shape)}"
            )
        parts[split] = InMemory(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))
    return Splits(**parts, names=tuple(map(str, range(int(parts["train"].labels.max()) + 1))))


def one_file(folder: Path, pattern: str) -> Path:
    """The first file of a folder whose name fits.

    Raises:
        ValueError: none does.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"data.source {str(folder)!r} must hold a file {pattern}; it has none")
    return found[0]


def idx_array(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes that an IDX file holds: two zeros, type 8, rank, sizes (big-endian int32), bytes.

    Raises:
        ValueError: a file of another kind, or one cut short.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} must be an IDX file of unsigned bytes; it starts with {content[:4].hex()!r}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content, dtype=">i4", count=content[3], offset=4)
    if len(content) - start != shape.prod(dtype=np.int64):
        raise ValueError(f"{path} must hold {' x '.join(map(str, shape))} bytes; it holds {len(content) - start}")
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(shape)


def files_in(folder: Path, names: tuple[str, ...]) -> Files:
    """The image files of a folder's class folders, in the order of their names.

    Args:
        folder: of class folders, and of no others.
        names: of the classes.

    Raises:
        ValueError: a class folder that is not among `names`, or no images.
    """
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in names:
            raise ValueError(f"{entry} must be a class that training has: {', '.join(names)}")
    files, labels = [], []
    for label, name in enumerate(names):
        inside = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        found = [path.relative_to(folder).as_posix() for path in inside if path.suffix.lower() in SUFFIXES]
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"data.source must hold images ({', '.join(sorted(SUFFIXES))}); {folder} has none in its class folders"
        )
    return Files(folder, tuple(files), np.asarray(labels, dtype=np.int64))


def digest(parts: Iterable[bytes]) -> str:
    """Sixteen hexadecimal digits that differ where the parts do."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()[:16]
