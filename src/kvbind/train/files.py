"""Files that appear whole or not at all, that no link leads elsewhere, and whose JSON any reader takes."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from kvbind import files

TEMPORARY = ".partial"

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""What JSON has no numbers for, by the text that stands for it."""


def open_own(path: Path, flags: int) -> int:
    """Open a file that nobody else may have put a symbolic link in place of; made where it is missing.

    Args:
        path: of the file.
        flags: as `os.open` takes them.

    Returns:
        The handle.

    Raises:
        OSError: a symbolic link, among other things.
    """
    if path.is_symlink():
        raise OSError(f"{path} is a symbolic link, which is not followed; remove it")
    # by the system too, as a link may have come in between
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` complete and on disk, or not at all."""
    partial = path.with_name(path.name + TEMPORARY)
    handle = open_own(partial, os.O_WRONLY | os.O_TRUNC)
    try:
        with about(path), os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # a full disk gets back what this took
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Let errors of the system say which file they are about, where they do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries, such as a rename, on disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with about(folder):
                os.fsync(handle)
        finally:
            os.close(handle)


def sync_all(folder: Path) -> None:
    """Put all files in a folder on disk, whoever has written them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file, about(path):
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, and its folder where there is none; one whose name ends on ".gz" by gzip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    with atomic_write(path) as file:
        # without the time, so that the same text makes the same file
        file.write(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name with the same suffix, then move it to `path`; its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{TEMPORARY}{path.suffix}")
    os.close(open_own(partial, os.O_WRONLY))
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder under a temporary name, then put it in the place of `path`, complete and on disk."""
    partial = path.with_name(f".{path.name}{TEMPORARY}")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        write(partial)
        sync_all(partial)
        remove(path)
        partial.rename(path)
    finally:
        remove(partial)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there; of a symbolic link the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def to_json(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON in which numbers that are not finite are the texts "NaN", "Infinity" and "-Infinity"."""
    separators = (",", ":") if indent is None else None
    return json.dumps(spelled(data), indent=indent, separators=separators, allow_nan=False)


WIDTH = 125
"""Of the lines of JSON that is read by eye, where more than numbers would stand in a longer one."""


def laid_out(data: Any, depth: int = 0) -> str:
    """Plain data as JSON for the eye: what fits a line is one, and so is what holds numbers alone.

    Args:
        data: plain data.
        depth: how many lists and mappings it lies in.
    """
    line = json.dumps(data)
    if not isinstance(data, dict | list | tuple) or depth + len(line) < WIDTH or _numeric(data):
        return line
    blank = "\n" + " " * (depth + 1)
    if isinstance(data, dict):
        parts = [f"{json.dumps(str(key))}: {laid_out(value, depth + 1)}" for key, value in data.items()]
    else:
        parts = [laid_out(value, depth + 1) for value in data]
    opening, closing = "{}" if isinstance(data, dict) else "[]"
    return f"{opening}{blank}{f',{blank}'.join(parts)}{blank[:-1]}{closing}"


def _numeric(data: Any) -> bool:
    """Whether lists and mappings hold numbers alone."""
    if isinstance(data, dict | list | tuple):
        return all(map(_numeric, data.values() if isinstance(data, dict) else data))
    return data is None or isinstance(data, int | float)


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given.

    Raises:
        ValueError: text that is not JSON, or nested too deeply to be read.
    """
    try:
        return restored(json.loads(text))
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def read_json(path: Path) -> Any:
    """The data in a file that `to_json` made.

    Raises:
        ValueError, OSError: as `kvbind.files.read_json`.
    """
    return restored(files.read_json(path, finite=False))


def spelled(data: Any, null: bool = False) -> Any:
    """`data` with texts in place of numbers that are not finite, or with None."""
    if isinstance(data, float) and not math.isfinite(data):
        return None if null else "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, dict):
        return {key: spelled(value, null) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [spelled(value, null) for value in data]
    return data


def restored(data: Any) -> Any:
    """`data` with numbers again in place of the texts that `spelled` gave."""
    if isinstance(data, str):
        return _NUMBERS.get(data, data)
    if isinstance(data, dict):
        return {key: restored(value) for key, value in data.items()}
    if isinstance(data, list):
        return [restored(value) for value in data]
    return data
