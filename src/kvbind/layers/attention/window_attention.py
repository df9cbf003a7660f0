"""Causal softmax attention over a sliding window: which of PyTorch's attentions to call, and with which mask.

A token attends to itself and the `window - 1` tokens before it in its own sequence. Training on CUDA uses FlexAttention,
compiled for its length. Reading a prompt there uses FlashAttention, as prompts come in every length, each of which would be
compiled for. Everything else uses `scaled_dot_product_attention` on one block of queries after another, so that memory
grows with `T * window`, not `T * T`: the CPU, for which FlexAttention has no backward, and prompts packed or padded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvbind.forms.parallel.finite import known_finite, spoilt
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.tracing import is_eager, is_exported, is_transformed
from kvbind.layers.attention.softmax import flash_in_window, is_for_flash, softmax_attention
from kvbind.layers.layout import sequence_starts
from kvbind.sequence.boundaries import Boundaries

Bounds = tuple[int, ...] | Boundaries
"""Boundaries of packed sequences; those that the device alone reads have no keys ahead."""

QUERY_BLOCK = 128
"""The fewest queries that one call of `scaled_dot_product_attention` takes where there are as many."""

MASK_BLOCK = 128
"""Tokens along each side of FlexAttention's mask blocks."""

KEY_BLOCK = 256
"""Kept keys are read in whole blocks: some of PyTorch's attentions prepare anew for each number of keys, which takes longer
than a token."""

OWN_KERNELS = 8
"""Lengths for which FlexAttention is compiled one by one, as many as the compiler takes of one function. Others share a
kernel that takes any length, and is slower: it cannot know that a length divides into blocks."""

_OWN: set[tuple[int, int]] = set()


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    cu_seqlens: Bounds | None = None,
    ahead: int = 0,
    held: tuple[int, ...] | None = None,
) -> Tensor:
    """Softmax attention of each token to itself and the `window - 1` before it.

    Args:
        q: queries `[B, T, H, D]`, rotated already.
        k: keys `[B, ahead + T, H, D]`, likewise.
        v: values `[B, ahead + T, H, D]`.
        window: how many tokens a token sees, itself among them.
        cu_seqlens: boundaries of sequences packed into q's row; nothing crosses them.
        ahead: how many keys stand before the first query's own; they belong to its sequence.
        held: how many of those each row has, the nearest; others are of no meaning. None for all of them, in a row that
            may be trained; excludes `cu_seqlens`.

    Returns:
        `[B, T, H, D]` in q's dtype; NaN where a query, or a key or value that it sees, is not finite.
    """
    if not q.shape[0] or not q.shape[1]:
        # no rows, or an empty slice of them
        return q
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    # on GPUs numbers are not looked at
    if q.is_cuda or known_finite(q, k, v):
        return _attention(q, k, v, window, cu_seqlens, ahead, held).transpose(1, 2)
    # a weight of 0 would hand what is not finite to every query of a block
    asks, wrong = ~q.isfinite().all(-1), ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    q, k, v = q.masked_fill(asks[..., None], 0.0), *(x.masked_fill(wrong[..., None], 0.0) for x in (k, v))
    output = _attention(q, k, v, window, cu_seqlens, ahead, held)
    sees = _wrong_in_window(wrong, window, cu_seqlens, ahead, held)
    return spoilt(output, (asks | sees)[..., None]).transpose(1, 2)


