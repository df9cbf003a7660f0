"""Files of data sets: which count, what they may expand to, and which of them a list may name.

Text, tables and pictures are told by the end of their name, in capitals or not. What is hidden never counts: names that
begin with a dot (`.git`, `.ipynb_checkpoints`, the `._name` files that macOS leaves on other systems), `__MACOSX`, and what
editors keep beside a file (`name~`, `~$name`, `#name#`).
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html")
PYTHON_SUFFIXES = (".py",)
JSONL_SUFFIXES, PARQUET_SUFFIXES = (".jsonl",), (".parquet",)
TABLE_SUFFIXES = JSONL_SUFFIXES + PARQUET_SUFFIXES
ARROW_SUFFIXES = (".parquet", ".arrow")
PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SCENE_SUFFIXES = (".json",)

EXPANDED_GIB = 1.0
"""GiB that a compressed file or picture may expand to, unless `data.expanded_gib` says otherwise."""

ARCHIVE_GIB = 4.0
"""GiB that an archive's files may have together."""

CHECKED = 256 * 2**20
"""How many bytes of text files are read beforehand to see that they are text."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What text files in Unicode begin with, and its encodings' names."""

_GUESSED = 4096
"""Bytes that an encoding is guessed by."""

_GZIP = b"\x1f\x8b"
_PIECE = 2**20


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of a data set's."""
    return name.startswith((".", "~")) or name.endswith("~") or name == "__MACOSX" or (name[0] == name[-1] == "#")


def is_named(name: str, suffixes: Collection[str]) -> bool:
    """Whether a file of that name counts among those that end on one of `suffixes`."""
    return not hidden(name) and name.lower().endswith(tuple(suffixes))


def files_below(root: Path, suffixes: Collection[str], skips: Callable[[str], bool] | None = None) -> list[str]:
    """The files of a data set's folder, as paths below it with "/" between their parts, sorted.

    Links to files are followed, links to folders are not; what is no file, such as a pipe, is passed over.

    Args:
        root: the folder.
        suffixes: what their names end on.
        skips: names of files and folders to pass over besides hidden ones.
    """
    names = []
    for folder, subfolders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        subfolders[:] = [name for name in subfolders if not hidden(name) and not (skips and skips(name))]
        found = [name for name in files if is_named(name, suffixes) and not (skips and skips(name))]
        # a link that leads nowhere is left to whoever reads it, to be named
        names += [(here / name).as_posix() for name in found if not _is_other(os.path.join(folder, name))]
    return sorted(names)


def _is_other(path: str) -> bool:
    """Whether there is something that is no file, to read which would wait, or never end."""
    return os.path.exists(path) and not os.path.isfile(path)


def other_files(root: Path) -> str:
    """A clause on what a folder holds in place of what was looked for; empty of an empty one."""
    found = Counter(Path(name).suffix or name for name in files_below(root, ("",)))
    kinds = [f"{count} {ending}" for ending, count in found.most_common()]
    return f"; its files are {shown(kinds)}" if kinds else "; there are no files in it"


def files_named(folder: Path, pattern: str) -> list[Path]:
    """The files right in a folder whose names fit a pattern such as "*.torch", sorted."""
    return sorted(path for path in folder.iterdir() if fnmatch(path.name, pattern) and not hidden(path.name))


def name_bytes(name: str) -> bytes:
    """The bytes of a file's name, which on Linux need not be UTF-8."""
    return name.encode(errors="surrogateescape")


def digest(parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that differ where the texts, names of files among them, do."""
    total = hashlib.sha256()
    for part in parts:
        total.update(name_bytes(part))
        total.update(b"\0")
    return total.hexdigest()[:16]


def folders_in(folder: Path) -> list[str]:
    """The names of the folders right in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not hidden(path.name))


