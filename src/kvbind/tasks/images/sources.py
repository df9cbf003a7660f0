"""Where images come from, by the words of a configuration: held in memory whole, or read as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import (
    ARROW_SUFFIXES,
    EXPANDED_GIB,
    PARQUET_SUFFIXES,
    PICTURE_SUFFIXES,
    files_below,
    files_named,
    folders_in,
    is_named,
)
from kvbind.tasks.images.idx import holds_idx, idx_splits
from kvbind.tasks.images.stores import ImageFiles, ImageRows, InMemory, Some, Splits
from kvbind.tasks.tables import parquet_schema

HUB, DIGITS = "hub:", "digits"

TRAIN_FOLDERS = ("train",)
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
"""Folders of class folders, in the order in which they are looked for."""

TABLES = ((".", "*.parquet"), ("data", "*.parquet"), (".", "*.arrow"))
"""Where a folder of tables has them: folders below it, and the files there."""

SPLIT_SEED = 0
"""Of the choice of what is held out, where a source has no split of its own: the same for every run."""


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
        if self.where.startswith(HUB) and self.where != HUB:
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
        for name in names:
            if not name.isprintable():
                raise ValueError(f"a class must have a name that can be shown, in UTF-8; {str(home)!r} has {name!r}")
        found = replace(files_in(home, names), expanded_gib=self.expanded_gib)
        without = [name for label, name in enumerate(names) if not (found.labels == label).any()]
        if without or len(names) < 2:
            fault = f"{without[0]!r} has none" if without else f"there is {names[0]!r} alone"
            raise ValueError(
                f"data.source must hold two class folders or more, each with pictures ({', '.join(PICTURE_SUFFIXES)}); in "
                f"{str(home)!r} {fault}"
            )
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
