"""Softmax attention of one query per sequence to keys that lie in a ring: what one more token of a generation asks for.

Keys are split along time. A program takes the scores of one head and split, their largest, the sum of their
exponentials and the values so weighted; a second launch joins the splits of each head:

    m = max_s m_s        out = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s

Bound by memory: keys and values are read once. Splits count from the earliest key that is seen, wherever in the ring it
lies, so that a result does not depend on where that is, bit by bit. All arithmetic is in float32, with one rounding at the
end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import DTYPES, cdiv, power_of_2
from kvbind.kernels.launching.launcher import Launcher

SPLIT = 128
"""Keys of a program."""

JOINED = 16
"""Splits that a program which joins them holds at once."""

WIDEST = 256
"""The widest head."""


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Attention of one query of each sequence and head; see `covers`.

    Args:
        q: `[B, H, D]`.
        keys: `[B, H, S, D]`: a ring, whose place after the last is its first.
        values: `[B, H, S, D]`, in the same places.
        first: int32 `[B]`: where the earliest key that is seen lies.
        count: int32 `[B]`: how many from there on are seen, 1 to S.

    Returns:
        `[B, H, D]` in q's dtype, contiguous.
    """
    batch, heads, width = q.shape
    room = keys.shape[2]
    splits = cdiv(room, SPLIT)
    sums = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=q.device)
    stats = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, width, dtype=q.dtype, device=q.device)
    block = power_of_2(width)
    with on_device_of(q):
        _split[(splits, heads, batch)](
            q, keys, values, first, count, sums, stats, width**-0.5, room, *q.stride()[:2], *keys.stride()[:3],
            *values.stride()[:3], D=width, BD=block, BN=SPLIT, num_warps=4 if block <= 64 else 8,
        )  # fmt: skip
        _join[batch * heads,](sums, stats, out, splits, D=width, BD=block, BS=JOINED, num_warps=2)
    return out


def covers(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `decode_attention` takes these."""
    same = q.dtype in DTYPES and q.dtype == keys.dtype == values.dtype
    contiguous = q.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    return same and contiguous and 0 < q.shape[-1] <= WIDEST and q.numel() > 0 and keys.shape[2] > 0


@Launcher
@triton.jit(do_not_specialize=["room"])
def _split(
    q, keys, values, first, count, sums, stats, scale, room, q_batch, q_head, k_batch, k_head, k_slot, v_batch, v_head,
    v_slot, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One split of one head; sums `[B, H, splits, D]`, stats `[B, H, splits, 2]`."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    at = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + part
    channel = tl.arange(0, BD)
    inside = channel < D
    step = part * BN + tl.arange(0, BN)
    seen = step < tl.load(count + batch)
    slot = ((tl.load(first + batch) + step) % room).to(tl.int64)
    there = seen[:, None] & inside[None, :]
    asked = tl.load(q + batch * q_batch + head * q_head + channel, mask=inside, other=0.0).to(tl.float32) * scale
    key = tl.load(keys + batch * k_batch + head * k_head + slot[:, None] * k_slot + channel[None, :], mask=there, other=0.0)
    score = tl.where(seen, tl.sum(key.to(tl.float32) * asked[None, :], axis=1), float("-inf"))
    # a split that nothing is seen of weighs nothing
    largest = tl.maximum(tl.max(score, axis=0), -1e38)
    weight = tl.where(seen, tl.exp(score - largest), 0.0)
    value = tl.load(
        values + batch * v_batch + head * v_head + slot[:, None] * v_slot + channel[None, :], mask=there, other=0.0
    )
    tl.store(sums + at * D + channel, tl.sum(value.to(tl.float32) * weight[:, None], axis=0), mask=inside)
    tl.store(stats + at * 2, largest)
    tl.store(stats + at * 2 + 1, tl.sum(weight, axis=0))


@Launcher
@triton.jit(do_not_specialize=["splits"])
def _join(sums, stats, out, splits, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """All splits of one head; out `[B, H, D]`."""
    at = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BD)
    inside = channel < D
    largest, total = -1e38, 0.0
    found = tl.zeros((BD,), tl.float32)
    for start in range(0, splits, BS):
        part = start + tl.arange(0, BS)
        there = part < splits
        row = at * splits + part
        most = tl.load(stats + row * 2, mask=there, other=-1e38)
        now = tl.maximum(largest, tl.max(most, axis=0))
        before, weight = tl.exp(largest - now), tl.where(there, tl.exp(most - now), 0.0)
        total = total * before + tl.sum(tl.load(stats + row * 2 + 1, mask=there, other=0.0) * weight, axis=0)
        more = tl.load(sums + row[:, None] * D + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        found = found * before + tl.sum(more * weight[:, None], axis=0)
        largest = now
    tl.store(out + at * D + channel, (found / total).to(out.dtype.element_ty), mask=inside)
