"""What the kernels of this folder share: how sequences are cut into segments, and how a tile and a state are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.operands import cdiv, dot_precision
from kvbind.kernels.launching.launcher import Repeated

TILE = 64
"""Tokens of one tile."""

LEAST_GATE = tl.constexpr(1.17549435e-38)
"""A gate below this, float32's least normal number, is 0."""

SHUT = tl.constexpr(-65536.0)
"""The logarithm of a gate that is 0: two to the power of any sum with it is exactly 0."""


@dataclass(frozen=True)
class Segments:
    """How sequences are cut.

    Attributes:
        length: tokens of a segment, the last of a sequence aside.
        each: segments of every sequence, where all are equally long.
        count: segments of all sequences, or a bound on it.
        sequences: number of sequences.
        table: where lengths differ, int32 `[count, 4]`: sequence (-1 for none), first token, token after the last, and 1 for
            a sequence's first segment plus 2 for its last.
        offsets: where lengths differ, int32 `[sequences + 1]`: the first segment of each sequence.
        launches: of calls that are cut so, where they agree in all that launches depend on.
    """

    length: int
    each: int
    count: int
    sequences: int
    table: Tensor | None
    offsets: Tensor | None
    launches: dict[str, Repeated] = field(default_factory=dict, compare=False)

    def tiles_each(self, tokens: int) -> int:
        """How far apart sequences' tiles are numbered: a tile's number is `sequence * tiles_each + token // TILE`."""
        return cdiv(tokens, TILE) if self.table is None else 1

    def tiles(self, tokens: int) -> int:
        """How many numbers tiles have, of `tokens` tokens in a row."""
        return self.sequences * cdiv(tokens, TILE) if self.table is None else tokens // TILE + self.sequences

    @property
    def single(self) -> bool:
        """Every sequence is one segment."""
        return self.table is None and self.each == 1


@triton.jit
def segment(index, table, tokens, length, each, REVERSE: tl.constexpr):
    """Row of the batch, sequence, first token, token after the last, and whether a sequence's pass ends in this segment."""
    if table is None:
        sequence = index // each
        place = index % each
        start = place * length
        stop = tl.minimum(start + length, tokens)
        row = sequence.to(tl.int64)
        ends = place == (0 if REVERSE else each - 1)
    else:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        stop = tl.load(table + index * 4 + 2)
        edges = tl.load(table + index * 4 + 3)
        row = 0
        ends = (edges & (1 if REVERSE else 2)) != 0
    return row, sequence, start, stop, ends


@triton.jit
def logarithms(gates, places, live, FINITE: tl.constexpr):
    """Logarithms (base 2) of a tile's gates: whole numbers, and remainders of at most a half.

    Sums of whole numbers are exact and sums of remainders small, so that a difference of two sums is as exact for gates of
    1e-30 as for gates near 1. With `FINITE`, gates that are not finite count as 0.
    """
    gate = tl.load(gates + places, mask=live, other=1.0)
    if FINITE:
        gate = tl.where(tl.abs(gate) < float("inf"), gate, 0.0)
    shut = gate < LEAST_GATE
    bits = tl.where(shut, 1.0, gate).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    upper = mantissa > 1.4142135
    whole = ((bits >> 23) - 127 + upper.to(tl.int32)).to(tl.float32)
    rest = tl.log2(tl.where(upper, 0.5 * mantissa, mantissa))
    if not FINITE:
        rest = tl.where(tl.abs(gate) < float("inf"), rest, float("nan"))
    return tl.where(shut, SHUT, whole), rest


@triton.jit
def rows_wrong(x):
    """1 for rows of a tile that hold a number that is not finite, else 0."""
    return tl.max(tl.where(tl.abs(x.to(tl.float32)) < float("inf"), 0, 1), 1)


@triton.jit
def any_wrong(x):
    """1 where any number of a tile of float32 is not finite, else 0."""
    # over both axes at once: of products one after the other does not compile for capability 10.0 (Triton 3.6, 3.7)
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1))


@triton.jit
def rows_silent(x):
    """1 for rows of a tile that are all zeros, else 0."""
    return 1 - tl.max(tl.where(x == 0, 0, 1), 1)


@triton.jit
def finite(x):
    """A tile with zeros in place of what is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def without(x, rows):
    """A tile with zeros in the rows that are marked with 1."""
    return tl.where(rows[:, None] > 0, 0.0, x).to(x.dtype)


@triton.jit
def read_rows(pointer, places, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile; where blocks do not divide the width, zeros behind the last column."""
    if WIDTH % BLOCK == 0:
        return tl.load(pointer + places, mask=rows[:, None], other=0.0)
    else:
        return tl.load(pointer + places, mask=rows[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def state_places(inner, columns, DK: tl.constexpr, DV: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where elements of a state `[DK, DV]`, or of one stored as its transpose, lie in memory, and which there are."""
    inside = (inner < DK)[:, None] & (columns < DV)[None, :]
    if TRANSPOSED:
        return columns[None, :] * DK + inner[:, None], inside
    else:
        return inner[:, None] * DV + columns[None, :], inside


@triton.jit
def initial_state(states, base, inner, columns, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
             TRANSPOSED: tl.constexpr):  # fmt: skip
    """A block of a state, zeros where there is none."""
    if states is None:
        return tl.zeros((BK, BV), tl.float32)
    else:
        places, inside = state_places(inner, columns, DK, DV, TRANSPOSED)
        return tl.load(states + base + places, mask=inside, other=0.0)


@triton.jit
def store_state(end, base, state, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """Store a block of the state in which a pass ends."""
    places, inside = state_places(inner, columns, DK, DV, False)
    tl.store(end + base + places, state, mask=inside)


def product_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision`; float32 products as three of TF32, which lose no more than float32's sums do.

    In IEEE mode these kernels' products, with no matrix units, would neither fit registers nor compile in reasonable time.
    """
    precision = dot_precision(dtype)
    return "tf32x3" if dtype == torch.float32 and precision == "ieee" else precision


def token_strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of rows, tokens and heads."""
    return x.stride(0), x.stride(1), x.stride(2)


def segment_table(cu_seqlens: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Cut packed sequences into segments of `length` tokens, on the tensor's device and without waiting for it.

    Args:
        cu_seqlens: int32 or int64 `[n + 1]`.
        tokens: tokens of all sequences.
        length: tokens of a segment.

    Returns:
        `Segments.table`, with as many rows as there can be, and `Segments.offsets`.
    """
    bounds = cu_seqlens.to(torch.int64)
    begin, stop = bounds[:-1], bounds[1:]
    # an empty sequence has a segment too, which hands its state on
    ends = ((stop - begin + length - 1) // length).clamp(min=1).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    row = torch.arange(tokens // length + len(begin), device=bounds.device)
    found = torch.searchsorted(ends, row, right=True)
    sequence = found.clamp(max=len(begin) - 1)
    start = begin[sequence] + (row - offsets[sequence]) * length
    first, last = row == offsets[sequence], row == ends[sequence] - 1
    exists = found < len(begin)
    table = torch.stack(
        (
            torch.where(exists, sequence, -1),
            torch.where(exists, start, 0),
            torch.where(exists, torch.minimum(start + length, stop[sequence]), 0),
            torch.where(exists, first + 2 * last.to(torch.int64), 0),
        ),
        dim=1,
    )
    return table.to(torch.int32), offsets.to(torch.int32)
