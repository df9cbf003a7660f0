"""Sources: where documents come from, by the words of a configuration."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbind.tasks.documents import Documents, Files, Rows, Split, Stream, Texts, belongs

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")
TABLE_SUFFIXES = {".jsonl": "json", ".parquet": "parquet"}
"""The files that the `datasets` library reads, and the name of its reader."""
HUB, PACKAGE = "hub:", "package:"

# Packages of the standard library that are absent from some installations, written for one machine, or tables of numbers.
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Source:
    """Text, and how to read it.

    Attributes:
        where: "stdlib", the Python standard library's own source; "package:" and the name of an installed Python package,
            for its source; a folder of text, JSONL or parquet files; one such file; or "hub:" and the name of a data set to
            stream from the Hugging Face hub.
        held_out: the fraction of documents that is held out, chosen by a hash of each file's path below the folder, or of
            each row's text. A lone text file is one document: its last part of that size is held out.
        column: of tables, the column that holds the text.
        stream: read local tables as they come, where they are too large to be gone through beforehand.
        name: of hub data sets, the configuration.
        part: of hub data sets, the published split.
    """

    where: str
    held_out: float = 0.1
    column: str = "text"
    stream: bool = False
    name: str | None = None
    part: str = "train"

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1; got {self.held_out}")

    def open(self, split: Split | None) -> Documents:
        """The documents of "train", of "held_out", or, for None, of both together.

        Raises:
            ValueError: a source that does not exist or holds no text for that split.
            ImportError: a table or a hub data set, and the `datasets` library is not installed.
        """
        path = Path(self.where).expanduser()
        found: Documents
        if self.where.startswith(HUB):
            name = self.where.removeprefix(HUB)
            table = self._library().load_dataset(name, self.name, split=self.part, streaming=True)
            return Stream(table, self.column, split, self.held_out, self.where)
        if self.where.startswith(PACKAGE):
            found = self._files(package_folder(self.where.removeprefix(PACKAGE)), (".py",), split, _hidden)
        elif self.where == "stdlib":
            found = self._files(Path(sysconfig.get_path("stdlib")), (".py",), split, _stdlib_skips)
        elif path.is_dir():
            tables = [p for p in sorted(path.rglob("*")) if p.suffix in TABLE_SUFFIXES]
            found = self._tables(tables, split) if tables else self._files(path, TEXT_SUFFIXES, split, _hidden)
        elif path.is_file():
            found = self._tables([path], split) if path.suffix in TABLE_SUFFIXES else self._one_text(path, split)
        else:
            raise ValueError(
                f"data.source must be 'stdlib', '{PACKAGE}NAME', a folder or file of text, JSONL or parquet, or '{HUB}NAME' "
                f"for a data set on the Hugging Face hub; got {self.where!r}, which does not exist"
            )
        if not isinstance(found, Stream) and next(found.once(), None) is None:
            python = self.where == "stdlib" or self.where.startswith(PACKAGE)
            kinds = "Python source" if python else f"text ({', '.join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))})"
            raise ValueError(f"data.source {self.where!r} holds no {kinds} for the split {split!r}")
        return found

    def _files(self, root: Path, suffixes: tuple[str, ...], split: Split | None, skips: Callable[[str], bool]) -> Files:
        names = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = [name for name in subfolders if not skips(name)]
            here = Path(folder).relative_to(root)
            names += [(here / name).as_posix() for name in files if name.endswith(suffixes) and not skips(name)]
        kept = [name for name in sorted(names) if belongs(name, split, self.held_out) and (root / name).stat().st_size]
        return Files(root, kept)

    def _one_text(self, path: Path, split: Split | None) -> Texts:
        text = path.read_text(encoding="utf-8", errors="replace")
        cut = int(len(text) * (1 - self.held_out))
        part = {None: text, "train": text[:cut], "held_out": text[cut:]}[split]
        return Texts([part] if part else [], str(path))

    def _tables(self, paths: list[Path], split: Split | None) -> Rows | Stream:
        readers = {TABLE_SUFFIXES[path.suffix] for path in paths}
        if len(readers) > 1:
            raise ValueError(f"data.source must hold JSONL or parquet files, not both; got {self.where!r}")
        files = [str(path) for path in paths]
        table = self._library().load_dataset(readers.pop(), data_files=files, split="train", streaming=self.stream)
        columns = table.column_names or list(next(iter(table), {}))
        if self.column not in columns:
            raise ValueError(f"data.column must be a column of {self.where}: {', '.join(columns)}; got {self.column!r}")
        if self.stream:
            return Stream(table, self.column, split, self.held_out, self.where)
        rows = [i for i, text in enumerate(table[self.column]) if text and belongs(text, split, self.held_out)]
        return Rows(table, self.column, rows, self.where)

    def _library(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"data.source {self.where!r} is read through the library 'datasets', which is not installed; "
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


def _hidden(name: str) -> bool:
    return name.startswith(".")
