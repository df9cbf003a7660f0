"""Gradients of the decay gates of token-causal linear attention.

With `D_t` the gradient of the loss with respect to `S_t`, `dL/da_t = <S_{t-1}, D_t>`: a sum over all pairs of a write before
t and a read from t on, each times the gates between them but for `a_t`. Those of a tile are of four kinds, by whether the
write is before the tile and the read behind it:

    before, behind   P(..t-1) P(t+1..) <S, D>            S before the tile, D behind it
    before, inside   P(..t-1) sum_j L(t+1..j) c_j        c_j = dO_j S^T q_j
    inside, behind   P(t+1..) sum_i L(i+1..t-1) e_i      e_i = r_i v_i D^T k_i
    inside, inside   sum_i L(i+1..t-1) sum_j r_i (q_j k_i) (dO_j v_i) L(t+1..j)

The passes for q and k find `<S, D>`, `c` and `e`. Every product of gates is of those that are meant, none is a quotient, and
no sums are subtracted: the gradient of a gate of 0 is as exact as any.
"""

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
    token_strides,
)
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv
from kvbind.kernels.launching.launcher import Description, Launcher


@triton.jit
def _sum_of_parts(x, places, rows, stride, PARTS: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros((TILE,), tl.float32)
    for part in range(0, PARTS):
        total += tl.load(x + part * stride + places, mask=rows, other=0.0)
    return total


@Launcher
@triton.jit(do_not_specialize=["tokens", "length", "each", "all_tokens", "tiles_each", "tiles"])
def _gate_gradient_kernel(
    q, k, v, d_out, read_dots, write_dots, anchors, rates, gates, out, table,
    tokens, length, each, all_tokens, tiles_each, tiles, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, d_row, d_token, d_head,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SIGN: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile and head; `tiles` of them in a segment."""
    program = tl.program_id(0)
    step = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    index = program // (tiles * heads)
    row, sequence, start, stop, _ends = segment(index, table, tokens, length, each, False)
    token = (start + step * TILE).to(tl.int64)
    if sequence < 0 or token >= stop:
        return
    at = tl.arange(0, TILE)
    rows = at < stop - token
    places = ((row * tokens + token) + at) * heads + head

    q += row * q_row + head * q_head + token * q_token
    k += row * k_row + head * k_head + token * k_token
    v += row * v_row + head * v_head + token * v_token
    d_out += row * d_row + head * d_head + token * d_token
    channels = tl.arange(0, BLOCK)
    # rows are of the tokens that read
    matched = tl.zeros((TILE, TILE), tl.float32)
    for block in range(0, DK, BLOCK):
        x = read_rows(q + block, at[:, None] * q_token + channels[None, :], rows, block + channels, DK, BLOCK)
        y = read_rows(k + block, at[:, None] * k_token + channels[None, :], rows, block + channels, DK, BLOCK)
        matched = tl.dot(x, tl.trans(y), matched, input_precision=PRECISION)
    given = tl.zeros((TILE, TILE), tl.float32)
    silent = tl.full((TILE,), 1, tl.int32)
    for block in range(0, DV, BLOCK):
        x = read_rows(d_out + block, at[:, None] * d_token + channels[None, :], rows, block + channels, DV, BLOCK)
        y = read_rows(v + block, at[:, None] * v_token + channels[None, :], rows, block + channels, DV, BLOCK)
        silent = tl.minimum(silent, rows_silent(x))
        given = tl.dot(x, tl.trans(y), given, input_precision=PRECISION)
    rate = tl.full((TILE,), SIGN, tl.float32)
    if rates is not None:
        loaded = tl.load(rates + places, mask=rows, other=0.0)
        rate *= tl.where(tl.abs(loaded) < float("inf"), loaded, 0.0)
    # what has no gradient is left out by selection, as it may be anything
    earlier = at[None, :] < at[:, None]
    pairs = tl.where(earlier & (silent == 0)[:, None], matched * given * rate[None, :], 0.0)

    whole, rest = logarithms(gates, places, rows, True)
    wholes, rests = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
    wholes_before, rests_before = wholes - whole, rests - rest
    before = tl.exp2(wholes_before + rests_before)
    after = tl.exp2((tl.sum(whole, 0) - wholes) + (tl.sum(rest, 0) - rests))
    # rows are of reads j, then of writes i; columns of gates t
    reach = (wholes[:, None] - wholes[None, :]) + (rests[:, None] - rests[None, :])
    reading = at[:, None] >= at[None, :]
    from_gate = tl.where(reading, tl.exp2(tl.where(reading, reach, 0.0)), 0.0)
    reach = (wholes_before[None, :] - wholes[:, None]) + (rests_before[None, :] - rests[:, None])
    writing = at[:, None] < at[None, :]
    to_gate = tl.where(writing, tl.exp2(tl.where(writing, reach, 0.0)), 0.0)

    stride = all_tokens.to(tl.int64) * heads
    c = _sum_of_parts(read_dots, places, rows, stride, PARTS, TILE)
    e = rate * _sum_of_parts(write_dots, places, rows, stride, PARTS, TILE)
    across = 0.0
    tile = (sequence * tiles_each + token // TILE) * heads + head
    for part in range(0, PARTS):
        across += tl.load(anchors + tile * PARTS + part)
    found = before * after * across
    found += before * tl.sum(tl.where(reading, from_gate * c[:, None], 0.0), 0)
    inside = e[:, None] * after[None, :] + tl.dot(tl.trans(pairs), from_gate, input_precision=EXACT)
    found += tl.sum(tl.where(writing, to_gate * inside, 0.0), 0)
    tl.store(out + places, found, mask=rows)


def gate_gradients(
    segments: Segments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    read_dots: Tensor,
    write_dots: Tensor,
    anchors: Tensor,
    rates: Tensor | None,
    gates: Tensor,
    sign: int,
) -> Tensor:
    """Gradients with respect to decay gates.

    Args:
        segments: how sequences are cut.
        q: queries `[B, T, H, DK]`, as k.
        k: keys.
        v: values `[B, T, H, DV]`, as the gradient of the outputs.
        d_out: that gradient.
        read_dots: `c`, float32 `[parts, B, T, H]`.
        write_dots: `e` without rates and sign, the same.
        anchors: `<S, D>`, float32 `[tiles, H, parts]`.
        rates: float32 `[B, T, H]`, contiguous, or None.
        gates: float32 `[B, T, H]`, contiguous.
        sign: 1 or -1, of every write.

    Returns:
        float32 `[B, T, H]`.
    """
    batch, tokens, heads = gates.shape
    out = torch.empty_like(gates)
    if not segments.count * heads:
        return out

    def describe() -> Description:
        tiles, wide, precision = cdiv(segments.length, TILE), q.dtype == torch.float32, product_precision(q.dtype)
        numbers = (
            tokens, segments.length, segments.each, batch * tokens, segments.tiles_each(tokens), tiles, heads,
            *token_strides(q), *token_strides(k), *token_strides(v), *token_strides(d_out),
        )  # fmt: skip
        return (segments.count * heads * tiles,), numbers, {
            "DK": q.shape[-1], "DV": v.shape[-1], "BLOCK": 32 if wide else 64, "PARTS": len(read_dots), "SIGN": sign,
            "TILE": TILE, "PRECISION": precision, "EXACT": precision if wide else "tf32", "num_warps": 8,
        }  # fmt: skip

    tensors = (q, k, v, d_out, read_dots, write_dots, anchors, rates, gates, out, segments.table)
    with on_device_of(gates):
        _gate_gradient_kernel.repeat(segments.launches, "gates", tensors, describe)
    return out
