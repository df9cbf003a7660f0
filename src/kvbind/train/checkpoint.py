"""Checkpoints: written whole or not at all, so that a kill at any moment leaves a loadable latest one.

A checkpoint is a folder `checkpoints/step-XXXXXXXX`, to which every process writes the pieces of tensors that it holds, and
from which any number of them reads those that it needs (`kvbind.train.storage` says how they lie there). Tensors are copied
at once and written by a thread while training goes on, into a folder of another name, which gets its own when everything is
on disk. A checksum of every file is verified before a run goes on from it; where one is not what was written, the next older
checkpoint counts.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from kvbind.train.files import TEMPORARY, atomic_write, remove, sync_folder
from kvbind.train.ranks import barrier, from_all, from_first, rank, ranks
from kvbind.train.storage import COMPLETE, INDEX, PieceReader, Writer, facts_of, fault, mark, read_index

FOLDER = "checkpoints"
PLAIN = "plain.pt"
REPLACED = ".replaced"
"""The folder, in a run's, of what `--fresh` has put aside, until the new run has a checkpoint."""

Parts = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the part of a checkpoint they are in ("model", "trained", "optimizer"), and by name."""

_NAME = re.compile(r"step-\d{8,}")
_UNFINISHED = re.compile(rf"\.step-\d{{8,}}{re.escape(TEMPORARY)}")
_ASIDE = re.compile(r"step-\d{8,}\.broken")

log = logging.getLogger("kvbind.train")

# said of every save and load of a single process, also of one that asks for it
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Saver:
    """Writes a run's checkpoints, one at a time, while training goes on.

    Every process makes one, and calls its methods in the same order as the others.

    Args:
        folder: of the run.
        keep: how many checkpoints stay.
        broken: names of checkpoints that are none, which get other names.
    """

    def __init__(self, folder: Path, keep: int, broken: Collection[str] = ()) -> None:
        self.folder, self.home, self.keep = folder, folder / FOLDER, keep
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None
        # a group of its own: what the thread says must not mix with what training says
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        if rank() == 0:
            self.home.mkdir(parents=True, exist_ok=True)
            for name in broken:
                set_aside(self.home / name)
            for path in self.home.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    remove(path)
        barrier()

    def save(self, step: int, tensors: Parts, plain: Any) -> None:
        """Take a copy of `tensors` and write it in the background, once the checkpoint before is written.

        Args:
            step: optimizer steps done.
            tensors: by part and name; whole, the same on every process, or DTensors.
            plain: any data besides that `torch.load(weights_only=True)` reads; the first process's count.

        Raises:
            OSError: the checkpoint before, or this one, could not be written; what it took of the disk is given back.
        """
        self.wait()
        path = self.home / f"step-{step:08d}"
        partial, trouble = unfinished(path), None
        if rank() == 0:
            try:
                self._begin(partial, plain)
            except OSError as error:
                trouble = unwritten(path, error)
        trouble = from_first(trouble)  # also, no other process writes into a folder that is not there yet
        if trouble is not None:
            raise OSError(trouble)
        writer = Writer(partial)
        written = async_save(
            dict(tensors),
            storage_writer=writer,
            async_stager=BlockingAsyncStager(),
            process_group=self.group,
            no_dist=not dist.is_initialized(),
        )
        if not isinstance(written, Future):
            written = written.upload_completion
        self.pending = self.thread.submit(self._finish, written, writer, path)

    def _begin(self, partial: Path, plain: Any) -> None:
        """Make the folder, with all but tensors in it."""
        content = io.BytesIO()
        torch.save(plain, content)
        remove(partial)
        partial.mkdir()
        try:
            sync_folder(self.home)
            with atomic_write(partial / PLAIN) as file:
                file.write(content.getbuffer())
        except OSError:
            remove(partial)
            raise

    def _finish(self, written: Future[Any], writer: Writer, path: Path) -> None:
        partial = writer.folder
        try:
            written.result()
            if rank() == 0:
                mark(partial, {name: facts_of(partial / name) for name in (PLAIN, INDEX)} | writer.files)
                if path.is_dir():  # what lies there was broken, or is the user's own
                    set_aside(path)
                partial.rename(path)
                sync_folder(self.home)
        except CheckpointException as error:  # no Exception, and with the whole stack of every process in its text
            cause = next(iter(error.failures.values()))[0]
            self._give_up(partial)
            raise (OSError if isinstance(cause, OSError) else RuntimeError)(unwritten(path, cause)) from cause
        except OSError as error:
            self._give_up(partial)
            raise OSError(unwritten(path, error)) from error
        if rank() == 0:
            for old in complete(self.home)[: -self.keep]:
                doomed = unfinished(old)
                remove(doomed)
                old.rename(doomed)  # first, so that what is half deleted counts no more
                remove(doomed)
            remove(self.folder / REPLACED)

    def _give_up(self, partial: Path) -> None:
        if rank() == 0:
            remove(partial)

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


def unwritten(path: Path, cause: BaseException) -> str:
    """Says that a checkpoint could not be written."""
    return f"checkpoint {path} could not be written: {cause}; the run goes on from the one before"


def unfinished(path: Path) -> Path:
    """Where a checkpoint is while it is written or deleted."""
    return path.with_name(f".{path.name}{TEMPORARY}")


def set_aside(path: Path) -> Path:
    """Rename a folder that counts no more for a checkpoint; an earlier one of the new name is removed."""
    aside = path.with_name(path.name + ".broken")
    remove(aside)
    return path.rename(aside)


def named(home: Path) -> list[Path]:
    """The folders that have a checkpoint's name, oldest first."""
    found = (path for path in home.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.partition("-")[2])


