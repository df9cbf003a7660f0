"""Checkpoints: written whole or not at all, so that a kill at any moment leaves a loadable latest one.

A checkpoint is a folder `checkpoints/step-XXXXXXXX` in the format of `torch.distributed.checkpoint`, to which every process
writes the shards that it holds, and from which any number of them reads those that it needs. Tensors are copied at once and
written by a thread while training goes on. A folder counts from the moment that the file `complete` lies in it, which is
written when everything else is on disk; others are what a kill has left over.

Only load checkpoints that you trust: the format's own index is a pickle.
"""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from kvbind.train.ranks import barrier, from_all, from_first, rank, ranks

FOLDER = "checkpoints"
COMPLETE, PLAIN = "complete", "plain.pt"
Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the part of a checkpoint they are in ("model", "trained", "optimizer"), and by name."""

_PREFIX, _TEMPORARY = "step-", ".partial"

# said of every save and load of a single process, also of one that asks for it
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` complete and on disk, or not at all."""
    partial = path.with_name(path.name + _TEMPORARY)
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries, such as a rename, on disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Saver:
    """Writes a run's checkpoints, one at a time, while training goes on.

    Every process makes one, and calls its methods in the same order as the others.

    Args:
        folder: of the run.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.home, self.keep = folder / FOLDER, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        # a group of its own: what the thread says must not mix with what training says
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if rank() == 0:
            self.home.mkdir(parents=True, exist_ok=True)
            for path in self.home.glob(f"{_PREFIX}*"):
                if path.is_dir() and not (path / COMPLETE).is_file():
                    shutil.rmtree(path)
        barrier()

    def save(self, step: int, tensors: Parts, plain: Any) -> None:
        """Take a copy of `tensors` and write it in the background, once the checkpoint before is written.

        Args:
            step: optimizer steps done.
            tensors: by part and name; whole, the same on every process, or DTensors.
            plain: any data besides that `torch.load(weights_only=True)` reads; the first process's count.

        Raises:
            OSError, RuntimeError: the checkpoint before could not be written.
        """
        self.wait()
        path = self.home / f"{_PREFIX}{step:08d}"
        if rank() == 0:
            path.mkdir(exist_ok=True)
            sync_folder(self.home)
            with atomic_write(path / PLAIN) as file:
                torch.save(plain, file)
        written = async_save(dict(tensors), checkpoint_id=path, process_group=self.group, no_dist=not dist.is_initialized())
        if not isinstance(written, Future):
            written = written.upload_completion
        self.pending = self.thread.submit(self._finish, written, path)

    def _finish(self, written: Future[Any], path: Path) -> None:
        written.result()
        if rank() == 0:
            write_text(path / COMPLETE, f"{path.name}\n")
            for old in complete(self.home)[: -self.keep]:
                (old / COMPLETE).unlink()  # first, so that what is half deleted counts no more
                shutil.rmtree(old)

    def wait(self) -> None:
        """Wait until this process's part of what was saved is written."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and let go of the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()


def complete(home: Path) -> list[Path]:
    """The complete checkpoints in a folder of them, oldest first."""
    return sorted(path.parent for path in home.glob(f"{_PREFIX}*/{COMPLETE}"))


def checkpoints(folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    return complete(folder / FOLDER)


def latest_path(folder: Path) -> Path | None:
    """A run's newest checkpoint, the same for every process, or None where it has none."""
    found = checkpoints(folder) if rank() == 0 else []
    return from_first(found[-1] if found else None)


def read_plain(path: Path) -> Any:
    """What a checkpoint holds besides tensors."""
    return torch.load(path / PLAIN, map_location="cpu", weights_only=True)


def stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shapes and dtypes of the tensors in a checkpoint, by name."""
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: x for name, x in described.items() if isinstance(x, TensorStorageMetadata)}


def load_into(path: Path, tensors: Parts) -> None:
    """Fill tensors, whole or DTensors of any mesh, with those of the same name in a checkpoint.

    Raises:
        RuntimeError: a tensor that the checkpoint does not hold, or holds in another shape.
    """
    load(dict(tensors), checkpoint_id=path, no_dist=not dist.is_initialized())


def latest_checkpoint(folder: Path, parts: Collection[str] = ()) -> dict[str, Any] | None:
    """The content of a run's newest checkpoint, whole, on the CPU, or None where it has none.

    Args:
        folder: of the run.
        parts: which of "model", "trained" and "optimizer" to read; default all that there is.

    Returns:
        The parts, each a dict of tensors by name, and the plain data beside them.
    """
    found = checkpoints(folder)
    if not found:
        return None
    empty = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in stored(found[-1]).items()
        if not parts or name.partition(".")[0] in parts
    }
    load(empty, checkpoint_id=found[-1], no_dist=True)
    content: dict[str, Any] = {}
    for name, tensor in empty.items():
        part, _, rest = name.partition(".")
        content.setdefault(part, {})[rest] = tensor
    return content | read_plain(found[-1])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, in place, by the names of the parameters."""
    return {
        f"{name}.{key}": x
        for name, parameter in model.named_parameters()
        for key, x in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Give an optimizer that has not taken a step the state that a checkpoint has, to be filled."""
    known = stored(path)
    for name, parameter in model.named_parameters():
        start = f"optimizer.{name}."
        # no name goes on behind a parameter's: it would be a module too
        fields = {key.removeprefix(start): x for key, x in known.items() if key.startswith(start)}
        for key, x in fields.items():
            like = x.size == parameter.shape and key != "step"
            optimizer.state[parameter][key] = (
                torch.empty_like(parameter, dtype=x.properties.dtype, requires_grad=False)
                if like
                else torch.empty(x.size, dtype=x.properties.dtype, device=parameter.device)
            )


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from: torch's, the current GPU's, Python's, and numpy's."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))


def random_states() -> list[dict[str, Any]]:
    """The random state of every process."""
    return from_all(random_state())


def restore_random_states(states: list[dict[str, Any]], stream: int) -> None:
    """Put back this process's own of what `random_states` gave; among other processes, something that follows from it.

    Args:
        states: of every process that there was.
        stream: number of the data rank, each of which draws its own.
    """
    if len(states) == ranks():
        restore_random_state(states[rank()])
    else:
        restore_random_state(states[0])
        part_ways(stream)


def part_ways(stream: int) -> None:
    """Let a data rank draw otherwise than the first, where all have drawn the same so far; the first goes on as it is."""
    if stream:
        torch.manual_seed(int(np.random.default_rng((torch.initial_seed(), stream)).integers(2**62)))


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name with the same suffix, then move it to `path`; its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{_TEMPORARY}{path.suffix}")
    write(partial)
    partial.replace(path)
