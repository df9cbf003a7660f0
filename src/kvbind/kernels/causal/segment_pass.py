"""Kernels of token-causal linear attention: one pass over the tokens of a segment, in either direction.

Sequences are cut into *segments*, as many as fill the device. A pass goes through a segment tile by tile with the state in
registers: it reads the state, attends to the tile's own tokens, and adds their writes. Outputs and the gradients of queries,
keys and values are four passes that differ in operands and direction:

| pass | reads with | keys | values | state | direction |
|---|---|---|---|---|---|
| outputs | q | k | v | S | forward |
| gradient of q | dO | v | k | S^T | forward |
| gradient of k | v | dO | q | D^T | reverse |
| gradient of v | k | q | dO | D | reverse |

with `D` the gradient of the loss with respect to the state. States between segments come from the segments' writes, summed
by a scan. Where gates are differentiated, the pass for q also stores the state before each tile, in the operands' dtype.

Gates multiply, inside a tile as powers of two of differences of summed logarithms (`segments.logarithms`). Their gradients
(`kvbind.kernels.causal.gate_gradients`) multiply too: nothing is divided by a gate.

What is not finite reaches only what sees it. A product by zero would hand a NaN from a later token to an earlier one of its
tile, so a segment whose state ends with one is gone through once more, with such tokens taken out by selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.causal.segments import (
    TILE,
    Segments,
    any_wrong,
    finite,
    initial_state,
    logarithms,
    product_precision,
    read_rows,
    rows_silent,
    rows_wrong,
    segment,
    state_places,
    store_state,
    token_strides,
)
from kvbind.kernels.common.devices import by_warpgroups, on_device_of
from kvbind.kernels.common.operands import cdiv
from kvbind.kernels.launching.launcher import Description, Launcher


@triton.jit
def _inner_product(tile_states, base, state, inner, columns, DK: tl.constexpr, DV: tl.constexpr):
    """The inner product of two blocks of states."""
    places, inside = state_places(inner, columns, DK, DV, False)
    return tl.sum(state * tl.load(tile_states + base + places, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _store_dots(
    dots, places, acc, primal, token, primal_token, at, columns, rows, DV: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Store the inner products of a result's rows with those of what it is the gradient of."""
    original = read_rows(primal + token * primal_token, at[:, None] * primal_token + columns[None, :], rows, columns, DV, BV)
    tl.store(dots + places, tl.sum(acc * finite(original).to(tl.float32), 1), mask=rows)


@triton.jit
def _wrong_state(s0, s1, s2, s3, NK: tl.constexpr):
    """1 where any number of a state is not finite, else 0."""
    wrong = any_wrong(s0)
    if NK > 1:
        wrong = tl.maximum(wrong, any_wrong(s1))
    if NK > 2:
        wrong = tl.maximum(wrong, any_wrong(s2))
    if NK > 3:
        wrong = tl.maximum(wrong, any_wrong(s3))
    return wrong


