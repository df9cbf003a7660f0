"""Documents: texts of one split, read in a shuffled order that repeats and resumes.

Documents are read through `forever`, document by document in a shuffled order that repeats, each with the *position* behind
it: a small dict from which reading goes on at the next document, in another process too.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kvbind.tasks.contents import Contents
from kvbind.tasks.files import read_text
from kvbind.tasks.tables import JsonLines, TextTable

Split = Literal["train", "held_out"]
Position = dict[str, Any]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out split: by a hash, so the same everywhere and always."""
    return _hashed(name) < fraction * 2**64


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def belongs(name: str, split: Split | None, fraction: float) -> bool:
    """Whether the document of that name belongs to `split`; to None belong all."""
    return split is None or is_held_out(name, fraction) == (split == "held_out")


def split_of(names: Sequence[str], split: Split | None, fraction: float) -> list[str]:
    """Those of the names that belong to `split`, by their hashes.

    Where that would leave a split of two names and more without any, one changes sides: the likeliest to be held out, or to
    be trained on.
    """
    own = [name for name in names if belongs(name, split, fraction)]
    if split is None or len(names) < 2 or 0 < len(own) < len(names):
        return own
    ordered = sorted(set(names), key=_hashed)
    alone = ordered[-1] if (len(own) == len(names)) == (split == "held_out") else ordered[0]
    return [name for name in names if (name == alone) != bool(own)]


class Documents(abc.ABC):
    """Texts of one split of one source."""

    @abc.abstractmethod
    def forever(
        self, seed: int, position: Position | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, Position]]:
        """Texts in a shuffled order, anew in every epoch, each with the position behind it.

        Args:
            seed: source of the order.
            position: what an earlier reading yielded, to go on behind that text; None for the beginning.
            shard: `(index, count)`: every `count`-th document from the `index`-th on.
        """

    @abc.abstractmethod
    def once(self) -> Iterator[str]:
        """Every text once, in the source's own order."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short text that differs where the documents do, for naming what a run was trained on."""

    @abc.abstractmethod
    def contents(self) -> Contents:
        """What the documents are read from, for noticing that it has changed."""


class Indexed(Documents):
    """Documents that can be read by number.

    Attributes:
        what: what to call the source in errors.
    """

    what: str = "the source"

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> str: ...

    def once(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def forever(
        self, seed: int, position: Position | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, Position]]:
        index, count = shard
        if count > len(self):
            raise ValueError(f"data.streams must be at most the {len(self)} documents of {self.what}; got {count}")
        epoch, start = (position["epoch"], position["next"]) if position else (0, 0)
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self))[index::count]
            for i in range(start, len(order)):
                yield self[int(order[i])], {"epoch": epoch, "next": i + 1}
            epoch, start = epoch + 1, 0


class TextFiles(Indexed):
    """Text files under a folder, each a document; the split of each goes by its path below the folder.

    Args:
        root: the folder.
        names: paths below it.
        what: what to call it; default its path.
        encoding: of the files.
        errors: what to do with bytes that are no text in it, as `bytes.decode` takes it.
    """

    def __init__(
        self, root: Path, names: Sequence[str], what: str = "", encoding: str = "utf-8", errors: str = "strict"
    ) -> None:
        self.root, self.names, self.what = root, tuple(names), what or str(root)
        self.encoding, self.errors = encoding, errors

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return read_text(self.root / self.names[index], self.encoding, self.errors)

    def fingerprint(self) -> str:
        sizes = (f"{name}:{(self.root / name).stat().st_size}" for name in self.names)
        return digest(sizes if self.encoding == "utf-8" else (*sizes, self.encoding))

    def contents(self) -> Contents:
        files = {f"{self.what.rstrip('/')}/{name}": self.root / name for name in self.names}
        return Contents(files, encoded(self.encoding))


class Texts(Indexed):
    """Texts in memory.

    Args:
        texts: all of them.
        what: what to call the source in errors.
        origin: what they were read from.
    """

    def __init__(self, texts: Sequence[str], what: str = "the source", origin: Contents | None = None) -> None:
        self.texts, self.what, self.origin = tuple(texts), what, origin

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]

    def fingerprint(self) -> str:
        return digest(self.texts)

    def contents(self) -> Contents:
        return self.origin or Contents(others={self.what: self.fingerprint()})


