"""Scans over the chunks of a sequence, element by element: momentum, then the (decayed) sum of writes, and their gradients.

Everything is float32; states are also stored in the operands' dtype, for the products that read them. Gates multiply and
never divide, so that nothing underflows into a quotient (specification, section 3).

Tables, int32: `sequences` `[S, 4]`: first chunk, number of chunks, number of complete chunks, first state row (a sequence
of N chunks has N + 1 rows: the state before each chunk and after the last); `pieces` `[chunks or rows, 2]`: the first
partial sum of a chunk's write, or of the gradient of a state row, and their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv
from kvbind.kernels.launching.bound_kernel import BoundKernel
from kvbind.kernels.launching.launcher import Launcher

_BLOCK = 512


@triton.jit
def _program(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's block of elements, head and sequence; sequences may be more than a grid's other axes take."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return program % blocks, tl.program_id(1).to(tl.int64), (program // blocks).to(tl.int64)


@Launcher
@triton.jit(do_not_specialize=["by_chunk", "by_head", "rows_by_head"])
def _forward_kernel(
    parts, pieces, momentum, decay, velocity, state, sequences, velocities, rows, end_velocity, end_state,
    state_index, state_head, velocity_index, velocity_head, sign, by_chunk, by_head, rows_by_head,
    SIZE: tl.constexpr, HEADS: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr, DECAY: tl.constexpr,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # a sequence's matrix of chunk c and head h is at by_chunk c + by_head h, its state before that chunk at by_chunk c +
    # rows_by_head h, that behind the last chunk only if LAST; if WHOLE, writes are in one piece, and pieces are not read
    block, head, sequence = _program(SIZE, BLOCK)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    first, count = tl.load(sequences + sequence * 4).to(tl.int64), tl.load(sequences + sequence * 4 + 1)
    complete, row = tl.load(sequences + sequence * 4 + 2), tl.load(sequences + sequence * 4 + 3).to(tl.int64)
    end = (sequence * HEADS + head) * SIZE + place
    by_chunk = tl.cast(by_chunk, tl.int64)
    own = (first * HEADS + head * by_head) * SIZE + place

    d = tl.zeros((BLOCK,), tl.float32)
    if MOMENTUM:
        d = tl.load(velocity + sequence * velocity_index + head * velocity_head + place, mask=inside, other=0.0)
        if complete == 0:
            tl.store(end_velocity + end, d, mask=inside)
    s = tl.zeros((BLOCK,), tl.float32)
    if STATE:
        s = tl.load(state + sequence * state_index + head * state_head + place, mask=inside, other=0.0)
        kept = rows + (row * HEADS + head * rows_by_head) * SIZE + place
        tl.store(kept, s.to(rows.dtype.element_ty), mask=inside & (LAST | (count > 0)))
        if complete == 0:
            tl.store(end_state + end, s, mask=inside)
    # stages, so that the next chunks' writes are on their way meanwhile
    for c in tl.range(0, count, num_stages=4 if WHOLE else 1):
        chunk = first + c
        if WHOLE:
            g = tl.load(parts + own + c * by_chunk * SIZE, mask=inside, other=0.0).to(tl.float32)
        else:
            piece, more = tl.load(pieces + chunk * 2).to(tl.int64), tl.load(pieces + chunk * 2 + 1)
            g = tl.load(parts + (piece * HEADS + head) * SIZE + place, mask=inside, other=0.0).to(tl.float32)
            for i in range(1, more):
                g += tl.load(parts + ((piece + i) * HEADS + head) * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        if MOMENTUM:
            d = g + tl.load(momentum + chunk * HEADS + head) * d
            g = d
            if c == complete - 1:
                tl.store(end_velocity + end, d, mask=inside)
        if KEEP:
            tl.store(velocities + own + c * by_chunk * SIZE, g, mask=inside)
        if STATE:
            if DECAY:
                s *= tl.load(decay + chunk * HEADS + head)
            s += sign * g
            after = kept + (c + 1) * by_chunk * SIZE
            tl.store(after, s.to(rows.dtype.element_ty), mask=inside & (LAST | (c + 1 < count)))
            if c == complete - 1:
                tl.store(end_state + end, s, mask=inside)


@Launcher
@triton.jit(do_not_specialize=["chunks", "reads", "by_chunk", "by_head", "rows_by_head"])
def _backward_kernel(
    parts, pieces, momentum, decay, velocity, velocities, rows, sequences, d_end_state, d_end_velocity,
    d_writes, d_state, d_velocity, d_momentum, d_decay,
    velocity_index, velocity_head, sign, chunks, reads, by_chunk, by_head, rows_by_head,
    SIZE: tl.constexpr, HEADS: tl.constexpr, MOMENTUM: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    # Matrices lie as in the forward pass. If WHOLE, each of a sequence's chunks that read has the gradient of its state in
    # one piece, of the state behind it if BEHIND and else of the one before; pieces are not read then.
    block, head, sequence = _program(SIZE, BLOCK)
    block = block.to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    first, count = tl.load(sequences + sequence * 4).to(tl.int64), tl.load(sequences + sequence * 4 + 1)
    complete, row = tl.load(sequences + sequence * 4 + 2), tl.load(sequences + sequence * 4 + 3).to(tl.int64)
    end = (sequence * HEADS + head) * SIZE + place
    by_chunk = tl.cast(by_chunk, tl.int64)
    own = (first * HEADS + head * by_head) * SIZE + place
    seen = parts + (sequence * reads * HEADS + head * by_head) * SIZE + place

    ds, dd = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # from the last chunk to the first; at each, ds is the gradient of the state after it
    for back in range(0, count):
        c = count - 1 - back
        chunk = first + c
        if STATE:
            if WHOLE:
                reader = c if BEHIND else c + 1
                ds += tl.load(seen + reader * by_chunk * SIZE, mask=inside & (reader < reads), other=0.0)
            else:
                after = (row + c + 1) * 2
                piece, more = tl.load(pieces + after).to(tl.int64), tl.load(pieces + after + 1)
                for i in range(0, more):
                    ds += tl.load(parts + ((piece + i) * HEADS + head) * SIZE + place, mask=inside, other=0.0)
            if c == complete - 1:
                ds += tl.load(d_end_state + end, mask=inside, other=0.0)
            g = sign * ds
            if DECAY:
                if WRITES:
                    before = rows + (row * HEADS + c * by_chunk + head * rows_by_head) * SIZE + place
                    held = tl.load(before, mask=inside, other=0.0)
                    tl.store(d_decay + (block * chunks + chunk) * HEADS + head, tl.sum(held.to(tl.float32) * ds))
                ds *= tl.load(decay + chunk * HEADS + head)
        else:
            g = tl.load(parts + own + c * by_chunk * SIZE, mask=inside, other=0.0).to(tl.float32)
        if MOMENTUM:
            if c == complete - 1:
                dd += tl.load(d_end_velocity + end, mask=inside, other=0.0)
            dd += g
            g = dd
            if WRITES:
                if c > 0:
                    moved = tl.load(velocities + own + (c - 1) * by_chunk * SIZE, mask=inside, other=0.0)
                else:
                    moved = tl.load(
                        velocity + sequence * velocity_index + head * velocity_head + place, mask=inside, other=0.0
                    )
                tl.store(d_momentum + (block * chunks + chunk) * HEADS + head, tl.sum(moved * dd))
            dd *= tl.load(momentum + chunk * HEADS + head)
        if WRITES:
            tl.store(d_writes + own + c * by_chunk * SIZE, g.to(d_writes.dtype.element_ty), mask=inside)

    if MOMENTUM:
        if complete == 0:
            dd += tl.load(d_end_velocity + end, mask=inside, other=0.0)
        tl.store(d_velocity + end, dd, mask=inside)
    if STATE:
        if WHOLE:
            if not BEHIND:
                ds += tl.load(seen, mask=inside & (reads > 0), other=0.0)
        else:
            piece, more = tl.load(pieces + row * 2).to(tl.int64), tl.load(pieces + row * 2 + 1)
            for i in range(0, more):
                ds += tl.load(parts + ((piece + i) * HEADS + head) * SIZE + place, mask=inside, other=0.0)
        if complete == 0:
            ds += tl.load(d_end_state + end, mask=inside, other=0.0)
        tl.store(d_state + end, ds, mask=inside)


def scan(
    parts: Tensor,
    pieces: Tensor,
    sequences: Tensor,
    *,
    state: Tensor | None,
    sign: float,
    rows: int,
    dtype: torch.dtype,
    momentum: Tensor | None = None,
    velocity: Tensor | None = None,
    decay: Tensor | None = None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Momentum, if there are gates for it, then the running state, if there is one.

    Args:
        parts: partial sums of writes `[parts, heads, M, N]`.
        pieces: which of them make up each chunk's write.
        sequences: the table above.
        state: float32 `[S, heads, M, N]` to start from (any strides of the first two axes), or None to stop at momentum.
        sign: what writes are multiplied by.
        rows: state rows of all sequences.
        dtype: of the stored states.
        momentum: gates, float32 `[chunks, heads]`, with `velocity`.
        velocity: the momentum buffer to start from, float32 `[S, heads, M, N]`.
        decay: gates, float32 `[chunks, heads]`.
        keep: return the writes after momentum.

    Returns:
        Those writes, float32 `[chunks, heads, M, N]`; states `[rows, heads, M, N]`; velocity and state after the last
        complete chunk, float32 `[S, heads, M, N]`. What was not asked for is empty.
    """
    heads, height, width = parts.shape[1:]
    chunks, count, size = len(pieces), len(sequences), height * width

    def room(wanted: bool, leading: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((leading, heads, height, width) if wanted else (0,), dtype=kind, device=parts.device)

    velocities = room(keep, chunks)
    states, end_state = room(state is not None, rows, dtype), room(state is not None, count)
    end_velocity = room(momentum is not None, count)
    first, start = (x if x is not None else parts for x in (velocity, state))
    if count:
        with on_device_of(parts):
            _forward_kernel[cdiv(size, _BLOCK) * count, heads](
                parts, pieces, parts if momentum is None else momentum, parts if decay is None else decay,
                first, start, sequences, velocities, states, end_velocity, end_state,
                start.stride(0), start.stride(1), first.stride(0), first.stride(1), sign, heads, 1, 1,
                SIZE=size, HEADS=heads, MOMENTUM=momentum is not None, STATE=state is not None,
                DECAY=decay is not None, KEEP=keep, BLOCK=_BLOCK, WHOLE=False, LAST=True, num_warps=4,
            )  # fmt: skip
    return velocities, states, end_velocity, end_state


def scan_backward(
    parts: Tensor,
    pieces: Tensor,
    sequences: Tensor,
    *,
    chunks: int,
    sign: float,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    d_end_state: Tensor | None = None,
    momentum: Tensor | None = None,
    velocity: Tensor | None = None,
    velocities: Tensor | None = None,
    d_end_velocity: Tensor | None = None,
    decay: Tensor | None = None,
    start_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradient of `scan`, from the last chunk to the first.

    Args:
        parts: partial sums of the gradient of each state row, float32 `[parts, heads, M, N]`; without `d_end_state`, the
            gradient of each chunk's write after momentum, `[chunks, heads, M, N]`.
        pieces: which of them make up each state row's gradient, `[rows, 2]`; not read without `d_end_state`.
        sequences: as `scan` took it.
        chunks: how many there are.
        sign: as `scan` took it.
        dtype: of the writes' gradients.
        rows: the states that `scan` returned; read where there is decay.
        d_end_state: the gradient of the end state, float32; None where `scan` had no state.
        momentum: as `scan` took it.
        velocity: as `scan` took it.
        velocities: the writes after momentum that `scan` returned; read where there is momentum.
        d_end_velocity: the gradient of the end velocity, float32.
        decay: as `scan` took it.
        start_only: find the gradients of the starting state and velocity alone; all others are empty or None.

    Returns:
        The gradients of the writes, `[chunks, heads, M, N]` in `dtype`; of the starting state and of the starting velocity,
        float32 `[S, heads, M, N]` or empty; of the momentum and of the decay gates, `[chunks, heads]` or None.
    """
    heads, height, width = parts.shape[1:]
    count, size = len(sequences), height * width
    blocks = cdiv(size, _BLOCK)

    def room(wanted: bool, shape: tuple[int, ...], kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=kind, device=parts.device)

    stated, moving = d_end_state is not None, momentum is not None
    d_writes = room(not start_only, (chunks, heads, height, width), dtype)
    d_state, d_velocity = room(stated, (count, heads, height, width)), room(moving, (count, heads, height, width))
    gated = decay is not None and not start_only
    d_momentum, d_decay = room(moving and not start_only, (blocks, chunks, heads)), room(gated, (blocks, chunks, heads))
    unused = parts
    first = unused if velocity is None else velocity
    if count:
        with on_device_of(parts):
            _backward_kernel[blocks * count, heads](
                parts, pieces, unused if momentum is None else momentum, unused if decay is None else decay, first,
                unused if velocities is None else velocities, unused if rows is None else rows, sequences,
                unused if d_end_state is None else d_end_state, unused if d_end_velocity is None else d_end_velocity,
                d_writes, d_state, d_velocity, d_momentum, d_decay, first.stride(0), first.stride(1), sign, chunks, 0,
                heads, 1, 1, SIZE=size, HEADS=heads, MOMENTUM=moving, STATE=stated, DECAY=decay is not None,
                WRITES=not start_only, BLOCK=_BLOCK, WHOLE=False, BEHIND=False, num_warps=4,
            )  # fmt: skip
    return (
        d_writes,
        d_state,
        d_velocity,
        d_momentum.sum(0) if moving and not start_only else None,
        d_decay.sum(0) if gated else None,
    )


def blocks_of(size: int) -> int:
    """Programs that share a matrix of so many elements."""
    return cdiv(size, _BLOCK)


class MatrixOrder(NamedTuple):
    """Where the matrices of a sequence's chunks lie, counted in matrices.

    Attributes:
        chunk: from one chunk's to the next.
        head: from one head's to the next.
        states: from one head's states to the next's.
        last: there is room for the state behind the last chunk.
    """

    chunk: int
    head: int
    states: int
    last: bool

    @staticmethod
    def by_chunk(heads: int) -> MatrixOrder:
        """Chunk by chunk, heads innermost."""
        return MatrixOrder(heads, 1, 1, True)

    @staticmethod
    def by_head(chunks: int, last: bool) -> MatrixOrder:
        """Head by head, chunks innermost."""
        return MatrixOrder(1, chunks, chunks + last, last)


def bound_scan(
    sequences: int,
    heads: int,
    size: int,
    order: MatrixOrder,
    *,
    sign: float,
    keep: bool,
    momentum: bool = False,
    velocity: tuple[int, int] = (0, 0),
    state: tuple[int, int] | None = None,
    decay: bool = False,
) -> BoundKernel:
    """`scan` bound to sizes, of writes that are in one piece each; the launch takes its tensors in the order of the kernel.

    Args:
        sequences: how many.
        heads: of each sequence.
        size: elements of a matrix.
        order: of all matrices of chunks.
        sign: what writes are multiplied by.
        keep: store the writes after momentum.
        momentum: there are gates.
        velocity: strides of sequence and head of the momentum buffer to start from.
        state: those of the state to start from, or None to stop at momentum.
        decay: there are gates.
    """
    numbers = (*(state or (0, 0)), *velocity, sign, *order[:3])
    return BoundKernel(
        _forward_kernel.kernel, [None] * 11, (blocks_of(size) * sequences, heads), numbers,
        SIZE=size, HEADS=heads, MOMENTUM=momentum, STATE=state is not None, DECAY=decay, KEEP=keep,
        BLOCK=_BLOCK, WHOLE=True, LAST=order.last, num_warps=4,
    )  # fmt: skip


def bound_scan_backward(
    sequences: int,
    heads: int,
    size: int,
    order: MatrixOrder,
    *,
    chunks: int,
    reads: int,
    behind: bool,
    sign: float,
    stated: bool,
    momentum: bool,
    velocity: tuple[int, int] = (0, 0),
    decay: bool,
) -> BoundKernel:
    """`scan_backward` bound to sizes; the launch takes its tensors in the order of the kernel.

    Args:
        sequences: as `bound_scan` takes it.
        heads: of each sequence.
        size: elements of a matrix.
        order: as `bound_scan` takes it.
        chunks: of all sequences.
        reads: chunks of one sequence that read, of which each has one gradient.
        behind: that of the state behind it, not of the one before.
        sign: as `bound_scan` takes it.
        stated: the forward scan had a state.
        momentum: it had momentum.
        velocity: as `bound_scan` takes it.
        decay: it had decay.
    """
    return BoundKernel(
        _backward_kernel.kernel, [None] * 15, (blocks_of(size) * sequences, heads),
        (*velocity, sign, chunks, reads, *order[:3]),
        SIZE=size, HEADS=heads, MOMENTUM=momentum, STATE=stated, DECAY=decay, WRITES=True,
        BLOCK=_BLOCK, WHOLE=True, BEHIND=behind, num_warps=4,
    )  # fmt: skip
