"""Documents: texts of one split, read in a shuffled order that repeats and resumes.

Documents are read through `forever`, document by document in a shuffled order that repeats, each with the *position* behind
it: a small dict from which reading goes on at the next document, in another process too.
"""

from __future__ import annotations

import abc
import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Split = Literal["train", "held_out"]
Position = dict[str, Any]


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of that name belongs to the held-out split: by a hash, so the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < fraction * 2**64


def belongs(name: str, split: Split | None, fraction: float) -> bool:
    """Whether the document of that name belongs to `split`; to None belong all."""
    return split is None or is_held_out(name, fraction) == (split == "held_out")


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


class Files(Indexed):
    """Text files under a folder, each a document; the split of each goes by its path below the folder.

    Args:
        root: the folder.
        names: paths below it.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names, self.what = root, tuple(names), str(root)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        return (self.root / self.names[index]).read_text(encoding="utf-8", errors="replace")

    def fingerprint(self) -> str:
        return _digest(f"{name}:{(self.root / name).stat().st_size}" for name in self.names)


class Texts(Indexed):
    """Texts in memory."""

    def __init__(self, texts: Sequence[str], what: str = "the source") -> None:
        self.texts, self.what = tuple(texts), what

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]

    def fingerprint(self) -> str:
        return _digest(self.texts)


class Rows(Indexed):
    """Rows of local JSONL or parquet files, read through the `datasets` library.

    Args:
        table: a `datasets.Dataset`.
        column: the column that holds the text.
        rows: the rows of this split.
        what: what to call the source in errors.
    """

    def __init__(self, table: Any, column: str, rows: Sequence[int], what: str) -> None:
        self.table, self.column, self.rows, self.what = table, column, rows, what

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.table[self.rows[index]][self.column]

    def fingerprint(self) -> str:
        return _digest(self.once())


class Stream(Documents):
    """A data set too large to hold, read as it comes; the split of each document goes by its text.

    The order is the data set's own: what shuffles is the window of samples that the reader keeps.

    Args:
        table: a `datasets.IterableDataset`.
        column: the column that holds the text.
        split: which split to keep; None for all.
        fraction: the held-out fraction.
        what: what to call the source in errors.
    """

    def __init__(self, table: Any, column: str, split: Split | None, fraction: float, what: str) -> None:
        self.table, self.column, self.split, self.fraction, self.what = table, column, split, fraction, what

    def _keeps(self, text: str) -> bool:
        return bool(text) and belongs(text, self.split, self.fraction)

    def once(self) -> Iterator[str]:
        return (row[self.column] for row in self.table if self._keeps(row[self.column]))

    def forever(
        self, seed: int, position: Position | None = None, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[str, Position]]:
        index, count = shard
        if count > self.table.num_shards:
            raise ValueError(f"data.streams must be at most the {self.table.num_shards} files of {self.what}; got {count}")
        epoch = position["epoch"] if position else 0
        while True:
            # a copy, as a table that has loaded a state starts from it in every later iteration too
            part = copy.deepcopy(self.table)
            if count > 1:
                part = part.shard(num_shards=count, index=index)
            if position:
                part.load_state_dict(position["rows"])
            some = bool(position)
            for row in part:
                if self._keeps(row[self.column]):
                    some = True
                    yield row[self.column], {"epoch": epoch, "rows": part.state_dict()}
            if not some:
                raise ValueError(f"data.source {self.what} has no documents for the split {self.split!r}")
            epoch, position = epoch + 1, None

    def fingerprint(self) -> str:
        return f"{self.what}, split {self.split}, {self.fraction}"


def _digest(parts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode())
        total.update(b"\0")
    return total.hexdigest()[:16]