def _wrong_in_window(
    wrong: Tensor, window: int, cu_seqlens: Bounds | None, ahead: int, held: tuple[int, ...] | None
) -> Tensor:
    """Which queries `[B, H, T]` see any of some keys, `[B, H, ahead + T]`."""
    place = torch.arange(ahead, wrong.shape[2], device=wrong.device)
    first = (place - window + 1).clamp(min=0)
    if cu_seqlens is not None:
        first = torch.maximum(first, sequence_starts(behind(cu_seqlens, ahead), wrong.device)[ahead:])
    first = first.expand(wrong.shape[0], 1, -1)
    if held is not None:
        first = first.clamp(min=ahead - torch.tensor(held, device=wrong.device)[:, None, None])
    before = F.pad(wrong.cumsum(-1), (1, 0))
    return before[..., ahead + 1 :] > before.gather(2, first.expand(*wrong.shape[:2], -1))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    cu_seqlens: Bounds | None,
    ahead: int,
    held: tuple[int, ...] | None,
) -> Tensor:
    """The attention that fits, to operands `[B, H, T, D]`."""
    if is_exported() and held is None and cu_seqlens is None:
        return _masked(q, k, v, window, ahead)
    if q.shape[2] == 1 and held is not None and not torch.is_grad_enabled() and runs_on(q.device) and is_eager():
        from kvbind.kernels.elementwise.decode_attention import covers, decode_attention

        if covers(q[:, :, 0], k, v):
            # numbers need not travel to the device where all are the same
            old = torch.tensor(held, dtype=torch.int32, device=q.device) if len(set(held)) > 1 else held[0]
            filled = torch.full((q.shape[0],), ahead, dtype=torch.int32, device=q.device)
            return decode_attention(q[:, :, 0], k, v, filled - old, filled - ahead + 1 + old)[:, :, None]
    short = q.shape[2] <= window and held is None and cu_seqlens is None and not ahead
    # transforms of functions take no compiled kernels
    trained = torch.is_grad_enabled() and q.requires_grad and not is_transformed()
    if trained and q.is_cuda and held is None and not short and q.dtype != torch.float64:
        return _flex(q, k, v, window, cu_seqlens, ahead)
    even = cu_seqlens is None and (held is None or len(set(held)) == 1)
    if even and q.shape[2] > 1 and not torch.is_grad_enabled() and is_eager() and is_for_flash(q, k, v):
        unfilled = 0 if held is None else ahead - held[0]
        return flash_in_window(q, k[:, :, unfilled:], v[:, :, unfilled:], window)
    return _blocked(q, k, v, window, cu_seqlens, ahead, held)


def halo_of(window: int) -> int:
    """How many keys before its own a slice of a sequence asks for: those it may see, up to whole blocks of the mask."""
    return -(-(window - 1) // MASK_BLOCK) * MASK_BLOCK


def _masked(q: Tensor, k: Tensor, v: Tensor, window: int, ahead: int) -> Tensor:
    """All queries against all keys and a mask `[T, ahead + T]`: the same for every length, as an exported program is."""
    row = torch.arange(ahead, ahead + q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    return softmax_attention(q, k, v, (column <= row) & (row - column < window))


def _blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    cu_seqlens: Bounds | None,
    ahead: int,
    held: tuple[int, ...] | None,
) -> Tensor:
    """Queries in blocks, each against the keys that its window reaches; all `[B, H, T, D]`."""
    offset, unfilled = ahead, None
    if held is not None:
        offset = min(-(-max(held) // KEY_BLOCK) * KEY_BLOCK, ahead)
        if offset < ahead:
            k, v = k[:, :, ahead - offset :], v[:, :, ahead - offset :]
        if min(held) < offset:
            # numbers need not travel to the device
            uneven = min(held) < max(held)
            unfilled = offset - (torch.tensor(held, device=q.device)[:, None, None, None] if uneven else held[0])
    starts = None if cu_seqlens is None else sequence_starts(behind(cu_seqlens, ahead), q.device)[ahead:]

    length, block = q.shape[2], max(window, QUERY_BLOCK)
    outputs = []
    for begin in range(0, length, block):
        end = min(begin + block, length)
        low, high = max(0, offset + begin - window + 1), offset + end
        queries, keys, values = q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high]
        # one query sees all keys that its window reaches, and so do those of a row's beginning that come before them
        one, first = end - begin == 1, offset == 0 and end <= window
        if (one or first) and starts is None and unfilled is None:
            outputs.append(softmax_attention(queries, keys, values, is_causal=not one))
            continue
        column = torch.arange(low, high, device=q.device)[None, :]
        conditions = [] if unfilled is None else [column >= unfilled]
        if starts is not None:
            conditions.append(column >= starts[begin:end, None])
        if not one:
            row = torch.arange(offset + begin, offset + end, device=q.device)[:, None]
            conditions += [column <= row, row - column < window]
        seen = functools.reduce(torch.logical_and, conditions)
        outputs.append(softmax_attention(queries, keys, values, seen))
    return torch.cat(outputs, dim=2) if len(outputs) != 1 else outputs[0]


def behind(cu_seqlens: Bounds, ahead: int) -> Bounds:
    """Boundaries of sequences, the first of which has `ahead` more tokens."""
    if isinstance(cu_seqlens, Boundaries):
        return cu_seqlens
    return (0, *(b + ahead for b in cu_seqlens[1:]))


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, cu_seqlens: Bounds | None, ahead: int) -> Tensor:
    length, compiling = q.shape[2], torch.compiler.is_compiling()
    if isinstance(cu_seqlens, Boundaries):
        bounds = cu_seqlens
        mask = bounds.once(("window", window), lambda: block_mask(bounds.starts, length, window))
    else:
        # inside a compiled model there is no cache of masks
        make = window_block_mask.__wrapped__ if compiling else window_block_mask
        mask = make(length, window, cu_seqlens, str(q.device), ahead)
    if compiling:
        # there the plain function is what the compiler knows
        inside: Tensor = flex_attention(q, k, v, block_mask=mask)
        return inside
    # importing the compiler takes seconds, which only this path is worth
    from torch._dynamo.exc import FailOnRecompileLimitHit

    own = has_own_kernel((q.shape[2], k.shape[2]))
    for compiled in (_for_one_length, _for_any_length) if own else (_for_any_length,):
        try:
            output: Tensor = compiled()(q, k, v, block_mask=mask)
        except FailOnRecompileLimitHit:
            continue
        return output
    # without fullgraph, FlexAttention would go on uncompiled and form all T x T scores
    return _blocked(q, k, v, window, cu_seqlens, ahead, None)


def has_own_kernel(lengths: tuple[int, int]) -> bool:
    """Whether FlexAttention is compiled for these lengths of queries and keys alone, as for the first that a process has."""
    if len(_OWN) < OWN_KERNELS:
        _OWN.add(lengths)
    return lengths in _OWN


@functools.cache
def _for_one_length() -> Any:
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@functools.cache
def _for_any_length() -> Any:
    # a function of its own, as the compiler counts what it has compiled by function
    def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask)

    return torch.compile(attention, fullgraph=True)


