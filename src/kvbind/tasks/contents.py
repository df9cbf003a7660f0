"""What data a run is trained on, recorded in its folder, so that none which have changed are mixed in unnoticed.

The record holds each local file's name, size and time of last change, and, where all of them together have at most `HASHED`
bytes, a hash of each content. Where there are hashes they decide: any edit is seen, and a copy of the same files, or a new
time, is no change. Of larger data size and time decide: an edit that keeps both is not seen, and copies must keep times
(`cp -p`, `rsync -t`). Data that are no local files are told apart by what their source says, such as a revision of the hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvbind.tasks.files import shown
from kvbind.train.files import write_text

RECORD = "data.json"
"""The record's file in a run's folder."""

HASHED = 256 * 2**20
"""The largest data, in bytes, whose contents are hashed; what a start may read without being noticed."""

OPTION = "--accept-changed-data"


@dataclass(frozen=True)
class Contents:
    """What data are made of.

    Attributes:
        files: local files, by the name that a user knows them by.
        others: what tells data apart that are no files, by the name of their source.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Contents) -> Contents:
        return Contents({**self.files, **other.files}, {**self.others, **other.others})


def content_hash(path: Path) -> str:
    """Thirty-two hexadecimal digits that differ where the bytes of a file do."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def record(contents: Contents) -> dict[str, Any]:
    """The record of data as they are now, as plain data: "files", each a list of size, time in ns and hash, and "others"."""
    stats = {name: path.stat() for name, path in contents.files.items()}
    hashed = sum(stat.st_size for stat in stats.values()) <= HASHED
    files = {
        name: [stat.st_size, stat.st_mtime_ns, content_hash(contents.files[name]) if hashed else None]
        for name, stat in stats.items()
    }
    return {"files": files, "others": dict(contents.others)}


def changes(old: Mapping[str, Any], contents: Contents) -> dict[str, list[str]]:
    """What is "edited", "removed" and "added" since a record was made, by name; what is not is left out."""
    before, now = old["files"], contents.files

    def edited(name: str) -> bool:
        size, time, known = before[name]
        stat = now[name].stat()
        if known is None or stat.st_size != size:
            return (stat.st_size, stat.st_mtime_ns) != (size, time)
        return content_hash(now[name]) != known

    others = [name for name in {**old["others"], **contents.others} if old["others"].get(name) != contents.others.get(name)]
    found = {
        "edited": [*(name for name in sorted(before.keys() & now.keys()) if edited(name)), *others],
        "removed": sorted(before.keys() - now.keys()),
        "added": sorted(now.keys() - before.keys()),
    }
    return {how: names for how, names in found.items() if names}


def check_unchanged(folder: Path, contents: Contents, done: Sequence[Path], accept: bool = False) -> None:
    """Record the data of a run that begins; of one that goes on, refuse others than it has been trained on.

    Args:
        folder: of the run. A run that has no record yet, as it is an earlier version's, gets one.
        contents: the data as they are now.
        done: the run's checkpoints, oldest first.
        accept: go on with changed data, which the record then says, with what changed and behind which checkpoint.

    Raises:
        ValueError: the data have changed; the message says which files.
    """
    path = folder / RECORD
    if not done or not path.is_file():
        write_text(path, json.dumps(record(contents)) + "\n")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = changes(old, contents)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the record of a run's data; {error} (without it, the run goes on unchecked)"
        ) from None
    if not changed:
        return
    if not accept:
        told = "; ".join(f"{how} {shown(names)}" for how, names in changed.items())
        raise ValueError(
            f"{folder} holds a run on data that have changed since ({told}); put them back, name another folder, or go on "
            f"with {OPTION}"
        )
    entry = {"behind": done[-1].name, "at": datetime.now(UTC).isoformat(timespec="seconds"), **changed}
    write_text(path, json.dumps({**record(contents), "accepted": [*old.get("accepted", ()), entry]}) + "\n")


def accepted(folder: Path) -> list[str]:
    """The checkpoints behind which a run went on with changed data, by name."""
    path = folder / RECORD
    entries = json.loads(path.read_text(encoding="utf-8")).get("accepted", ()) if path.is_file() else ()
    return [entry["behind"] for entry in entries]
