"""What sequence parallelism sends: bytes by collective, and the time that GPUs wait for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Traffic:
    """The exchanges that this rank took part in while a `count_bytes` was open.

    Attributes:
        received: bytes that came from other ranks, by what they were for: "halo", "scan" or "ring".
        sent: bytes that this rank handed to collectives for others; "scan" gathers one message of each rank.
        calls: how many exchanges there were.
        timed: whether waits on CUDA streams are timed.
    """

    received: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    timed: bool = False
    _waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @property
    def total(self) -> int:
        """All bytes received."""
        return sum(self.received.values())

    def waited_ms(self) -> float:
        """Milliseconds that the compute streams of this rank stood still for exchanges; needs `timed`."""
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(stop) for start, stop in self._waits))


_OPEN: list[Traffic] = []


@contextmanager
def count_bytes(timed: bool = False) -> Iterator[Traffic]:
    """Count what exchanges move inside, forward and backward, on this rank.

    Args:
        timed: also time, with CUDA events, how long compute streams wait.
    """
    traffic = Traffic(timed=timed)
    _OPEN.append(traffic)
    try:
        yield traffic
    finally:
        _OPEN.remove(traffic)


def record(kind: str, sent: int, received: int) -> None:
    """Enter one exchange into every open count."""
    for traffic in _OPEN:
        for table, n in ((traffic.sent, sent), (traffic.received, received), (traffic.calls, 1)):
            table[kind] = table.get(kind, 0) + n


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """Around a wait: times it for those counts that want it."""
    timing = [traffic for traffic in _OPEN if traffic.timed] if device.type == "cuda" else []
    if not timing:
        yield
        return
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    yield
    stop.record()
    for traffic in timing:
        traffic._waits.append((start, stop))
