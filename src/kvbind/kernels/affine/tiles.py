"""What the kernels of this folder share: how sequences are cut into chunks, and what decays between their tokens.

A chunk has C tokens. With `b_t` the product of its gates up to token t, the share of a write at token j that is left at t is
`b_t / b_j`: two to the power of a difference of summed logarithms (`kvbind.kernels.causal.segments.logarithms`), and never a
quotient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.causal.segments import Segments, logarithms, segment_table
from kvbind.kernels.common.operands import cdiv


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
def floored_logarithms(gates, places, rows):
    """As `summed_logarithms`, of gates that are no less than 2^-64.

    In gradients of gates products over spans of tokens are divided by the gate, and those that hold such a gate are as much as
    nothing to all other gates.
    """
    if gates is None:
        none = tl.zeros(places.shape, tl.float32)
        return none, none, none, none
    else:
        whole, rest = logarithms(gates, places, rows, True)
        whole = tl.maximum(whole, -64.0)
        return whole, rest, tl.cumsum(whole, 0), tl.cumsum(rest, 0)


@triton.jit
def seen_logarithms(whole, rest, wholes, rests, BEFORE: tl.constexpr):
    """The summed logarithms of what residuals read, whole and rest: with each token's own gate, or without."""
    if BEFORE:
        return wholes, rests
    else:
        return wholes - whole, rests - rest


@triton.jit
def between(later_whole, later_rest, whole, rest, visible):
    """What is left at rows of what columns write, where it is visible; else 0."""
    reach = (later_whole[:, None] - whole[None, :]) + (later_rest[:, None] - rest[None, :])
    return tl.where(visible, tl.exp2(tl.where(visible, reach, 0.0)), 0.0)


@triton.jit
def rates_of(rates, places, rows):
    """The rates of a chunk's tokens, 0 behind its end and where they are not finite; and which are not, marked with 1."""
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
