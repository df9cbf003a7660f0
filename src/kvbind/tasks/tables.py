"""Tables of text: JSONL, read line by line; parquet and hub data sets, through the `datasets` library.

Either way a table is a list of files ("shards" on the hub), of which a reading takes a block, in their order. Who reads has
no say in which: `datasets` by itself would divide the files once more among the workers of a `DataLoader`.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import get_worker_info

from kvbind.tasks.files import other_encoding

_KINDS = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object",
    bytes: "bytes",
}  # fmt: skip

State = dict[str, Any]
"""Where a reading goes on; plain data."""


class TextTable(Protocol):
    """Texts that are read as they come."""

    @property
    def shards(self) -> int:
        """How many files there are to divide."""
        ...

    def texts(self, shard: tuple[int, int] = (0, 1), state: State | None = None) -> Iterator[tuple[str, State]]:
        """The texts of a block of the files, each with the state behind it.

        Args:
            shard: `(index, count)`: the `index`-th of `count` blocks of the files.
            state: what an earlier reading of the block yielded, to go on behind that text; None for its beginning.

        Raises:
            ValueError: a row that holds no text; the message names `data.column`, the file and the row.
        """
        ...


def checked_text(value: Any, column: str, where: str) -> str:
    """The value of a text column.

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), type(value).__name__)
        raise ValueError(f"data.column must hold text; {column!r} of {where}, holds {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        held = f"half a surrogate pair, \\u{ord(value[error.start]):04x}"
        raise ValueError(f"data.column must hold text; {column!r} of {where}, holds {held}") from None
    return value


def block(items: int, index: int, count: int) -> range:
    """The `index`-th of `count` consecutive blocks, the first of which are longer by one where they cannot be equal."""
    each, more = divmod(items, count)
    start = index * each + min(index, more)
    return range(start, start + each + (index < more))


@dataclass(frozen=True)
class Line:
    """A row of a JSONL file.

    Attributes:
        text: what its text column holds.
        start: where it begins in the file, in bytes.
        end: where the next one does.
        number: of the line, from 1.
    """

    text: str
    start: int
    end: int
    number: int


@dataclass(frozen=True)
class JsonLines:
    """JSONL files: a JSON object on each line.

    Attributes:
        paths: of the files.
        column: the key that holds the text.
        encoding: one in which the end of a line is the byte that it is in ASCII.

    Raises:
        ValueError: another encoding.
    """

    paths: Sequence[Path]
    column: str
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if "\n".encode(self.encoding) not in (b"\n", codecs.BOM_UTF8 + b"\n"):
            raise ValueError(
                f"data.encoding must be one for JSONL in which lines end with a single byte, as in utf-8 or latin-1; got "
                f"{self.encoding!r}"
            )

    @property
    def shards(self) -> int:
        return len(self.paths)

    def lines(self, path: Path, start: int = 0, number: int = 1) -> Iterator[Line]:
        """The rows of a file, from one on.

        Args:
            path: the file.
            start: where in it the first one begins.
            number: of that line.
        """
        with path.open("rb") as file:
            if start:  # of a file that was edited since, the middle of a line may be there by now
                file.seek(start - 1)
                start += len(file.readline()) - 1
            for here, raw in enumerate(file, number):
                end = start + len(raw)
                if raw.strip():
                    yield Line(self.parse(raw, path, here), start, end, here)
                start = end

    def at(self, path: Path, start: int, number: int) -> str:
        """The text of the row that begins at a place."""
        with path.open("rb") as file:
            file.seek(start)
            return self.parse(file.readline(), path, number)

    def parse(self, raw: bytes, path: Path, number: int) -> str:
        """The text of a line.

        Raises:
            ValueError: a line that is not in the encoding, no JSON object, or has no text in its column.
        """
        where = f"{path}, line {number}"
        try:
            marked = number == 1 and self.encoding == "utf-8"
            row = json.loads(raw.rstrip().decode("utf-8-sig" if marked else self.encoding))
        except UnicodeDecodeError as error:
            name = "UTF-8" if self.encoding == "utf-8" else self.encoding
            raise ValueError(
                f"{where}, must be {name}; byte {error.start + 1} is {raw[error.start]:#04x} ({other_encoding(path)})"
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where}, must be a JSON object; it is nested too deeply") from error
        except json.JSONDecodeError as error:
            what = error.msg.removesuffix(" at")
            raise ValueError(f"{where}, must be a JSON object; {what} at character {error.pos + 1}") from error
        except ValueError as error:  # a number with more digits than Python reads
            raise ValueError(f"{where}, must be a JSON object; {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}, must be a JSON object; it is {_KINDS.get(type(row), 'a text')}")
        if self.column not in row:
            raise ValueError(f"data.column must be a column of {where}: {', '.join(row)}; got {self.column!r}")
        return checked_text(row[self.column], self.column, where)

    def texts(self, shard: tuple[int, int] = (0, 1), state: State | None = None) -> Iterator[tuple[str, State]]:
        if state and "file" not in state:
            raise ValueError(f"a reading of {self.paths[0]} and others cannot go on from an earlier version's position")
        own = block(len(self.paths), *shard)
        first, start, number = (state["file"], state["byte"], state["line"]) if state else (own.start, 0, 1)
        for index in range(first, own.stop):
            for line in self.lines(self.paths[index], start, number):
                yield line.text, {"file": index, "byte": line.end, "line": line.number + 1}
            start, number = 0, 1


class Streamed:
    """A table that `datasets` streams.

    Args:
        table: a `datasets.IterableDataset`.
        column: the column that holds the text.
        what: what to call it in errors.
        paths: of local parquet files, where it is made of them.
    """

    def __init__(self, table: Any, column: str, what: str, paths: Sequence[Path] = ()) -> None:
        self.table, self.column, self.what, self.paths = table, column, what, tuple(paths)

    @property
    def shards(self) -> int:
        return int(self.table.num_shards)

    def texts(self, shard: tuple[int, int] = (0, 1), state: State | None = None) -> Iterator[tuple[str, State]]:
        index, count = shard
        # a copy, as a table that has loaded a state starts from it in every later iteration too
        part = copy.deepcopy(self.table)
        if count > 1:
            part = part.shard(num_shards=count, index=index)
        if state:
            part.load_state_dict(state)
        if get_worker_info() is not None:
            import fsspec.asyn

            fsspec.asyn.reset_lock()  # a forked process has the lock, and not the thread, of a loop that reads the network
        # by batches of one: unlike plain iteration, this leaves out no files for the sake of a DataLoader's other workers
        for number, row in enumerate(part.iter(batch_size=1), 1):
            if self.column not in row:
                raise ValueError(f"data.column must be a column of {self.what}: {', '.join(row)}; got {self.column!r}")
            value = row[self.column][0]
            if value is None and self.paths:
                refuse_nulls(self.paths, self.column)
            yield checked_text(value, self.column, f"{self.what}, row {number} of this reading"), part.state_dict()


def parquet_schema(path: Path) -> Any:
    """The `pyarrow.Schema` of a parquet file.

    Raises:
        ValueError: it is none.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} must be a parquet file; {str(error).partition(chr(10))[0]}") from error


def check_parquet(paths: Sequence[Path], column: str) -> None:
    """Refuse parquet files whose column holds no text. Their schemas alone are read.

    Raises:
        ValueError: a file that is no parquet, or has no such column of text.
    """
    from pyarrow import types

    for path in paths:
        schema = parquet_schema(path)
        if column not in schema.names:
            raise ValueError(f"data.column must be a column of {path}: {', '.join(schema.names)}; got {column!r}")
        kind = schema.field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise ValueError(f"data.column must hold text; {column!r} of {path} holds {kind}")


def refuse_nulls(paths: Sequence[Path], column: str) -> None:
    """Name the first row of parquet files whose text is null, if there is one.

    Raises:
        ValueError: there is such a row.
    """
    from pyarrow import parquet

    for path in paths:
        row = 0
        for batch in parquet.ParquetFile(path).iter_batches(columns=[column]):
            values = batch.column(0)
            if values.null_count:
                row += values.is_null().to_pylist().index(True) + 1
                raise ValueError(f"data.column must hold text; {column!r} of {path}, row {row}, holds null")
            row += len(values)