class Lines(Indexed):
    """Rows of JSONL files.

    Args:
        table: the files.
        rows: the rows of this split: number of the file, and where in it the line begins, in bytes, and its number.
        what: what to call the source in errors.
        origin: what they are read from.
    """

    def __init__(self, table: JsonLines, rows: Sequence[tuple[int, int, int]], what: str, origin: Contents) -> None:
        self.table, self.what, self.origin = table, what, origin
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        file, start, number = self.rows[index].tolist()
        return self.table.at(self.table.paths[file], start, number)

    def fingerprint(self) -> str:
        return digest(self.once())

    def contents(self) -> Contents:
        return self.origin


class ParquetRows(Indexed):
    """Rows of local parquet files, read through the `datasets` library.

    Args:
        table: a `datasets.Dataset`.
        column: the column that holds the text.
        rows: the rows of this split.
        what: what to call the source in errors.
        origin: what they are read from.
    """

    def __init__(self, table: Any, column: str, rows: Sequence[int], what: str, origin: Contents) -> None:
        self.table, self.column, self.rows, self.what, self.origin = table, column, rows, what, origin

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        text: str = self.table[self.rows[index]][self.column]
        return text

    def fingerprint(self) -> str:
        return digest(self.once())

    def contents(self) -> Contents:
        return self.origin


class Parts(Indexed):
    """Parts of documents that are too few to be divided: of each, the last part is held out.

    Args:
        whole: the documents.
        split: which part of each.
        fraction: the held-out one.
    """

    def __init__(self, whole: Indexed, split: Split, fraction: float) -> None:
        self.whole, self.split, self.fraction, self.what = whole, split, fraction, whole.what

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> str:
        text = self.whole[index]
        cut = int(len(text) * (1 - self.fraction))
        return text[:cut] if self.split == "train" else text[cut:]

    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint()}, split {self.split}, {self.fraction}"

    def contents(self) -> Contents:
        return self.whole.contents()


class TextStream(Documents):
    """A table too large to hold, read as it comes; the split of each document goes by its text.

    The order is the table's own: what shuffles is the window of samples that the reader keeps.

    Args:
        table: the table.
        split: which split to keep; None for all.
        fraction: the held-out fraction.
        what: what to call the source in errors.
        origin: what it is read from.
    """

    def __init__(self, table: TextTable, split: Split | None, fraction: float, what: str, origin: Contents) -> None:
        self.table, self.split, self.fraction, self.what, self.origin = table, split, fraction, what, origin

    def _keeps(self, text: str) -> bool:
        return bool(text) and belongs(text, self.split, self.fraction)

    def once(self) -> Iterator[str]:
        return (text for text, _ in self.table.texts() if self._keeps(text))

    def forever(
        self, seed: int, position: Position | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, Position]]:
        if shard[1] > self.table.shards:
            raise ValueError(f"data.streams must be at most the {self.table.shards} files of {self.what}; got {shard[1]}")
        epoch = position["epoch"] if position else 0
        while True:
            some = bool(position)
            for text, behind in self.table.texts(shard, position["rows"] if position else None):
                if self._keeps(text):
                    some = True
                    yield text, {"epoch": epoch, "rows": behind}
            if not some:
                where = f" in stream {shard[0]} of {shard[1]} (data.streams)" if shard[1] > 1 else ""
                raise ValueError(f"data.source {self.what} has no documents for the split {self.split!r}{where}")
            epoch, position = epoch + 1, None

    def fingerprint(self) -> str:
        return f"{self.what}, split {self.split}, {self.fraction}"

    def contents(self) -> Contents:
        return self.origin


def encoded(encoding: str) -> dict[str, str]:
    """What tells text files apart from the same ones in another encoding."""
    return {} if encoding == "utf-8" else {"data.encoding": encoding}


def digest(parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that differ where the texts do."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode())
        total.update(b"\0")
    return total.hexdigest()[:16]
