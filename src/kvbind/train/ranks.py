"""The processes of a run: who they are, what each reads, and the few words they exchange outside of gradients.

`torchrun` says in the environment who a process is. Without it there is one process, no process group, and every function
here is its own trivial case.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = 600
"""Seconds to wait for all processes to start."""


@contextmanager
def connected(device: str = "auto") -> Iterator[None]:
    """Join the processes that `torchrun` started, and part from them in the end; nothing for a single one.

    Args:
        device: "auto", or a torch device; GPUs are spoken between through NCCL, one per process, anything else through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda"):
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
        # the only messages between two ranks are those of a sequence's ring, which are meant to come one after another
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    else:
        own, backend = None, "gloo"
    store, number, count = next(dist.rendezvous("env://"))
    # torchrun keeps one store through all restarts, in which addresses of processes that died are still to be found
    store = dist.PrefixStore(agreed_word(store, number, count), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, device_id=own)
    _RESTARTS[0] = max(from_all(_own_restarts()))
    try:
        yield
    finally:
        dist.destroy_process_group()


def agreed_word(store: dist.Store, number: int, count: int) -> str:
    """A word that all processes agree on and no earlier ones have used.

    Every process but the first asks with a word of its own until the first has answered to that; so neither takes what the
    dead have left for an answer.

    Args:
        store: that all of them see.
        number: of this process.
        count: of them all.

    Raises:
        TimeoutError: some process did not ask.
    """
    own = uuid.uuid4().hex
    if number:
        store.set(f"kvbind/asks/{number}", own)
        word = store.get(f"kvbind/answers/{own}").decode()
        store.set(f"kvbind/heard/{word}/{number}", "")
        return word
    missing, until = set(range(1, count)), time.monotonic() + PATIENCE
    while missing:
        for other in sorted(missing):
            if store.check([f"kvbind/heard/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"kvbind/asks/{other}"]):
                store.set(f"kvbind/answers/{store.get(f'kvbind/asks/{other}').decode()}", own)
        if time.monotonic() > until:
            raise TimeoutError(f"processes {sorted(missing)} of {count} did not start within {PATIENCE} s")
        time.sleep(0.01)
    return own


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restarted() -> bool:
    """Whether `torchrun` has started the processes anew after one failed; before they are connected, one of this node."""
    return max(_RESTARTS[0], _own_restarts()) > 0


def _own_restarts() -> int:
    # of this node alone: torchrun counts failures where they happen, and starts the processes of all nodes anew
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


_RESTARTS = [0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: T) -> T:
    """Plain data as the first process has it."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """Plain data of every process, in the order of their numbers."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def stacked(numbers: Tensor) -> Tensor:
    """`numbers` `[n]` of every process, `[ranks, n]`."""
    if not dist.is_initialized():
        return numbers[None]
    found = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(found, numbers)
    return torch.stack(found)


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one dtype by their means over all processes."""
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def united(parts: Sequence[Any]) -> Any:
    """Plain data of several processes as one: dictionaries key by key, of anything else the first."""
    if not all(isinstance(part, dict) for part in parts):
        return parts[0]
    keys = {key: None for part in parts for key in part}
    return {key: united([part[key] for part in parts if key in part]) for key in keys}


@dataclass(frozen=True)
class Share:
    """What one data rank reads: a part of the rows of every batch, or of every so many-th batch.

    Ranks divide a step's `accumulate x batch` rows evenly, so that all of them together see what a single process sees: the
    rows of each batch as far as they can be divided, whole batches beyond that.

    Attributes:
        part: which rows of a batch, out of `parts` equal parts.
        parts: how many ranks share a batch.
        turn: the first batch, out of `turns`.
        turns: every how many-th batch.
        group: the processes whose shares make up the whole, one per data rank; None for all that there are.
        sequence: the processes that have this share in common and divide each of its sequences; None for this one alone.
    """

    part: int = 0
    parts: int = 1
    turn: int = 0
    turns: int = 1
    group: Any = None
    sequence: Any = None

    @classmethod
    def of(cls, index: int, count: int, batch: int, accumulate: int, group: Any = None, sequence: Any = None) -> Share:
        """The share of data rank `index` of `count`.

        Raises:
            ValueError: rows that cannot be divided evenly.
        """
        parts = math.gcd(count, batch)
        turns = count // parts
        if accumulate % turns:
            raise ValueError(
                f"data.batch and train.accumulate must divide evenly among {count} data ranks: a batch of {batch} goes to "
                f"{parts} of them, so that train.accumulate must be a multiple of {turns}; got {accumulate}"
            )
        return cls(index % parts, parts, index // parts, turns, group, sequence)

    @property
    def index(self) -> int:
        """Number of the data rank."""
        return self.turn * self.parts + self.part

    @property
    def count(self) -> int:
        """How many data ranks there are."""
        return self.parts * self.turns

    def rows(self, batch: int) -> range:
        """Consecutive rows of a batch of `batch`."""
        size = batch // self.parts
        return range(self.part * size, (self.part + 1) * size)

    def of_items(self, items: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Every `count`-th of some items, the same number for each rank, and whether it counts.

        Ranks that run a sharded model must call it equally often. One that has run out of items gets the last again, which
        does not count.
        """
        for start in range(0, len(items), self.count):
            place = start + self.index
            yield items[min(place, len(items) - 1)], place < len(items)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of the data ranks' `numbers`; where they divide sequences, of those that share a sequence too."""
        if self.count > 1:
            dist.all_reduce(numbers, group=self.group)
        if self.sequence is not None:
            dist.all_reduce(numbers, group=self.sequence)
        return numbers


WHOLE = Share()
"""What a single process reads: everything."""
