"""The states in which segments start: each segment's writes and the product of its gates, then a scan over segments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.causal.segments import (
    TILE,
    Segments,
    logarithms,
    product_precision,
    read_rows,
    rows_silent,
    segment,
    store_state,
    token_strides,
    without,
)
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv
from kvbind.kernels.launching.launcher import Description, Launcher

_SCAN_BLOCK = 512


@Launcher
@triton.jit(do_not_specialize=["tokens", "length", "each"])
def _write_kernel(
    key, value, rates, gates, writes, keeps, table, tokens, length, each, heads,
    key_row, key_token, key_head, value_row, value_token, value_head,
    DK: tl.constexpr, DV: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state behind it (before it in a reverse pass), and the product of its gates."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    NV: tl.constexpr = (DV + BV - 1) // BV
    program = tl.program_id(0)
    block_v = program % NV
    block_k = (program // NV) % NK
    head = ((program // (NV * NK)) % heads).to(tl.int64)
    index = program // (NV * NK * heads)
    row, sequence, start, stop, ends = segment(index, table, tokens, length, each, REVERSE)
    # nobody reads what the pass's last segment, or one that does not exist, would write
    if ends or sequence < 0:
        stop = start

    at = tl.arange(0, TILE)
    inner, columns = block_k * BK + tl.arange(0, BK), block_v * BV + tl.arange(0, BV)
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head
    key_places = at[:, None] * key_token + inner[None, :]
    value_places = at[:, None] * value_token + columns[None, :]
    acc = tl.zeros((BK, BV), tl.float32)
    kept = 1.0
    count = tl.cdiv(stop - start, TILE)
    for step in range(0, count):
        token = (start + ((count - 1 - step) if REVERSE else step) * TILE).to(tl.int64)
        rows = at < stop - token
        places = ((row * tokens + token) + at) * heads + head
        y = read_rows(key + token * key_token, key_places, rows, inner, DK, BK)
        z = read_rows(value + token * value_token, value_places, rows, columns, DV, BV)
        if REVERSE:
            # where there is no gradient, queries may be anything
            y = without(y, rows_silent(z))
        weight = tl.full((TILE,), SIGN, tl.float32)
        if rates is not None:
            weight *= tl.load(rates + places, mask=rows, other=0.0)
        if gates is not None:
            whole, rest = logarithms(gates, places, rows, REVERSE)
            wholes, rests = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
            all_wholes, all_rests = tl.sum(whole, 0), tl.sum(rest, 0)
            keep = tl.exp2(all_wholes + all_rests)
            if REVERSE:
                weight *= tl.exp2(wholes + rests)
            else:
                weight *= tl.exp2((all_wholes - wholes) + (all_rests - rests))
            acc *= keep
            kept *= keep
        if rates is not None or gates is not None or SIGN < 0:
            z = (z.to(tl.float32) * weight[:, None]).to(z.dtype)
        acc = tl.dot(tl.trans(y), z, acc, input_precision=PRECISION)
    place = index.to(tl.int64) * heads + head
    store_state(writes, place * (DK * DV), acc, inner, columns, DK, DV)
    if gates is not None:  # noqa: SIM102
        if block_k + block_v == 0:
            tl.store(keeps + place, kept)


@Launcher
@triton.jit(do_not_specialize=["each"])
def _scan_kernel(
    writes, keeps, initial, offsets, each, heads, SIZE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Turn the segments' writes into the states in which passes start, in place."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    element = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    head = ((program // BLOCKS) % heads).to(tl.int64)
    sequence = program // (BLOCKS * heads)
    inside = element < SIZE
    if offsets is None:
        begin, count = sequence * each, each
    else:
        begin = tl.load(offsets + sequence)
        count = tl.load(offsets + sequence + 1) - begin
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + (sequence.to(tl.int64) * heads + head) * SIZE + element, mask=inside, other=0.0)
    # by fours, so that four loads are under way at once
    for step in range(0, count, 4):
        p0 = (begin + (count - 1 - step if REVERSE else step)).to(tl.int64) * heads + head
        hop = -heads if REVERSE else heads
        p1, p2, p3 = p0 + hop, p0 + 2 * hop, p0 + 3 * hop
        i1, i2, i3 = inside & (step + 1 < count), inside & (step + 2 < count), inside & (step + 3 < count)
        w0 = tl.load(writes + p0 * SIZE + element, mask=inside, other=0.0)
        w1 = tl.load(writes + p1 * SIZE + element, mask=i1, other=0.0)
        w2 = tl.load(writes + p2 * SIZE + element, mask=i2, other=0.0)
        w3 = tl.load(writes + p3 * SIZE + element, mask=i3, other=0.0)
        a0, a1, a2, a3 = 1.0, 1.0, 1.0, 1.0
        if keeps is not None:
            a0 = tl.load(keeps + p0)
            a1 = tl.load(keeps + p1, mask=step + 1 < count, other=1.0)
            a2 = tl.load(keeps + p2, mask=step + 2 < count, other=1.0)
            a3 = tl.load(keeps + p3, mask=step + 3 < count, other=1.0)
        tl.store(writes + p0 * SIZE + element, state, mask=inside)
        state = a0 * state + w0
        tl.store(writes + p1 * SIZE + element, state, mask=i1)
        state = a1 * state + w1
        tl.store(writes + p2 * SIZE + element, state, mask=i2)
        state = a2 * state + w2
        tl.store(writes + p3 * SIZE + element, state, mask=i3)
        state = a3 * state + w3


def write_block(width: int) -> int:
    """Block of a state's rows or columns where a program sums one block alone."""
    return next((b for b in (128, 64, 32) if cdiv(width, b) * b * 3 <= width * 4), 16)


