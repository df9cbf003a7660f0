"""What the kernels of this folder share: how sequences are cut into chunks, and what decays between their tokens.

A chunk has C tokens. With `b_t` the product of its gates up to token t, the share of a write at token j that is left at t is
`b_t / b_j`: two to the power of a difference of summed logarithms (`kvbind.kernels.causal.segments.logarithms`), and never a
quotient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.causal.segments import Segments, segment_table
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
def between(whole, rest, seen_whole, seen_rest, place, C: tl.constexpr, WRITES: tl.constexpr, STRICT: tl.constexpr):
    """What is left at reads of what earlier tokens write, `[C, C]`, else 0.

    Rows are of the reads, whose summed logarithms `seen_` are, and columns of the writes; or, with `WRITES`, the other way.
    With `STRICT` no token reads what it writes itself. Without gates, all is left.
    """
    at = tl.arange(0, C)
    mine, other = at[:, None], at[None, :]
    if WRITES:
        read, write = other, mine
    else:
        read, write = mine, other
    visible = write < read if STRICT else write <= read
    if whole is None:
        return tl.where(visible, 1.0, tl.zeros((C, C), tl.float32))
    else:
        vectors = place * C
        reach = tl.load(seen_whole + vectors + read) - tl.load(whole + vectors + write)
        reach += tl.load(seen_rest + vectors + read) - tl.load(rest + vectors + write)
        return tl.where(visible, tl.exp2(tl.where(visible, reach, 0.0)), 0.0)


@triton.jit
def marked_rows(marks, places, rows):
    """1 for tokens in which something is not finite, else 0."""
    return tl.load(marks + places, mask=rows, other=0).to(tl.int32)