@functools.lru_cache(maxsize=32)
def window_block_mask(
    length: int, window: int, cu_seqlens: tuple[int, ...] | None, device: str, ahead: int = 0
) -> BlockMask:
    """FlexAttention's mask of a causal window inside packed sequences.

    Args:
        length: T.
        window: how many tokens a token sees, itself among them.
        cu_seqlens: boundaries of packed sequences, or None for one sequence.
        device: where the mask lives.
        ahead: how many keys stand before the first query's own.
    """
    starts = sequence_starts(behind(cu_seqlens or (0, length), ahead), torch.device(device))
    return block_mask(starts[ahead:], length, window, ahead)


def block_mask(starts: Tensor, length: int, window: int, ahead: int = 0) -> BlockMask:
    """As `window_block_mask`, of sequences of which `starts` `[T]` tells where each query's begins.

    Which blocks hold any allowed pair, and which hold nothing else, follows from each block's first and last token, so
    that no `T x T` mask is made.
    """
    where = starts.device

    # among the keys: of each query, its own and the first that it sees
    own = torch.arange(ahead, ahead + length, device=where)
    earliest = torch.maximum(own - window + 1, starts)

    # functions with their numbers in tensors: other windows and boundaries then need no other compilation. Narrow ones, and
    # no second lookup by row: a forward kernel that had both took twice as long (kvbind bench attention)
    first_seen, shift = earliest.to(torch.int32), torch.tensor(ahead, dtype=torch.int32, device=where)

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (column >= first_seen[row])

    def seen_ahead(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row + shift) & (column >= first_seen[row])

    def blocks(tokens: int) -> tuple[Tensor, Tensor]:
        first = torch.arange(-(-tokens // MASK_BLOCK), device=where) * MASK_BLOCK
        return first, (first + MASK_BLOCK - 1).clamp(max=tokens - 1)

    (first_row, last_row), (first, last) = blocks(length), blocks(ahead + length)
    # the first query of a block sees the furthest back, the last the furthest on
    some = (first[None, :] <= own[last_row][:, None]) & (last[None, :] >= earliest[first_row][:, None])
    every = (last[None, :] <= own[first_row][:, None]) & (first[None, :] >= earliest[last_row][:, None])
    every &= (last == first + MASK_BLOCK - 1)[None, :] & (last_row == first_row + MASK_BLOCK - 1)[:, None]
    partial = some & ~every
    return BlockMask.from_kv_blocks(
        *_block_lists(partial),
        *_block_lists(every),
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=seen_ahead if ahead else seen,
        seq_lengths=(length, ahead + length),
    )


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of a bool matrix, how many are set and their columns first: `[1, 1, n]` and `[1, 1, n, n]`, int32."""
    count = chosen.sum(-1).to(torch.int32)
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None].contiguous()