def segment_states(
    segments: Segments,
    key: Tensor,
    value: Tensor,
    initial: Tensor | None,
    *,
    rates: Tensor | None,
    gates: Tensor | None,
    sign: int,
    reverse: bool = False,
) -> Tensor:
    """The states in which the passes over all segments start.

    Args:
        segments: how sequences are cut.
        key: `[B, T, H, DK]`.
        value: `[B, T, H, DV]`.
        initial: the state in which each sequence's pass starts, float32 `[sequences, H, DK, DV]`, or None for zeros.
        rates: weights of tokens, float32 `[B, T, H]`, contiguous, or None.
        gates: decay of each token, the same.
        sign: 1 or -1, of every write.
        reverse: go from the last token to the first.

    Returns:
        float32 `[segments, H, DK, DV]`.
    """
    tokens, heads, inner, width = key.shape[1], key.shape[2], key.shape[3], value.shape[3]
    states = key.new_empty((segments.count, heads, inner, width), dtype=torch.float32)
    keeps = None if gates is None else states.new_empty((segments.count, heads))
    if not segments.count * heads:
        return states

    def write() -> Description:
        bk, bv = write_block(inner), write_block(width)
        numbers = (tokens, segments.length, segments.each, heads, *token_strides(key), *token_strides(value))
        return (segments.count * heads * cdiv(inner, bk) * cdiv(width, bv),), numbers, {
            "DK": inner, "DV": width, "TILE": TILE if key.dtype != torch.float32 else 32, "REVERSE": reverse, "SIGN": sign,
            "PRECISION": product_precision(key.dtype), "BK": bk, "BV": bv, "num_warps": 8 if bk * bv > 64 * 64 else 4,
            "num_stages": 3 if key.dtype != torch.float32 else 2,
        }  # fmt: skip

    def scan() -> Description:
        constants = {"SIZE": inner * width, "REVERSE": reverse, "BLOCK": _SCAN_BLOCK, "num_warps": 4}
        return (segments.sequences * heads * cdiv(inner * width, _SCAN_BLOCK),), (segments.each, heads), constants

    known, table = segments.launches, segments.table
    with on_device_of(key):
        _write_kernel.repeat(known, "write", (key, value, rates, gates, states, keeps, table), write)
        _scan_kernel.repeat(known, "scan", (states, keeps, initial, segments.offsets), scan)
    return states
