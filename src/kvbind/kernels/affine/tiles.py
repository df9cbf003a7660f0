"""What the kernels of this folder share: how chunks are numbered, what decays between their tokens, a triangular inverse.

A chunk has C tokens. With `b_t` the product of its gates up to token t, the share of a write at token j that is left at t is
`b_t / b_j`: two to the power of a difference of summed logarithms (`kvbind.kernels.causal_segments.logarithms`), and never a
quotient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.causal import segment_table
from kvbind.kernels.causal_segments import Segments, logarithms
from kvbind.kernels.common import cdiv


def cut(x: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Segments:
    """The chunks of `[B, T, ...]`, or of sequences packed into one row."""
    batch, tokens = x.shape[:2]
    if cu_seqlens is None:
        each = max(1, cdiv(tokens, chunk))
        return Segments(chunk, each, batch * each, batch, None, None)
    table, offsets = segment_table(cu_seqlens, tokens, chunk)
    return Segments(chunk, 0, len(table), len(cu_seqlens) - 1, table, offsets)


@triton.jit
def summed_logarithms(gates, places, rows):
    """Logarithms of a chunk's gates, whole and rest, each token's own and summed up to it; zeros where there are none."""
    if gates is None:
        none = tl.zeros(places.shape, tl.float32)
        return none, none, none, none
    else:
        whole, rest = logarithms(gates, places, rows, True)
        return whole, rest, tl.cumsum(whole, 0), tl.cumsum(rest, 0)


@triton.jit
def between(later_whole, later_rest, whole, rest, visible):
    """What is left at rows of what columns write, where it is visible; else 0."""
    reach = (later_whole[:, None] - whole[None, :]) + (later_rest[:, None] - rest[None, :])
    return tl.where(visible, tl.exp2(tl.where(visible, reach, 0.0)), 0.0)


@triton.jit
def rates_of(rates, places, rows):
    """The rates of a chunk's tokens, 0 behind its end and where they are not finite; and the rows of these, marked with 1."""
    if rates is None:
        return tl.where(rows, 1.0, 0.0), tl.zeros(places.shape, tl.int32)
    else:
        rate = tl.load(rates + places, mask=rows, other=0.0)
        good = tl.abs(rate) < float("inf")
        return tl.where(good, rate, 0.0), tl.where(good, 0, 1)


@triton.jit
def gates_wrong(gates, places, rows):
    """1 for gates that are not finite, else 0."""
    if gates is None:
        return tl.zeros(places.shape, tl.int32)
    else:
        gate = tl.load(gates + places, mask=rows, other=1.0)
        return tl.where(tl.abs(gate) < float("inf"), 0, 1)


@triton.jit
def marked_rows(marks, places, rows):
    """1 for tokens in which something is not finite, else 0."""
    return tl.load(marks + places, mask=rows, other=0).to(tl.int32)


@triton.jit
def unit_inverse(low, C: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of `1 + low` for a strictly lower triangular `[C, C]`.

    Blocks of 16 x 16 by forward substitution, all at once; what is between them by products. Powers of `low`, which would
    need no substitution, grow beyond float32 where keys repeat.
    """
    N: tl.constexpr = C // 16
    block, at = tl.arange(0, N), tl.arange(0, 16)
    same = block[:, None, None, None] == block[None, None, :, None]
    inside = tl.sum(tl.where(same, tl.reshape(low, (N, 16, N, 16)), 0.0), 2)
    row, column = at[None, :, None], at[None, None, :]
    solved = tl.where(row == column, 1.0, tl.zeros((N, 16, 16), tl.float32))
    for step in range(0, 15):
        factor = tl.sum(tl.where(column == step, inside, 0.0), 2)
        known = tl.sum(tl.where(row == step, solved, 0.0), 1)
        solved -= factor[:, :, None] * known[:, None, :]
    whole = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    place = tl.arange(0, C)
    mine, other = place[:, None], place[None, :]
    if C > 16:
        corner = tl.where((mine // 32 == other // 32) & (mine // 16 != other // 16), low, 0.0)
        half = tl.dot(whole, corner, input_precision=PRECISION)
        whole -= tl.dot(half, whole, input_precision=PRECISION)
    if C > 32:
        corner = tl.where(mine // 32 != other // 32, low, 0.0)
        half = tl.dot(whole, corner, input_precision=PRECISION)
        whole -= tl.dot(half, whole, input_precision=PRECISION)
    return whole