def inside(folder: Path, name: str, what: str) -> Path:
    """A file that a list names, by its path from the list's folder.

    Args:
        folder: the list's own.
        name: the path, as the list has it.
        what: what names it, for the error.

    Raises:
        ValueError: a path that leaves the folder: an absolute one, one with "..", or one through a link.
    """
    path = folder / name
    parts = Path(name.replace("\\", "/")).parts
    if os.path.isabs(name) or ".." in parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{what} must stay inside {folder}; got {name!r}")
    return path


def read_text(path: Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file, whatever ends its lines.

    Args:
        path: the file.
        encoding: its encoding.
        errors: what to do with bytes that are no text in it, as `bytes.decode` takes it.

    Raises:
        ValueError: a file that is no text in that encoding, or holds the byte 0, as no text does.
    """
    try:
        text = path.read_text(encoding=encoding, errors=errors)
    except UnicodeError as error:
        reason = f"byte {error.start + 1} is not" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"{path} must be text in {encoding}; {reason} ({other_encoding(path)})") from error
    if errors == "strict" and "\0" in text:
        raise ValueError(f"{path} must be text in {encoding}; it holds the byte 0 ({other_encoding(path)})")
    return text


def other_encoding(path: Path) -> str:
    """A clause on the option that reads a text file which is not in the encoding that was expected."""
    with path.open("rb") as file:
        first = file.read(_GUESSED)
    marked = next((name for mark, name in _MARKS.items() if first.startswith(mark)), None)
    if marked is None and first.count(0) * 4 > len(first):
        marked = "utf-16-le" if first[1::2].count(0) > first[::2].count(0) else "utf-16-be"
    return f"data.encoding={marked} reads it" if marked else "data.encoding names another, such as data.encoding=cp1252"


def check_texts(paths: Iterable[Path], encoding: str) -> None:
    """Read files before a run does, as long as they are no more than `CHECKED` bytes, so that it fails at once if at all.

    Raises:
        ValueError: as `read_text`.
    """
    size = 0
    for path in paths:
        size += path.stat().st_size
        if size > CHECKED:
            break
        read_text(path, encoding)


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: a file that is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} must be a JSON file; it is nested too deeply") from None
    except (OSError, ValueError) as error:  # which text that is no UTF-8 or no JSON raises too
        raise ValueError(f"{path} must be a JSON file; {error}") from error


def read_bytes(path: Path, expanded_gib: float = EXPANDED_GIB) -> bytes:
    """A file's content, expanded where gzip has compressed it.

    Raises:
        ValueError: a compressed file that is broken, or expands to more than `expanded_gib` GiB.
    """
    content = path.read_bytes()
    if not content.startswith(_GZIP):
        return content
    most, pieces, size = int(expanded_gib * 2**30), [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while piece := file.read(_PIECE):
                size += len(piece)
                if size > most:
                    raise ValueError(
                        f"{path} must expand to at most {expanded_gib:g} GiB, which data.expanded_gib raises; its "
                        f"{len(content)} bytes expand to more"
                    )
                pieces.append(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file; {error}") from error
    return b"".join(pieces)


def archive_files(path: Path, named: Callable[[str], str | None], expanded_gib: float = ARCHIVE_GIB) -> dict[str, bytes]:
    """Files of a tar archive, compressed or not, read as it comes; nothing is unpacked.

    Args:
        path: the archive.
        named: what to call a file by its name in the archive; None leaves it out.
        expanded_gib: the most GiB that they may hold together.

    Raises:
        ValueError: an archive that is broken, or holds more.
    """
    files: dict[str, bytes] = {}
    left = int(expanded_gib * 2**30)
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = named(member.name) if member.isfile() else None
                if name is None:
                    continue
                left -= member.size
                if left < 0:
                    raise ValueError(f"{path} must hold at most {expanded_gib:g} GiB of such files; it holds more")
                content = archive.extractfile(member)
                assert content is not None  # of a file
                files[name] = content.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} must be a whole tar archive; {error}") from error
    return files


def shown(names: Iterable[str], most: int = 5) -> str:
    """Some names for a message, and how many more there are."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
