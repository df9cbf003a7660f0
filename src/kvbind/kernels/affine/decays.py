"""What rates and gates per head are to the tokens of each chunk: sums of logarithms and products, found once.

Of each token t of a chunk of C, with `b_t` the product of its gates up to t and c that of those that residuals see: the
summed logarithms, whole and rest, up to t and as residuals see them; the same of gates that are no less than 2^-64 (whole
alone, as rests are the same); b, `b_C / b`, r, and r c.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbind.kernels.causal.segments import logarithms, segment
from kvbind.kernels.launching.launcher import Launcher

PLANES = ("whole", "rest", "seen_whole", "seen_rest", "floored", "seen_floored", "reach", "tail", "weight", "share")


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _decays_kernel(
    decays, rates, gates, keeps, marks, table, tokens, each, plane, heads,
    C: tl.constexpr, BH: tl.constexpr, BEFORE: tl.constexpr, CHANNEL: tl.constexpr,
):  # fmt: skip
    """One chunk and block of heads. `decays` is `[PLANES, chunks, H, C]`; marks are 1 where a rate or gate is not finite."""
    blocks = (heads + BH - 1) // BH
    program = tl.program_id(0)
    head = (program % blocks) * BH + tl.arange(0, BH)[None, :]
    index = program // blocks
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    at = tl.arange(0, C)[:, None]
    live = (at < stop - start) & (head < heads)
    exists = (at >= 0) & (head < heads)
    places = (row * tokens + start + at).to(tl.int64) * heads + head
    wrong = tl.zeros((C, BH), tl.int32)
    rate = tl.where(live, 1.0, tl.zeros((C, BH), tl.float32))
    if rates is not None:
        rate = tl.load(rates + places, mask=live, other=0.0)
        good = tl.abs(rate) < float("inf")
        rate, wrong = tl.where(good, rate, 0.0), tl.where(good, 0, 1)
    out = decays + (index.to(tl.int64) * heads + head) * C + at
    stride = plane.to(tl.int64)
    reach = tl.full((C, BH), 1.0, tl.float32)
    tail, seen = reach, reach
    if gates is not None:
        gate = tl.load(gates + places, mask=live, other=1.0)
        wrong = tl.where(tl.abs(gate) < float("inf"), wrong, 1)
        whole, rest = logarithms(gates, places, live, True)
        wholes, rests = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
        floored = tl.maximum(whole, -64.0)
        sums = tl.cumsum(floored, 0)
        tl.store(out, wholes, mask=exists)
        tl.store(out + stride, rests, mask=exists)
        tl.store(out + 4 * stride, sums, mask=exists)
        reach = tl.exp2(wholes + rests)
        tail = tl.exp2((tl.sum(whole, 0)[None, :] - wholes) + (tl.sum(rest, 0)[None, :] - rests))
        keep = tl.exp2(tl.sum(whole, 0) + tl.sum(rest, 0))[None, :]
        tl.store(keeps + index.to(tl.int64) * heads + head, keep, mask=head < heads)
        seen = reach
        if not BEFORE:
            wholes, rests, sums = wholes - whole, rests - rest, sums - floored
            seen = tl.exp2(wholes + rests)
        tl.store(out + 2 * stride, wholes, mask=exists)
        tl.store(out + 3 * stride, rests, mask=exists)
        tl.store(out + 5 * stride, sums, mask=exists)
    elif not CHANNEL:
        tl.store(keeps + index.to(tl.int64) * heads + head, tl.full((1, BH), 1.0, tl.float32), mask=head < heads)
    tl.store(out + 6 * stride, reach, mask=exists)
    tl.store(out + 7 * stride, tail, mask=exists)
    tl.store(out + 8 * stride, rate, mask=exists)
    tl.store(out + 9 * stride, rate * seen, mask=exists)
    tl.store(marks + places, wrong.to(tl.int8), mask=live)


@triton.jit(do_not_specialize=["tokens", "each", "plane"])
def _gate_gradients_kernel(
    given, anchors, decays, gates, d_rates, d_gates, table, tokens, each, plane, heads,
    C: tl.constexpr, BH: tl.constexpr, NK: tl.constexpr, BEFORE: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Gradients of rates and gates of one chunk and block of heads, from what pairs and blocks of key channels give.

    `given` is `[2 + 3 NK, chunks, H, C]`: what pairs give to rates and to logarithms of gates; and of each block of keys,
    sums over channels of `r_t c_t` times what residuals give, of what reads give, and of what writes give. `anchors` is
    `[NK, chunks, H]`. No sums are subtracted, so that gradients of small gates are as exact as others.
    """
    blocks = (heads + BH - 1) // BH
    program = tl.program_id(0)
    head = (program % blocks) * BH + tl.arange(0, BH)[None, :]
    index = program // blocks
    row, sequence, start, stop, _ends = segment(index, table, tokens, C, each, False)
    if sequence < 0:
        return
    at = tl.arange(0, C)[:, None]
    exists = (at >= 0) & (head < heads)
    live = (at < stop - start) & (head < heads)
    places = (row * tokens + start + at).to(tl.int64) * heads + head
    place = index.to(tl.int64) * heads + head
    its, stride = place * C + at, plane.to(tl.int64)
    part = given + 2 * stride
    if d_rates is not None:
        found = tl.load(given + its, mask=exists, other=0.0)
        if DELTA:
            seen = tl.full((C, BH), 1.0, tl.float32)
            if gates is not None:
                seen = _products(decays, 2, its, stride, exists)
            found -= seen * _sum_of_parts(part, its, stride, exists, NK, C, BH)
        tl.store(d_rates + places, found, mask=live)
    if gates is not None:
        whole, rest = logarithms(gates, places, live, True)
        whole = tl.maximum(whole, -64.0)
        total = tl.exp2(tl.sum(whole, 0) + tl.sum(rest, 0))[None, :]
        anchor = tl.zeros((1, BH), tl.float32)
        for block in range(0, NK):
            anchor += tl.load(anchors + block * (stride // C) + place, mask=head < heads, other=0.0)
        found = tl.load(given + stride + its, mask=exists, other=0.0) + anchor * total
        late = _sum_of_parts(part + stride, its, stride, exists, NK, C, BH) * _floored(decays, 4, 1, its, stride, exists)
        if DELTA:
            # of the token itself, or, where residuals do not see its gate, of the next
            there = exists if BEFORE else exists & (at + 1 < C)
            its_next = its if BEFORE else its + 1
            erased = _sum_of_parts(part, its_next, stride, there, NK, C, BH)
            erased *= -tl.load(decays + 8 * stride + its_next, mask=there, other=0.0)
            late += erased * _floored(decays, 5, 3, its_next, stride, there)
        there = exists & (at > 0)
        early = _sum_of_parts(part + 2 * stride, its - 1, stride, there, NK, C, BH)
        gone = tl.load(decays + 4 * stride + its - 1, mask=there, other=0.0)
        gone += tl.load(decays + stride + its - 1, mask=there, other=0.0)
        early *= tl.exp2(tl.sum(whole, 0)[None, :] + tl.sum(rest, 0)[None, :] - gone)
        found += tl.cumsum(late, 0, reverse=True) + tl.cumsum(early, 0)
        tl.store(d_gates + places, found * tl.exp2(-whole - rest), mask=live)


@triton.jit
def _sum_of_parts(part, its, stride, there, NK: tl.constexpr, C: tl.constexpr, BH: tl.constexpr):
    """What all blocks of key channels give."""
    found = tl.zeros((C, BH), tl.float32)
    for block in range(0, NK):
        found += tl.load(part + 3 * block * stride + its, mask=there, other=0.0)
    return found


@triton.jit
def _floored(decays, whole, rest, its, stride, there):
    """Products of gates that are no less than 2^-64."""
    sums = tl.load(decays + whole * stride + its, mask=there, other=0.0)
    return tl.exp2(sums + tl.load(decays + rest * stride + its, mask=there, other=0.0))


@triton.jit
def _products(decays, whole, its, stride, there):
    """Products of gates, of sums of which the rests are behind the whole ones."""
    sums = tl.load(decays + whole * stride + its, mask=there, other=0.0)
    return tl.exp2(sums + tl.load(decays + (whole + 1) * stride + its, mask=there, other=0.0))


decays = Launcher(_decays_kernel)
gate_gradients = Launcher(_gate_gradients_kernel)
