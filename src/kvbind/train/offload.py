"""Tensors that autograd keeps, in host memory: copied there while a GPU goes on computing, and back before they are needed.

For tensors that are kept one after another and needed again in the reverse order, as the inputs of a model's blocks are. One
is on its way at any time: out, while the block that it enters is computed; back, while the block behind that one is computed
backward. So a GPU holds two of them: the one in use, and the one that comes next.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

PIECE_BYTES = 1 << 28
"""Pinned memory is asked for in pieces of this size, as torch rounds what is asked for up to a power of two."""


class OffloadedTensor:
    """One tensor, in host memory and for some time on its device too.

    Attributes:
        here: the tensor on its device, while it is there.
        shape: its shape.
        device: where it belongs.
        pieces: the copy in host memory, its numbers in their order.

    Args:
        x: the tensor.
        before: the one that was kept before.
    """

    def __init__(self, x: Tensor, before: OffloadedTensor | None) -> None:
        self.here: Tensor | None = x
        self.shape, self.device = x.shape, x.device
        self.pieces: list[Tensor] = []
        # weakly, as autograd alone says how long a tensor is kept
        self._before = None if before is None else weakref.ref(before)

    @property
    def before(self) -> OffloadedTensor | None:
        """The one that was kept before, if that still is."""
        return None if self._before is None else self._before()


class HostMemory:
    """Where tensors are kept. Copies run on a stream of their own, and the stream that computes waits for them."""

    def __init__(self) -> None:
        self._newest: weakref.ref[OffloadedTensor] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        # what is on its way, with what it is copied from or to, and whether it goes out
        self._moving: tuple[OffloadedTensor, Tensor, bool] | None = None

    def hooks(self) -> saved_tensors_hooks:
        """A context in which autograd keeps its tensors here."""
        return saved_tensors_hooks(self.keep, self.fetch)

    def keep(self, x: Tensor) -> OffloadedTensor | Tensor:
        """Start to copy a tensor to the host. Nobody may change it any more."""
        if not x.numel():
            return x
        self._settle()
        before = None if self._newest is None else self._newest()
        if before is None:
            # a new pass: its copies take the memory of those of the last one, which a host that runs ahead would find in use
            for stream in self._streams.values():
                stream.synchronize()
        x = x.detach()
        kept = OffloadedTensor(x, before)
        self._newest = weakref.ref(kept)
        flat = x.reshape(-1)
        pinned = x.device.type == "cuda"
        with self._aside(x.device):
            for part in flat.split(PIECE_BYTES // x.element_size()):
                piece = torch.empty(part.shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
                kept.pieces.append(piece.copy_(part, non_blocking=True))
        self._moving = kept, flat, True
        return kept

    def fetch(self, kept: OffloadedTensor | Tensor) -> Tensor:
        """The tensor on its device; starts to fetch the one that was kept before it."""
        if isinstance(kept, Tensor):
            return kept
        if kept.here is None:
            self._begin_return(kept)
        x = kept.here
        self._settle()
        kept.here = None
        before = kept.before
        if before is not None and before.here is None:
            self._begin_return(before)
        assert x is not None
        return x

    def _begin_return(self, kept: OffloadedTensor) -> None:
        self._settle()
        # allocated by the stream that computes, to which it is given back too
        flat = torch.empty(kept.shape.numel(), dtype=kept.pieces[0].dtype, device=kept.device)
        with self._aside(kept.device):
            for part, piece in zip(flat.split([len(piece) for piece in kept.pieces]), kept.pieces, strict=True):
                part.copy_(piece, non_blocking=True)
        kept.here = flat.view(kept.shape)
        self._moving = kept, flat, False

    def _aside(self, device: torch.device) -> AbstractContextManager[object]:
        """The stream of copies, behind all that has been asked of the one that computes."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _settle(self) -> None:
        """Let the stream that computes wait for what is on its way; only then may its memory be used for something else."""
        if self._moving is None:
            return
        kept, _, outward = self._moving
        if kept.device.type == "cuda":
            torch.cuda.current_stream(kept.device).wait_stream(self._streams[kept.device])
        if outward:
            kept.here = None
        self._moving = None
