"""The Linux kernel's C source, where Debian's package `linux-source` puts it: long text of one kind, whose parts refer far.

Some 570 MB of C. A document is a folder: its files in the order of their paths, so that long sequences run on from file to
file of one driver or subsystem. `OTHERS` are subsystems that the source "linux" has not: text to evaluate on, which shares
nothing with what was trained on but the language and the house.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import Indexed
from kvbind.tasks.files import archive_files, digest, files_below, read_text

LINUX, OTHERS_NAME = "linux", "linux-others"
"""The sources by name."""

OTHERS = ("block", "crypto", "io_uring", "ipc", "mm", "security", "virt")
"""Subsystems of the source "linux-others", 13 MB."""

LEFT_OUT = ("samples", "scripts", "tools", "usr")
"""What is no part of the kernel itself."""

SUFFIXES = (".c",)
"""Headers are tables of registers for the most part."""

PLACE, VARIABLE = Path("/usr/src"), "KVBIND_LINUX"
"""Where the package installs it, and the variable that names another place: a tarball, or the folder that it unpacks to."""

_NAMED = re.compile(r"linux-source-(\d+(?:\.\d+)*)(\.tar\.\w+)?")


class Folders(Indexed):
    """Text files, those of each folder joined in the order of their paths.

    Args:
        files: the files' sizes by path.
        folders: those to read.
        root: the folder that they are in; or their contents by path.
        what: what to call it.
    """

    def __init__(
        self, files: Mapping[str, int], folders: Sequence[str], root: Path | Mapping[str, bytes], what: str
    ) -> None:
        self.folders, self.root, self.what = tuple(folders), root, what
        self.files: dict[str, list[str]] = {folder: [] for folder in self.folders}
        self.sizes = {name: size for name, size in files.items() if folder_of(name) in self.files}
        for name in sorted(self.sizes):
            self.files[folder_of(name)].append(name)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> str:
        return "\n".join(self._read(name) for name in self.files[self.folders[index]])

    def _read(self, name: str) -> str:
        if isinstance(self.root, Path):
            return read_text(self.root / name, errors="replace")
        return self.root[name].decode(errors="replace")

    def fingerprint(self) -> str:
        return digest(f"{name}:{size}" for name, size in sorted(self.sizes.items()))

    def contents(self) -> Contents:
        # by what they are, not where: a tarball and what it unpacks to are the same text
        return Contents(others={self.what: self.fingerprint()})


def open_kernel(others: bool) -> tuple[Mapping[str, int], Path | Mapping[str, bytes]]:
    """The kernel's C files: their sizes by path, and the folder that they are in, or their contents by path.

    Args:
        others: those of `OTHERS`, or all but those.

    Raises:
        ValueError: there is none, or something else.
    """
    place = found()
    if place.is_dir():
        root: Path | Mapping[str, bytes] = place
        paths = {name: place / name for name in files_below(place, SUFFIXES)}
        files = {name: path.stat().st_size for name, path in paths.items() if not path.is_symlink()}
    else:
        stat = place.stat()
        root = _read_once(place, stat.st_size, stat.st_mtime_ns)
        files = {name: len(text) for name, text in root.items()}
    own = {name: size for name, size in files.items() if size and belongs_to(name, others)}
    if not own:
        raise ValueError(f"{VARIABLE} must name the Linux kernel's source; {str(place)!r} holds no such C files")
    return own, root


def belongs_to(name: str, others: bool) -> bool:
    """Whether the file at a path below the kernel's folder is a file of the one source or the other."""
    top = name.partition("/")[0]
    return name.endswith(SUFFIXES) and "/" in name and top not in LEFT_OUT and (top in OTHERS) == others


def folders_of(files: Iterable[str]) -> list[str]:
    """The folders that files are in, sorted."""
    return sorted({folder_of(name) for name in files})


def folder_of(name: str) -> str:
    """The folder of a path."""
    return name.rpartition("/")[0]


def found() -> Path:
    """The kernel's source: what `KVBIND_LINUX` names, or the newest installed one, unpacked where somebody has done so.

    Raises:
        ValueError: there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).exists():
            raise ValueError(f"{VARIABLE} must name a tarball or folder that exists; got {named!r}")
        return Path(named)
    versions = []
    for path in PLACE.glob("linux-source-*"):
        match = _NAMED.fullmatch(path.name)
        if match is not None and path.is_dir() == (match[2] is None):
            versions.append(([int(part) for part in match[1].split(".")], path.is_dir(), path))
    if not versions:
        raise ValueError(
            f"data.source {LINUX!r} is the Linux kernel's source as Debian's package linux-source installs it; there is no "
            f"{PLACE}/linux-source-*.tar.xz here: apt-get install linux-source (or set {VARIABLE} to such a tarball, or to "
            "the folder that it unpacks to)"
        )
    return max(versions)[2]


@functools.lru_cache(maxsize=1)
def _read_once(place: Path, size: int, changed: int) -> dict[str, bytes]:
    """The C files of a tarball, which takes some ten seconds, once in a process; its size and time tell it apart."""

    def inside(name: str) -> str | None:
        own = name.removeprefix("./").partition("/")[2]  # below the archive's one folder
        return own if belongs_to(own, True) or belongs_to(own, False) else None

    return archive_files(place, inside)
