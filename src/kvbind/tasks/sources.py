"""Sources: where documents come from, by the words of a configuration."""

from __future__ import annotations

import codecs
import importlib.util
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import (
    Documents,
    Indexed,
    Lines,
    ParquetRows,
    Parts,
    Split,
    TextFiles,
    Texts,
    TextStream,
    belongs,
    encoded,
)
from kvbind.tasks.files import (
    JSONL_SUFFIXES,
    PYTHON_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    check_texts,
    files_below,
    is_named,
    other_files,
    read_text,
)
from kvbind.tasks.linux import LINUX, OTHERS_NAME, Folders, folders_of, open_kernel
from kvbind.tasks.tables import JsonLines, Streamed, check_parquet, checked_text, refuse_nulls

HUB, PACKAGE = "hub:", "package:"

Item = TypeVar("Item")

# Packages of the standard library that are absent from some installations, written for one machine, or tables of numbers.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class TextSource:
    """Text, and how to read it.

    Documents are held out by a hash of each file's path below the folder, or of each row's text. Where that would leave a
    split empty, as of a single file, the last part of each document is held out.

    Attributes:
        where: "stdlib", the Python standard library's own source; "package:" and the name of an installed Python package,
            for its source; "linux", the kernel's C source as Debian's package linux-source installs it, split by folders,
            and "linux-others", that of subsystems which "linux" has not (`kvbind.tasks.linux`); a folder of text, JSONL or
            parquet files; one such file; or "hub:" and the name of a data set to stream from the Hugging Face hub.
        held_out: the fraction that is held out.
        column: of tables, the column that holds the text.
        stream: read local tables as they come, where they are too large to be gone through beforehand.
        name: of hub data sets, the configuration.
        part: of hub data sets, the published split.
        encoding: of text and JSONL files.
        argument: what the configuration calls it, for errors.
    """

    where: str
    held_out: float = 0.1
    column: str = "text"
    stream: bool = False
    name: str | None = None
    part: str = "train"
    encoding: str = "utf-8"
    argument: str = "data.source"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1; got {self.held_out}")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"data.encoding must be an encoding that Python knows; got {self.encoding!r}") from None

    def open(self, split: Split | None) -> Documents:
        """The documents of "train", of "held_out", or, for None, of both together.

        Raises:
            ValueError: a source that does not exist, holds no text for that split, or holds something else.
            ImportError: parquet files or a hub data set, and the `datasets` library is not installed.
        """
        path = Path(self.where).expanduser()
        found: Documents
        if self.where.startswith(HUB) and self.where != HUB:
            return self._hub(split)
        if self.where.startswith(PACKAGE):
            found = self._python(package_folder(self.where.removeprefix(PACKAGE)), split)
        elif self.where == "stdlib":
            found = self._python(Path(sysconfig.get_path("stdlib")), split, _stdlib_skips)
        elif self.where in (LINUX, OTHERS_NAME):
            files, root = open_kernel(self.where == OTHERS_NAME)
            found = self._named(folders_of(files), split, lambda own: Folders(files, own, root, self.where))
        elif path.is_dir():
            tables = {f"{self.where.rstrip('/')}/{name}": path / name for name in files_below(path, TABLE_SUFFIXES)}
            found = self._tables(tables, split) if tables else self._texts(path, split)
        elif path.is_file():
            found = (
                self._tables({self.where: path}, split) if is_named(path.name, TABLE_SUFFIXES) else self._text(path, split)
            )
        else:
            raise ValueError(
                f"{self.argument} must be 'stdlib', '{LINUX}', '{PACKAGE}NAME', a folder or file of text, JSONL or parquet, "
                f"or '{HUB}NAME' for a data set on the Hugging Face hub; got {self.where!r}, which does not exist"
            )
        # of a stream one row, of whatever split: a split's first may be far
        if next(iter(found.table.texts() if isinstance(found, TextStream) else found.once()), None) is None:
            python = self.where == "stdlib" or self.where.startswith(PACKAGE)
            kinds = "Python source" if python else f"text ({', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))})"
            others = "" if python or not path.is_dir() else other_files(path)
            raise ValueError(f"{self.argument} {self.where!r} holds no {kinds}{others}")
        return found

    def _hub(self, split: Split | None) -> TextStream:
        library, name = self._library(), self.where.removeprefix(HUB)
        table = library.load_dataset(name, self.name, split=self.part, streaming=True)
        revision = Contents(others={self.where: str(library.load_dataset_builder(name, self.name).hash)})
        return TextStream(Streamed(table, self.column, self.where), split, self.held_out, self.where, revision)

    def _python(self, root: Path, split: Split | None, skips: Callable[[str], bool] | None = None) -> Indexed:
        names = [name for name in files_below(root, PYTHON_SUFFIXES, skips) if (root / name).stat().st_size]
        return self._named(names, split, lambda own: TextFiles(root, own, self.where, errors="replace"))

    def _divided(
        self, items: Sequence[Item], own: Sequence[bool], split: Split | None, make: Callable[[Sequence[Item]], Indexed]
    ) -> Indexed:
        """The documents of a split.

        Args:
            items: what stands for each document.
            own: whether each belongs to the split, by its hash.
            split: "train" or "held_out"; None for all documents.
            make: makes documents of some items.
        """
        if split is None or not items or (any(own) and not all(own)):
            return make([item for item, mine in zip(items, own, strict=True) if mine])
        return Parts(make(items), split, self.held_out)

    def _named(self, names: Sequence[str], split: Split | None, make: Callable[[Sequence[str]], Indexed]) -> Indexed:
        """The documents of a split, of those that go by a name."""
        return self._divided(names, [belongs(name, split, self.held_out) for name in names], split, make)

    def _texts(self, root: Path, split: Split | None) -> Indexed:
        names = [name for name in files_below(root, TEXT_SUFFIXES) if (root / name).stat().st_size]
        found = self._named(names, split, lambda own: TextFiles(root, own, self.where, self.encoding))
        check_texts(found.contents().files.values(), self.encoding)
        return found

    def _text(self, path: Path, split: Split | None) -> Texts:
        text = read_text(path, self.encoding)
        cut = int(len(text) * (1 - self.held_out))
        part = {None: text, "train": text[:cut], "held_out": text[cut:]}[split]
        return Texts([part] if part else [], self.where, Contents({self.where: path}, encoded(self.encoding)))

    def _tables(self, files: Mapping[str, Path], split: Split | None) -> Documents:
        paths = list(files.values())
        lines = [is_named(path.name, JSONL_SUFFIXES) for path in paths]
        if any(lines) and not all(lines):
            raise ValueError(f"{self.argument} must hold JSONL or parquet files, not both; got {self.where!r}")
        if all(lines):
            contents = Contents(files, encoded(self.encoding))
            table = JsonLines(paths, self.column, self.encoding)
            if self.stream:
                return TextStream(table, split, self.held_out, self.where, contents)
            places: list[tuple[int, int, int]] = []
            own = []
            for number, path in enumerate(paths):
                for line in table.lines(path):
                    if line.text:
                        places.append((number, line.start, line.number))
                        own.append(belongs(line.text, split, self.held_out))
            return self._divided(places, own, split, lambda some: Lines(table, some, self.where, contents))
        library, contents = self._library(), Contents(files)
        check_parquet(paths, self.column)
        names = [str(path) for path in paths]
        parquet = library.load_dataset(
            "parquet", data_files=names, columns=[self.column], split="train", streaming=self.stream
        )
        if self.stream:
            return TextStream(Streamed(parquet, self.column, self.where, paths), split, self.held_out, self.where, contents)
        rows: list[int] = []
        own = []
        for i, text in enumerate(parquet[self.column]):
            if text is None:
                refuse_nulls(paths, self.column)
            if checked_text(text, self.column, f"{self.where}, row {i + 1}"):
                rows.append(i)
                own.append(belongs(text, split, self.held_out))
        return self._divided(rows, own, split, lambda some: ParquetRows(parquet, self.column, some, self.where, contents))

    def _library(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"{self.argument} {self.where!r} is read through the library 'datasets', which is not installed; "
                "install kvbind with its extra 'data', or datasets itself"
            ) from error
        return datasets


def package_folder(name: str) -> Path:
    """The folder of an installed Python package.

    Raises:
        ValueError: there is none of that name, or it is no folder.
    """
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a part of a package that is none
        found = None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"data.source must be '{PACKAGE}' and the name of an installed Python package; got {PACKAGE + name!r}"
        )
    return Path(found.submodule_search_locations[0])


def _stdlib_skips(name: str) -> bool:
    return name in _STDLIB_LEFT_OUT or name.startswith(("_sysconfigdata", "config-"))
