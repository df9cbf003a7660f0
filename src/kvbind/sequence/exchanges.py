"""The exchanges of one call under autograd: forward in one order on every rank, backward in the reverse of it.

Collectives must meet in the same order on every rank, in the backward pass too, where autograd runs what is ready first;
and ranks whose outputs do not depend on what they received must still take part. So each exchange also hands an empty tensor
to the next, and the last one's is tied to the call's output: the backward pass reaches all of them, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvbind.sequence.collectives import as_bytes, begin_gather, compose, exchange, from_bytes, gathered
from kvbind.sequence.shard import SequenceShard
from kvbind.sequence.traffic import record, waiting


class Exchanges:
    """The exchanges of one call, each behind the one before.

    Args:
        shard: how the row is cut.
        wide: the call's differentiable tensors of many elements: with them, and the next, every rank's exchanges have
            gradients, or none has.
        narrow: the others. They have gradients on every rank, zero where a rank had no use for them, as what reduces
            parameters' gradients over ranks expects.
    """

    def __init__(self, shard: SequenceShard, wide: Sequence[Tensor], narrow: Sequence[Tensor] = ()) -> None:
        self.shard = shard
        absent = len(wide) if shard.here.length else 0
        self._link: Tensor = _Anchor.apply(absent, *wide, *narrow)

    def tie(self, x: Tensor) -> Tensor:
        """`x`, whose gradient now comes before those of all exchanges so far."""
        tied: Tensor = _Tie.apply(x, self._link)
        return tied

    def extended(self, tensors: Sequence[Tensor], wanted: Sequence[int], axis: int) -> list[Tensor]:
        """Tensors of this rank's tokens with tokens of earlier ranks in front.

        Args:
            tensors: each with this rank's tokens along `axis`.
            wanted: for each rank, how many tokens before its slice it needs.
            axis: of the tokens.
        """
        if not any(wanted):
            return list(tensors)
        plan = HaloPlan(self.shard, wanted)
        length = self.shard.here.length
        # only the tail goes through the exchange, so that its gradient is no tensor of all tokens
        parts = [x.split((length - plan.tail, plan.tail), dim=axis) for x in tensors]
        tails = [tail.movedim(axis, 0) for _, tail in parts]
        self._link, *halos = _Halo.apply(plan, self._link, *tails)
        return [torch.cat((h.movedim(0, axis), *part), dim=axis) for h, part in zip(halos, parts, strict=True)]

    def prefix(self, end: Tensor, reach: Tensor, meanwhile: Callable[[], object] | None = None) -> Tensor:
        """What this rank's first document starts from: `x <- P x + E` over the ranks that hold its beginning.

        Args:
            end: `E`, this rank's end state from nothing (from the document's start where its last document starts here),
                `[..., n, m]`.
            reach: `P`, how the state before this rank's slice enters the state after it, `[..., n, n]`.
            meanwhile: called between the exchange's start and its end.

        Returns:
            `[..., n, m]`; zeros where the first document starts on this rank.
        """
        under_way = _UnderWay(self.shard)
        self._link, promised = _BeginPrefix.apply(under_way, self._link, end, reach)
        if meanwhile is not None:
            meanwhile()
        incoming: Tensor
        self._link, incoming = _EndPrefix.apply(under_way, self._link, promised, reach)
        return incoming

    def receive(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like these from the rank before."""
        tensors: list[Tensor]
        self._link, *tensors = _Receive.apply(self.shard, self._link, *like)
        return tensors

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Tensors to the rank behind."""
        self._link = _Send.apply(self.shard, self._link, *tensors)


class HaloPlan:
    """Which tokens go where when every rank needs some of those right before its slice.

    Args:
        shard: how the row is cut.
        wanted: for each rank, how many.

    Attributes:
        group: the group's name.
        tail: how many of this rank's last tokens others need.
        sending: for each rank, the span of the tail that goes to it.
        receiving: for each rank, how many tokens come from it.
    """

    def __init__(self, shard: SequenceShard, wanted: Sequence[int]) -> None:
        slices, rank = shard.slices, shard.rank

        def shared(source: int, target: int) -> tuple[int, int]:
            low, high = slices[target].start - wanted[target], slices[target].start
            start = slices[source].start
            stop = start + slices[source].length
            return max(low, start) - start, min(high, stop) - start

        spans = [shared(rank, target) for target in range(shard.size)]
        length = slices[rank].length
        self.group = shard.group_name
        self.tail = max([length - low for low, high in spans if low < high], default=0)
        offset = length - self.tail
        self.sending = [(low - offset, high - offset) if low < high else (0, 0) for low, high in spans]
        self.receiving = [max(high - low, 0) for low, high in (shared(source, rank) for source in range(shard.size))]


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, absent: int, *sources: Tensor) -> Tensor:
        ctx.absent, ctx.like = absent, [torch.empty_like(x, device="meta") for x in sources]
        return sources[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_link: Tensor) -> tuple[Tensor | None, ...]:
        zero = d_link.new_zeros(())
        zeros = [zero.to(x.dtype).expand(x.shape) for x in ctx.like[ctx.absent :]]
        return None, *(None,) * ctx.absent, *zeros


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Tensor) -> Tensor:
        ctx.save_for_backward(link)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (link,) = ctx.saved_tensors
        return grads[0], torch.empty_like(link)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: HaloPlan, link: Tensor, *tails: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.like = plan, [x.new_empty(0, *x.shape[1:]) for x in tails]
        rows = as_bytes(tails, plan.tail)
        sent = torch.cat([rows[low:high] for low, high in plan.sending])
        counts = [high - low for low, high in plan.sending]
        received = exchange(sent, counts, plan.receiving, plan.group)
        return link.new_empty(0), *from_bytes(received, ctx.like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_link: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        plan: HaloPlan = ctx.plan
        rows = as_bytes(grads, sum(plan.receiving))
        counts = [high - low for low, high in plan.sending]
        back = from_bytes(exchange(rows, plan.receiving, counts, plan.group), ctx.like)
        found = [x.new_zeros(plan.tail, *x.shape[1:]) for x in ctx.like]
        offsets = itertools.accumulate(counts, initial=0)
        # a token may have gone to several ranks, whose slices are shorter than what they need
        for offset, (low, high) in zip(offsets, plan.sending, strict=False):
            for total, part in zip(found, back, strict=True):
                total[low:high] += part[offset : offset + high - low]
        return None, d_link, *found


class _UnderWay:
    """A scan across ranks between its start and its end, in either direction.

    Attributes:
        shard: how the row is cut.
        raw: the collective.
        incoming: backward, what the forward pass found.
    """

    raw: Tensor
    incoming: Tensor

    def __init__(self, shard: SequenceShard) -> None:
        self.shard = shard

    def begin(self, x: Tensor, reach: Tensor) -> None:
        """Start to gather."""
        self.raw = begin_gather((x, reach), self.shard.group_name, self.shard.size)

    def end(self, x: torch.Size, reach: torch.Size) -> tuple[Tensor, Tensor]:
        """Everyone's, of these shapes."""
        raw = self.raw
        del self.raw
        everyone, reaches = gathered(raw, (x, reach), self.shard.size)
        return everyone, reaches