@Launcher
@triton.jit(do_not_specialize=["tokens", "length", "each", "all_tokens", "tiles_each"])
def _pass_kernel(
    read, key, value, primal, out, dots, rates, gates, states, end, tile_states, anchors, wrongs, table,
    tokens, length, each, all_tokens, tiles_each, heads,
    read_row, read_token, read_head, key_row, key_token, key_head,
    value_row, value_token, value_head, primal_row, primal_token, primal_head,
    DK: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr, STRICT: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, NK: tl.constexpr, BV: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """One segment, head and block of value columns; the state's rows are `NK` blocks of `BK`, all in registers.

    With `CAREFUL`, segments in which something is not finite, once more. Forward passes take tokens out whose key, value,
    rate or gate is not finite, and mark what sees them; reverse passes take out what is not finite and, whole, tokens whose
    outputs have no gradient.
    """
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    block = program % NV
    head = ((program // NV) % heads).to(tl.int64)
    index = program // (NV * heads)
    row, sequence, start, stop, ends = segment(index, table, tokens, length, each, REVERSE)
    place = index.to(tl.int64) * heads + head
    if sequence < 0:
        return
    if CAREFUL:  # noqa: SIM102 (known when compiled, unlike the next)
        if tl.load(wrongs + place) == 0:
            return
    # every state is [segments or sequences, heads, DK * DV]
    base = place * (DK * DV)
    read += row * read_row + head * read_head
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    primal += row * primal_row + head * primal_head

    dtype: tl.constexpr = read.dtype.element_ty
    at = tl.arange(0, TILE)
    columns = block * BV + tl.arange(0, BV)
    inner = tl.arange(0, BK)
    s0 = initial_state(states, base, inner, columns, DK, DV, BK, BV, TRANSPOSED)
    s1, s2, s3 = s0, s0, s0
    if NK > 1:
        s1 = initial_state(states, base, BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)
    if NK > 2:
        s2 = initial_state(states, base, 2 * BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)
    if NK > 3:
        s3 = initial_state(states, base, 3 * BK + inner, columns, DK, DV, BK, BV, TRANSPOSED)
    tainted = 0
    if CAREFUL and not REVERSE:
        tainted = _wrong_state(s0, s1, s2, s3, NK)
        s0, s1, s2, s3 = finite(s0), finite(s1), finite(s2), finite(s3)

    mine, other = (at // CHUNK)[:, None], (at // CHUNK)[None, :]
    ahead = other - mine if REVERSE else mine - other
    visible = ahead > 0 if STRICT else ahead >= 0

    read_places = at[:, None] * read_token + inner[None, :]
    key_places = at[:, None] * key_token + inner[None, :]
    value_places = at[:, None] * value_token + columns[None, :]
    out_places = at[:, None] * (heads * DV) + columns[None, :]

    count = tl.cdiv(stop - start, STEP)
    for step in range(0, count):
        token = (start + ((count - 1 - step) if REVERSE else step) * STEP).to(tl.int64)
        rows = at < tl.minimum(STEP, stop - token)
        places = ((row * tokens + token) + at) * heads + head
        read_tile, key_tile = read + token * read_token, key + token * key_token
        if tile_states is not None:
            # tiles of packed sequences may begin in the same 64 tokens
            tile = ((sequence * tiles_each + token // TILE) * heads + head) * (DK * DV)
            if REVERSE:
                product = _inner_product(tile_states, tile, s0, inner, columns, DK, DV)
                if NK > 1:
                    product += _inner_product(tile_states, tile, s1, BK + inner, columns, DK, DV)
                if NK > 2:
                    product += _inner_product(tile_states, tile, s2, 2 * BK + inner, columns, DK, DV)
                if NK > 3:
                    product += _inner_product(tile_states, tile, s3, 3 * BK + inner, columns, DK, DV)
                tl.store(anchors + ((sequence * tiles_each + token // TILE) * heads + head) * NV + block, product)
            else:
                store_state(tile_states, tile, s0.to(dtype), inner, columns, DK, DV)
                if NK > 1:
                    store_state(tile_states, tile, s1.to(dtype), BK + inner, columns, DK, DV)
                if NK > 2:
                    store_state(tile_states, tile, s2.to(dtype), 2 * BK + inner, columns, DK, DV)
                if NK > 3:
                    store_state(tile_states, tile, s3.to(dtype), 3 * BK + inner, columns, DK, DV)

        x = read_rows(read_tile, read_places, rows, inner, DK, BK)
        y0 = read_rows(key_tile, key_places, rows, inner, DK, BK)
        z = read_rows(value + token * value_token, value_places, rows, columns, DV, BV)
        if CAREFUL:
            quiet = rows_silent(x)
            dropped = rows_silent(y0) if REVERSE else tl.maximum(rows_wrong(y0), rows_wrong(z))
            x = finite(x) if REVERSE else x
        scores = tl.dot(x, tl.trans(y0), input_precision=PRECISION)
        acc = tl.dot(x, s0.to(dtype), input_precision=PRECISION)
        if NK > 1:
            x = read_rows(read_tile + BK, read_places, rows, BK + inner, DK, BK)
            y1 = read_rows(key_tile + BK, key_places, rows, BK + inner, DK, BK)
            if CAREFUL:
                quiet = tl.minimum(quiet, rows_silent(x))
                dropped = tl.minimum(dropped, rows_silent(y1)) if REVERSE else tl.maximum(dropped, rows_wrong(y1))
                x = finite(x) if REVERSE else x
            scores = tl.dot(x, tl.trans(y1), scores, input_precision=PRECISION)
            acc = tl.dot(x, s1.to(dtype), acc, input_precision=PRECISION)
        if NK > 2:
            x = read_rows(read_tile + 2 * BK, read_places, rows, 2 * BK + inner, DK, BK)
            y2 = read_rows(key_tile + 2 * BK, key_places, rows, 2 * BK + inner, DK, BK)
            if CAREFUL:
                quiet = tl.minimum(quiet, rows_silent(x))
                dropped = tl.minimum(dropped, rows_silent(y2)) if REVERSE else tl.maximum(dropped, rows_wrong(y2))
                x = finite(x) if REVERSE else x
            scores = tl.dot(x, tl.trans(y2), scores, input_precision=PRECISION)
            acc = tl.dot(x, s2.to(dtype), acc, input_precision=PRECISION)
        if NK > 3:
            x = read_rows(read_tile + 3 * BK, read_places, rows, 3 * BK + inner, DK, BK)
            y3 = read_rows(key_tile + 3 * BK, key_places, rows, 3 * BK + inner, DK, BK)
            if CAREFUL:
                quiet = tl.minimum(quiet, rows_silent(x))
                dropped = tl.minimum(dropped, rows_silent(y3)) if REVERSE else tl.maximum(dropped, rows_wrong(y3))
                x = finite(x) if REVERSE else x
            scores = tl.dot(x, tl.trans(y3), scores, input_precision=PRECISION)
            acc = tl.dot(x, s3.to(dtype), acc, input_precision=PRECISION)

        rate = tl.full((TILE,), 1.0, tl.float32)
        if rates is not None:
            rate = tl.load(rates + places, mask=rows, other=0.0)
        if CAREFUL:
            if REVERSE and not TRANSPOSED:
                # here the gradient is in the values
                dropped = rows_silent(z)
            if not REVERSE:
                dropped = tl.maximum(dropped, tl.where(tl.abs(rate) < float("inf"), 0, 1))
                if gates is not None:
                    gate = tl.load(gates + places, mask=rows, other=1.0)
                    dropped = tl.maximum(dropped, tl.where(tl.abs(gate) < float("inf"), 0, 1))
            rate = tl.where(tl.abs(rate) < float("inf"), rate, 0.0)
            # read once more without them: selecting rows of float32 operands here does not compile
            left = rows & (dropped == 0)
            y0 = read_rows(key_tile, key_places, left, inner, DK, BK)
            z = read_rows(value + token * value_token, value_places, left, columns, DV, BV)
            if NK > 1:
                y1 = read_rows(key_tile + BK, key_places, left, BK + inner, DK, BK)
            if NK > 2:
                y2 = read_rows(key_tile + 2 * BK, key_places, left, 2 * BK + inner, DK, BK)
            if NK > 3:
                y3 = read_rows(key_tile + 3 * BK, key_places, left, 3 * BK + inner, DK, BK)
            scores = tl.where(dropped[None, :] > 0, 0.0, scores)

        if dots is not None and tile_states is not None:
            dot_places = block * (all_tokens.to(tl.int64) * heads) + places
            _store_dots(dots, dot_places, acc, primal, token, primal_token, at, columns, rows, DV, BV)

        # forward passes weight what writes, reverse passes what is read: the rate and the sign belong to the key's token
        rate *= SIGN
        weight = rate
        if gates is not None:
            whole, rest = logarithms(gates, places, rows, REVERSE or CAREFUL)
            wholes, rests = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
            all_wholes, all_rests = tl.sum(whole, 0), tl.sum(rest, 0)
            from_start = tl.exp2(wholes + rests)
            to_end = tl.exp2((all_wholes - wholes) + (all_rests - rests))
            keep = tl.exp2(all_wholes + all_rests)
            span = (wholes[:, None] - wholes[None, :]) + (rests[:, None] - rests[None, :])
            # pairs that are not seen may have huge exponents
            scores *= tl.exp2(tl.minimum(-span if REVERSE else span, 0.0))
            if REVERSE:
                acc *= to_end[:, None]
                weight = from_start
            else:
                acc *= from_start[:, None]
                weight = rate * to_end
        if not REVERSE and (rates is not None or SIGN < 0):
            scores *= rate[None, :]
        scores = tl.where(visible, scores, 0.0)
        acc = tl.dot(scores.to(dtype), z, acc, input_precision=PRECISION)

        if CAREFUL and not REVERSE:
            poisoned = tl.maximum(tl.max(tl.where(visible, dropped[None, :], 0), 1), tainted)
            tainted = tl.maximum(tainted, tl.max(dropped, 0))
            if TRANSPOSED:
                # a gradient of nothing is nothing
                poisoned = tl.where(quiet > 0, 0, poisoned)
            acc = tl.where(poisoned[:, None] > 0, float("nan"), acc)
        if REVERSE and SIGN < 0:
            acc = -acc
        if dots is not None and tile_states is None:
            dot_places = block * (all_tokens.to(tl.int64) * heads) + places
            _store_dots(dots, dot_places, acc, primal, token, primal_token, at, columns, rows, DV, BV)
        if REVERSE and rates is not None:
            acc *= (rate * SIGN)[:, None]
        stored = rows[:, None] if DV % BV == 0 else rows[:, None] & (columns < DV)[None, :]
        out_tile = out + ((row * tokens + token) * heads + head) * DV
        tl.store(out_tile + out_places, acc.to(out.dtype.element_ty), mask=stored)

        if gates is not None or (not REVERSE and (rates is not None or SIGN < 0)):
            z = (z.to(tl.float32) * weight[:, None]).to(dtype)
        if gates is not None:
            s0 *= keep
            if NK > 1:
                s1 *= keep
            if NK > 2:
                s2 *= keep
            if NK > 3:
                s3 *= keep
        s0 = tl.dot(tl.trans(y0), z, s0, input_precision=PRECISION)
        if NK > 1:
            s1 = tl.dot(tl.trans(y1), z, s1, input_precision=PRECISION)
        if NK > 2:
            s2 = tl.dot(tl.trans(y2), z, s2, input_precision=PRECISION)
        if NK > 3:
            s3 = tl.dot(tl.trans(y3), z, s3, input_precision=PRECISION)

    if not CAREFUL:
        wrong = _wrong_state(s0, s1, s2, s3, NK)
        tl.store(wrongs + place, 1, mask=wrong > 0)
    if end is not None:  # noqa: SIM102 (known when compiled, unlike the next)
        if ends:
            if CAREFUL:
                spoilt = tl.where(tainted > 0, float("nan"), 0.0)
                s0, s1, s2, s3 = s0 + spoilt, s1 + spoilt, s2 + spoilt, s3 + spoilt
            base = (sequence.to(tl.int64) * heads + head) * (DK * DV)
            store_state(end, base, s0, inner, columns, DK, DV)
            if NK > 1:
                store_state(end, base, s1, BK + inner, columns, DK, DV)
            if NK > 2:
                store_state(end, base, s2, 2 * BK + inner, columns, DK, DV)
            if NK > 3:
                store_state(end, base, s3, 3 * BK + inner, columns, DK, DV)


@dataclass(frozen=True)
class PassBlocks:
    """How a pass over operands of given widths is cut.

    Attributes:
        rows: rows of the state in one of its blocks, `BK`.
        row_blocks: blocks of rows, all in one program, `NK`.
        columns: columns of the state in one program, `BV`.
        warps: warps of a program.
        stages: depth of the pipeline of loads.
        resident: programs that fit on one multiprocessor of an H100.
    """

    rows: int
    row_blocks: int
    columns: int
    warps: int
    stages: int
    resident: int


def pass_blocks(dtype: torch.dtype, read_width: int, value_width: int) -> PassBlocks:
    """The blocks for a pass."""
    # widths are compiled into the kernels: where a trace has them as symbols, it takes their values
    return _pass_blocks(dtype, int(read_width), int(value_width))


@cache
def _pass_blocks(dtype: torch.dtype, read_width: int, value_width: int) -> PassBlocks:
    fits = ((n * b, -b, n) for b in (16, 32, 64, 128) for n in (1, 2, 3, 4) if n * b >= read_width)
    rows, negative, row_blocks = min(fits)
    # 64 rows of a tile are one warp group; with two, both would multiply the same rows
    narrow = dtype.itemsize == 2
    most = 64 if narrow and rows <= 256 else 32

    def cost(columns: int) -> int:
        return cdiv(value_width, columns) * (TILE * (rows + columns) + 2 * rows * columns)

    columns = min((b for b in (64, 32, 16) if b <= most), key=cost)
    if not narrow:
        return PassBlocks(-negative, row_blocks, columns, 8, 1, 1)
    return PassBlocks(-negative, row_blocks, columns, 4, 2 if rows <= 384 else 1, 2 if rows <= 128 else 1)


def segment_pass(
    segments: Segments,
    read: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    states: Tensor | None,
    rates: Tensor | None,
    gates: Tensor | None,
    chunk: int,
    strict: bool,
    sign: int,
    wrongs: Tensor,
    name: str,
    reverse: bool = False,
    transposed: bool = False,
    end: Tensor | None = None,
    primal: Tensor | None = None,
    tile_states: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One pass over all segments.

    Args:
        segments: how sequences are cut.
        read: what reads, `[B, T, H, DK]`.
        key: what it is matched with, `[B, T, H, DK]`.
        value: what it gets, `[B, T, H, DV]`.
        states: float32 `[segments, H, DK, DV]` in which each segment's pass starts, None for zeros.
        rates: weights of the keys' tokens, float32 `[B, T, H]`, contiguous, or None.
        gates: decay of each token, the same.
        chunk: tokens that share their visibility.
        strict: a chunk does not see itself.
        sign: 1 or -1, of every write.
        wrongs: int32 `[segments, H]`, zeros at first: where passes mark segments in which something is not finite, for
            themselves and those that follow. Such segments are gone through once more.
        name: of the pass among those of a call.
        reverse: go from the last token to the first; the rates then belong to what reads.
        transposed: states are stored as `[DV, DK]`.
        end: where to put the state after each sequence's pass, `[sequences, H, DK, DV]`.
        primal: what the result is the gradient of, `[B, T, H, DV]`; asks for the inner products of the two.
        tile_states: the state before each tile, `[tiles, H, DK, DV]`: a forward pass puts them there, a reverse pass finds
            their inner products with its own. The inner products with `primal` are then of what is read from the state
            alone.

    Returns:
        The result `[B, T, H, DV]`; its inner products with `primal` before rates, `[blocks, B, T, H]`, each of which sums
        over some columns; and those with `tile_states`, `[tiles, H, blocks]`.
    """
    batch, tokens, heads, width = value.shape
    blocks = pass_blocks(read.dtype, read.shape[-1], width)
    parts = cdiv(width, blocks.columns)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    dots = None if primal is None else value.new_empty((parts, batch, tokens, heads), dtype=torch.float32)
    anchors = None
    if tile_states is not None and reverse:
        anchors = value.new_empty((len(tile_states), heads, parts), dtype=torch.float32)
    if not segments.count * heads:
        return out, dots, anchors
    given = value if primal is None else primal

    many: dict[str, int] = {}
    if blocks.rows * blocks.row_blocks >= 256 and (read.dtype == torch.float32 or not by_warpgroups(read)):
        # where it was not said, `ptxas` 12.8 gave such kernels 32 without `wgmma`
        many["maxnreg"] = 255

    def describe(careful: bool) -> Description:
        numbers = (
            tokens, segments.length, segments.each, batch * tokens, segments.tiles_each(tokens), heads,
            *token_strides(read), *token_strides(key), *token_strides(value), *token_strides(given),
        )  # fmt: skip
        return (segments.count * heads * parts,), numbers, {
            "DK": read.shape[-1], "DV": width, "TILE": TILE, "STEP": TILE // chunk * chunk, "CHUNK": chunk, "STRICT": strict,
            "REVERSE": reverse, "TRANSPOSED": transposed, "SIGN": sign, "PRECISION": product_precision(read.dtype),
            "BK": blocks.rows, "NK": blocks.row_blocks, "BV": blocks.columns, "CAREFUL": careful,
            "num_warps": blocks.warps, "num_stages": 1 if careful else blocks.stages, **many,
        }  # fmt: skip

    tensors = (
        read, key, value, given, out, dots, rates, gates, states, end, tile_states, anchors, wrongs, segments.table,
    )  # fmt: skip
    with on_device_of(read):
        _pass_kernel.repeat(segments.launches, name, tensors, lambda: describe(False))
        _pass_kernel.repeat(segments.launches, f"{name} with care", tensors, lambda: describe(True))
    return out, dots, anchors
