"""How a checkpoint lies on disk: tensors as they are in memory, an index in JSON, and a checksum of every file.

`torch.distributed.checkpoint` says which process holds which piece of a tensor, and which pieces a process needs that holds
others. Its own files are pickles; these are not, so that to read one runs no code.

- `shard-NNNNN.bin` holds the pieces of process `NNNNN`, one behind the other.
- `index.json` holds each tensor's dtype and shape, and of each of its pieces the offsets, shape, file and place in it.
- `complete` holds the size and SHA-256 of every other file. It is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from kvbind.train.files import from_json, open_own, write_text
from kvbind.train.ranks import from_all, rank, ranks

COMPLETE, INDEX, FORMAT = "complete", "index.json", 1


class BrokenCheckpointError(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class PiecePlace:
    """Where a piece of a tensor is.

    Attributes:
        file: its name in the checkpoint's folder.
        start: of its bytes.
        size: how many those are.
        digest: SHA-256 of the whole file, hexadecimal, where it has just been written.
        length: of the whole file in bytes, likewise.
    """

    file: str
    start: int
    size: int
    digest: str = ""
    length: int = 0


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor, and where it is."""

    offsets: torch.Size
    shape: torch.Size
    place: PiecePlace


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint.

    Attributes:
        dtype: of the tensor.
        shape: of the whole.
        pieces: which make it up.
    """

    dtype: torch.dtype
    shape: torch.Size
    pieces: tuple[Piece, ...]


class Writer(StorageWriter):
    """Writes the pieces that this process holds, and on the first process the index.

    Args:
        folder: of the checkpoint, which exists.

    Attributes:
        files: size and SHA-256 of every file that all processes have written, by name; on the first process, in the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, digest = f"shard-{rank():05d}.bin", hashlib.sha256()
        written, start = [], 0
        done: Future[list[WriteResult]] = Future()
        if not plan.items:
            done.set_result([])
            return done
        with os.fdopen(open_own(self.folder / name, os.O_WRONLY | os.O_TRUNC), "wb", buffering=0) as file:
            for item in plan.items:
                if item.type == WriteItemType.BYTE_IO:
                    raise TypeError(f"a checkpoint holds tensors alone; {item.index.fqn!r} is none")
                content = as_bytes(planner.resolve_data(item))  # type: ignore[arg-type]
                digest.update(content)
                left = content
                while left.nbytes:  # a system writes no more than some 2 GB at once
                    left = left[file.write(left) :]
                written.append((item.index, start, content.nbytes))
                start += content.nbytes
            os.fsync(file.fileno())
        found = digest.hexdigest()
        done.set_result([WriteResult(i, size, PiecePlace(name, at, size, found, start)) for i, at, size in written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for written in results for result in written}
        tensors: dict[str, Any] = {}
        for name, x in metadata.state_dict_metadata.items():
            assert isinstance(x, TensorStorageMetadata)
            pieces = []
            for chunk in x.chunks:
                place = places[MetadataIndex(name, chunk.offsets)]
                self.files[place.file] = {"bytes": place.length, "sha256": place.digest}
                pieces.append([list(chunk.offsets), list(chunk.sizes), place.file, place.start])
            dtype = str(x.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(x.size), "pieces": pieces}
        write_text(self.folder / INDEX, json.dumps({"format": FORMAT, "tensors": tensors}) + "\n")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class PieceReader(StorageReader):
    """Reads the pieces that this process needs.

    Args:
        folder: of a complete checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored = read_index(folder)
        self.places = {
            MetadataIndex(name, piece.offsets): (x.dtype, piece) for name, x in self.stored.items() for piece in x.pieces
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(x.dtype), x.shape, [ChunkStorageMetadata(p.offsets, p.shape) for p in x.pieces]
                )
                for name, x in self.stored.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            dtype, piece = self.places[item.storage_index]
            x = read_piece(self.folder, dtype, piece)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                x = x.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(x)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def as_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU or elsewhere."""
    flat = x.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def read_piece(folder: Path, dtype: torch.dtype, piece: Piece) -> Tensor:
    """A piece of a tensor, on the CPU."""
    content = bytearray(piece.place.size)
    with (folder / piece.place.file).open("rb", buffering=0) as file:
        file.seek(piece.place.start)
        left = memoryview(content)
        while left.nbytes:
            read = file.readinto(left)
            if not read:
                raise BrokenCheckpointError(f"{folder / piece.place.file} is too short")
            left = left[read:]
    return torch.frombuffer(content, dtype=dtype).reshape(piece.shape) if content else torch.empty(piece.shape, dtype=dtype)


def read_index(folder: Path) -> dict[str, Stored]:
    """The tensors in a complete checkpoint, by name.

    Raises:
        BrokenCheckpointError: an index that says something that cannot be.
    """
    files = read_marker(folder)
    try:
        index = from_json((folder / INDEX).read_bytes())
        stored = {}
        for name, x in index["tensors"].items():
            dtype, shape = getattr(torch, x["dtype"]), torch.Size(x["shape"])
            pieces = []
            for offsets, sizes, file, start in x["pieces"]:
                size = math.prod(sizes) * dtype.itemsize
                inside = all(min(o, n) >= 0 and o + n <= m for o, n, m in zip(offsets, sizes, shape, strict=True))
                if not inside or not 0 <= start <= files[file]["bytes"] - size:
                    raise ValueError(f"{name!r} has a piece that is not in it")
                pieces.append(Piece(torch.Size(offsets), torch.Size(sizes), PiecePlace(file, start, size)))
            stored[name] = Stored(dtype, shape, tuple(pieces))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpointError(f"{folder / INDEX} is no index of a checkpoint: {error!r}") from error
    return stored


def mark(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Mark a checkpoint as complete.

    Args:
        folder: of the checkpoint.
        files: size and SHA-256 of every file, by name.
    """
    write_text(folder / COMPLETE, json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")


def read_marker(folder: Path) -> dict[str, Any]:
    """What `mark` was given.

    Raises:
        BrokenCheckpointError: no marker, or a broken one.
    """
    try:
        marker = from_json((folder / COMPLETE).read_bytes())
    except FileNotFoundError:
        raise BrokenCheckpointError(f"its marker {COMPLETE!r} is missing") from None
    except (OSError, ValueError) as error:
        raise BrokenCheckpointError(f"its marker {COMPLETE!r} cannot be read: {error}") from None
    if not isinstance(marker, dict) or not isinstance(marker.get("files"), dict) or INDEX not in marker["files"]:
        raise BrokenCheckpointError(f"its marker {COMPLETE!r} lists no files")
    if marker.get("format") != FORMAT:
        raise BrokenCheckpointError(f"its format is {marker.get('format')!r}, where this version reads {FORMAT}")
    for name, facts in marker["files"].items():
        if Path(name).name != name or not isinstance(facts, dict) or not isinstance(facts.get("bytes"), int):
            raise BrokenCheckpointError(f"its marker {COMPLETE!r} lists {name!r}, which is no file of a checkpoint")
    return marker["files"]


def fault(folder: Path, alone: bool = False) -> str | None:
    """What is wrong with a checkpoint, the same on every process, each of which reads a part of it; None where it is whole.

    Args:
        folder: of the checkpoint.
        alone: whether this process reads all of it and tells no other.
    """
    place, count = (0, 1) if alone else (rank(), ranks())
    try:
        own = next((why for why in map(wrong, *own_files(folder, place, count)) if why), None)
    except BrokenCheckpointError as error:
        own = str(error)
    found = [own] if alone else from_all(own)
    return next((why for why in found if why), None)


def own_files(folder: Path, place: int, count: int) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files of a checkpoint that one of `count` processes reads, and what the marker says of each."""
    files = sorted(read_marker(folder).items(), key=lambda entry: -entry[1]["bytes"])[place::count]
    return [folder / name for name, _ in files], [facts for _, facts in files]


def wrong(path: Path, facts: Mapping[str, Any]) -> str | None:
    """How a file differs from what was written, or None."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for whoever writes to it
            return f"{path.name} is no file"
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != facts["bytes"]:
                return f"{path.name} has {size} bytes of {facts['bytes']}"
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.get("sha256"):
                return f"{path.name} has another checksum"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None


def facts_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