def complete(home: Path) -> list[Path]:
    """The complete checkpoints in a folder of them, oldest first."""
    return [path for path in named(home) if (path / COMPLETE).is_file()]


def checkpoints(folder: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    return complete(folder / FOLDER)


def newest_whole(folder: Path, alone: bool = False) -> tuple[Path | None, dict[str, str]]:
    """A run's newest checkpoint that is what was written, the same for every process, which verify it together.

    Args:
        folder: of the run.
        alone: whether this process asks by itself.

    Returns:
        The checkpoint, or None where there is none at all, and what is wrong with newer ones, by name.

    Raises:
        ValueError: there are checkpoints, and not one is whole.
    """
    first = alone or rank() == 0
    found = named(folder / FOLDER) if first else []
    found = found if alone else from_first(found)
    broken: dict[str, str] = {}
    for path in reversed(found):
        why = fault(path, alone)
        if why is None:
            if broken and first:
                newest = max(step_of(path.with_name(name)) for name in broken)
                lost = newest - step_of(path)
                for name, reason in broken.items():
                    log.warning("checkpoint %s is broken: %s", path.with_name(name), reason)
                log.warning("%s is the newest whole one: %d steps are lost", path, lost)
            return path, broken
        broken[path.name] = why
    if broken:
        raise ValueError(
            f"no checkpoint in {folder / FOLDER} is whole ({'; '.join(f'{name}: {why}' for name, why in broken.items())}); "
            "--fresh begins anew"
        )
    return None, {}


def read_plain(path: Path) -> Any:
    """What a checkpoint holds besides tensors."""
    return torch.load(path / PLAIN, map_location="cpu", weights_only=True)


def load_into(path: Path, tensors: Parts) -> None:
    """Fill tensors, whole or DTensors of any mesh, with those of the same name in a checkpoint.

    Raises:
        RuntimeError: a tensor that the checkpoint does not hold, or holds in another shape.
    """
    filled(path, dict(tensors), not dist.is_initialized())


def filled(path: Path, tensors: dict[str, Any], alone: bool) -> None:
    """Fill tensors; errors that the library has wrapped come as they were."""
    try:
        load(tensors, storage_reader=PieceReader(path), no_dist=alone)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{path} could not be loaded: {cause}") from cause


def latest_checkpoint(folder: Path, parts: Collection[str] = ()) -> dict[str, Any] | None:
    """The content of a run's newest whole checkpoint, on the CPU, or None where it has none.

    Args:
        folder: of the run.
        parts: which of "model", "trained" and "optimizer" to read; default all that there is.

    Returns:
        The parts, each a dict of tensors by name, and the plain data beside them.

    Raises:
        ValueError: there are checkpoints, and not one is whole.
    """
    path, _ = newest_whole(folder, alone=True)
    if path is None:
        return None
    empty = {
        name: torch.empty(x.shape, dtype=x.dtype)
        for name, x in read_index(path).items()
        if not parts or name.partition(".")[0] in parts
    }
    filled(path, empty, alone=True)
    content: dict[str, Any] = {}
    for name, tensor in empty.items():
        part, _, rest = name.partition(".")
        content.setdefault(part, {})[rest] = tensor
    return content | read_plain(path)


def put_aside(folder: Path, first: Sequence[str], last: Sequence[str]) -> None:
    """Put a run's files aside, to be removed when the one that replaces it has its first checkpoint.

    What an earlier call has put aside, of a run that has no such successor yet, stays, and what its successor has left is
    removed. Whatever else is in the folder stays where it is.

    Args:
        folder: of the run.
        first: names of its files and folders there that go before its checkpoints.
        last: of those that go behind them.
    """
    aside, home = folder / REPLACED, folder / FOLDER
    saved = sorted(
        path for path in home.glob("*") if any(kind.fullmatch(path.name) for kind in (_NAME, _UNFINISHED, _ASIDE))
    )
    for path in (*(folder / name for name in first), *saved, *(folder / name for name in last)):
        target = aside / path.relative_to(folder)
        if not os.path.lexists(path):
            continue
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        elif path.is_file():
            path.unlink()
        else:
            remove(path)
    sync_folder(folder)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, in place, by the names of the parameters."""
    return {
        f"{name}.{key}": x
        for name, parameter in model.named_parameters()
        for key, x in optimizer.state.get(parameter, {}).items()
    }


def empty_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Give an optimizer that has not taken a step the state that a checkpoint has, to be filled."""
    known = read_index(path)
    for name, parameter in model.named_parameters():
        start = f"optimizer.{name}."
        # no name goes on behind a parameter's: it would be a module too
        fields = {key.removeprefix(start): x for key, x in known.items() if key.startswith(start)}
        for key, x in fields.items():
            like = x.shape == parameter.shape and key != "step"
            optimizer.state[parameter][key] = (
                torch.empty_like(parameter, dtype=x.dtype, requires_grad=False)
                if like
                else torch.empty(x.shape, dtype=x.dtype, device=parameter.device)
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