class _BeginPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: _UnderWay, link: Tensor, end: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        ctx.under_way, ctx.shapes = under_way, (end.shape, reach.shape)
        under_way.begin(end, reach)
        # stands for what will come, so that its gradient has a way back
        return link.new_empty(0), end.new_zeros(()).expand(end.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_link: Tensor, _: Tensor) -> tuple[Any, ...]:
        under_way: _UnderWay = ctx.under_way
        shard = under_way.shard
        grads, reaches = under_way.end(*ctx.shapes)
        d_end = compose(grads, reaches, range(shard.here.last, shard.rank, -1), transposed=True)
        incoming, reach = under_way.incoming, ctx.shapes[1]
        del under_way.incoming
        if len(shard.here.bounds) > 2:
            # two documents: what came in does not reach what goes out
            d_reach = d_end.new_zeros(reach)
        elif reach[-1] == 1:
            d_reach = (d_end * incoming).sum((-2, -1), keepdim=True)
        else:
            d_reach = d_end @ incoming.mT
        return None, d_link, d_end, d_reach


class _EndPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: _UnderWay, link: Tensor, promised: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        shard = under_way.shard
        ends, reaches = under_way.end(promised.shape, reach.shape)
        incoming = compose(ends, reaches, range(shard.here.first, shard.rank))
        ctx.under_way = under_way
        ctx.save_for_backward(reach, incoming)
        return link.new_empty(0), incoming

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_link: Tensor, d_incoming: Tensor) -> tuple[Any, ...]:
        reach, incoming = ctx.saved_tensors
        ctx.under_way.begin(d_incoming, reach)
        ctx.under_way.incoming = incoming
        return None, d_link, d_incoming.new_zeros(()).expand(d_incoming.shape), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: SequenceShard, link: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.shard = shard
        return link.new_empty(0), *_receive(shard, shard.rank - 1, like, link.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_link: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        _send(ctx.shard, ctx.shard.rank - 1, grads)
        return None, d_link, *(None for _ in grads)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: SequenceShard, link: Tensor, *tensors: Tensor) -> Tensor:
        ctx.shard, ctx.like = shard, [torch.empty_like(x, device="meta") for x in tensors]
        _send(shard, shard.rank + 1, tensors)
        return link.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_link: Tensor) -> tuple[Any, ...]:
        return None, d_link, *_receive(ctx.shard, ctx.shard.rank + 1, ctx.like, d_link.device)


def _send(shard: SequenceShard, peer: int, tensors: Sequence[Tensor]) -> None:
    """Send tensors to a neighbour as one message.

    Each rank may have its own order of what it sends ahead and takes from behind: ranks are a line, so that waits never
    close a circle. No `batch_isend_irecv`: where NCCL starts at first use, it would wait for all ranks of the group, also
    for those that no document reaches.
    """
    message = as_bytes([x.unsqueeze(0) for x in tensors], 1)
    record("ring", message.numel(), 0)
    with waiting(message.device):
        dist.send(message, group=shard.group, group_dst=peer)


def _receive(shard: SequenceShard, peer: int, like: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What a neighbour sent, of the shapes and dtypes of `like`."""
    nbytes = sum(x.numel() * x.element_size() for x in like)
    message = torch.empty(1, nbytes, dtype=torch.uint8, device=device)
    record("ring", 0, nbytes)
    with waiting(device):
        dist.recv(message, group=shard.group, group_src=peer)
    return [x[0] for x in from_bytes(message, [x.unsqueeze(0) for x in like])]
