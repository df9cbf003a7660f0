"""Token-causal linear attention, `o_t = q_t (S_0 + sum_{i <= t} r_i k_i^T v_i)`, optionally with decay gates.

The forward pass reads keys and values for the segments' writes, scans those (`segment_states`), and goes through the tokens
once (`segment_pass`); where sequences and heads alone fill the device, that is all there is. The backward pass goes through
them three times more. Saved for it: the operands and one state per segment; with gates, the backward pass makes a state per
tile while it runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvbind.inner.value import check_choice, check_positive_int
from kvbind.kernels.causal.gate_gradients import gate_gradients
from kvbind.kernels.causal.segment_pass import pass_blocks, segment_pass
from kvbind.kernels.causal.segment_states import segment_states
from kvbind.kernels.causal.segments import TILE, Segments, product_precision, segment_table
from kvbind.kernels.common.devices import multiprocessors
from kvbind.kernels.common.operands import cdiv, last_contiguous, sequence_count
from kvbind.kernels.launching import dispatcher

MODES = ("token", "past", "chunk")
LEAST_SEGMENT = 4 * TILE
"""A segment of fewer tokens costs more in states than it gains in parallel work."""
SPLITTING = 1.5
"""How much longer a sequence takes when its segments' writes are computed first: keys and values are read twice."""


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor | None = None,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    chunk: int = 1,
    mode: str = "token",
    cu_seqlens: Tensor | None = None,
    sign: float = 1.0,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention in which each token reads what earlier tokens wrote.

    With the state `S_t = a_t S_{t-1} + sign r_t k_t^T v_t`, outputs under `mode="token"` are `o_t = q_t S_t`. The other
    modes, without gates, move in chunks of `chunk` tokens from each sequence's start: a token reads the writes of all
    chunks before its own ("past"), or of its own chunk too, later tokens included ("chunk"). Products are of operands in q's
    dtype, sums and states are float32. Differentiable, once, in every tensor and through the final state. Gates under
    float32's least normal number count as 0, whose gradient is as exact as any.

    An output depends on what it sees alone: keys, values, rates or gates that are not finite leave every earlier output and
    its gradients as they are, and make those that see them NaN.

    Args:
        q: queries, `[B, T, H, Dk]`, float32, bfloat16 or float16.
        k: keys, `[B, T, H, Dk]`, in any floating dtype.
        v: values, `[B, T, H, Dv]`, in any floating dtype.
        rates: `r`, `[B, T, H]`, computed with in float32; None for 1.
        decay: `a`, in [0, 1], the same; None for 1. For `mode="token"` alone.
        initial_state: `S_0`, float32 `[B, H, Dk, Dv]`, or `[n, H, Dk, Dv]` for n packed sequences; None for zeros.
        chunk: tokens of a chunk, at most 64, for the modes that have chunks.
        mode: "token", "past" or "chunk".
        cu_seqlens: int32 or int64 `[n + 1]`, boundaries of sequences packed into one row (B = 1), from 0 to T. The host does
            not read its values, so that nothing waits for the device.
        sign: 1.0 or -1.0.
        return_state: whether the final state is wanted.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype, and the state after all tokens of each sequence, float32 `[B or n, H, Dk, Dv]`
        (None without `return_state`).

    Raises:
        TypeError: a dtype or type that is not supported.
        ValueError: a shape or option that does not fit.
    """
    _check(q, k, v, rates, decay, initial_state, chunk, mode, cu_seqlens, sign)
    return unchecked(q, k, v, rates, decay, initial_state, chunk, mode, cu_seqlens, sign, return_state)


def unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor | None,
    decay: Tensor | None,
    initial_state: Tensor | None,
    chunk: int,
    mode: str,
    cu_seqlens: Tensor | None,
    sign: float,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`causal_linear_attention` of arguments that are known to fit."""
    if mode == "token":
        chunk = 1

    def float32(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float()

    k, v = (x if x.dtype == q.dtype else x.to(q.dtype) for x in (k, v))
    out, final, _ = dispatcher.call(
        _forward, q, k, v, float32(rates), float32(decay), float32(initial_state),
        None if cu_seqlens is None else cu_seqlens.to(q.device), chunk, mode == "past", int(sign), return_state,
    )  # fmt: skip
    return out, final if return_state else None


@lru_cache
def _segments_each(programs: int, slots: int) -> int:
    """Into how many segments to cut work of `programs` programs, of which `slots` run at once."""

    def time(pieces: int) -> float:
        waves = -(-programs * pieces // slots)
        return waves / pieces * (SPLITTING if pieces > 1 else 1.0)

    return min(range(1, max(2 * slots // max(programs, 1), 1) + 1), key=time)


def segment_length(q: Tensor, v: Tensor, step: int) -> int:
    """Tokens of a segment: a multiple of `step`, so that few segments cover the device evenly.

    Args:
        q: `[B, T, H, Dk]`.
        v: `[B, T, H, Dv]`.
        step: tokens that a tile advances by.
    """
    batch, tokens, heads, width = v.shape
    blocks = pass_blocks(q.dtype, q.shape[-1], width)
    programs = int(batch) * int(heads) * cdiv(int(width), blocks.columns)
    each = _segments_each(programs, blocks.resident * multiprocessors(v, elsewhere=8))
    length = max((tokens + each - 1) // each, LEAST_SEGMENT)
    return (length + step - 1) // step * step


def _cut(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Segments:
    length = segment_length(q, v, TILE // chunk * chunk)
    if cu_seqlens is None:
        each = max(1, (q.shape[1] + length - 1) // length)
        return Segments(length, each, q.shape[0] * each, q.shape[0], None, None)
    table, offsets = segment_table(cu_seqlens, q.shape[1], length)
    return Segments(length, 0, len(table), len(cu_seqlens) - 1, table, offsets)


MOST = 256
"""Kinds of calls whose launches are remembered."""

_cuts: dict[tuple[Any, ...], Segments] = {}


def _cut_alike(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk: int, *about: Any) -> Segments:
    """How sequences are cut, the same for all calls that agree in what launches depend on, where those are equally long.

    Args:
        q: `[B, T, H, Dk]`.
        v: `[B, T, H, Dv]`.
        cu_seqlens: boundaries of packed sequences, or None.
        chunk: tokens of a chunk.
        *about: strides of tokens, which tensors there are, and options.
    """
    if cu_seqlens is not None:
        return _cut(q, v, cu_seqlens, chunk)
    key = (q.dtype, q.device.index, q.shape, v.shape[3], chunk, product_precision(q.dtype), *about)
    found = _cuts.get(key)
    if found is None:
        if len(_cuts) >= MOST:
            _cuts.clear()
        found = _cuts[key] = _cut(q, v, None, chunk)
    return found


def _unmarked(segments: Segments, q: Tensor) -> Tensor:
    """Of no segment it is known that something in it is not finite."""
    return q.new_zeros((segments.count, q.shape[2]), dtype=torch.int32)


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@torch.library.custom_op("kvbind::causal_linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor | None,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    strict: bool,
    sign: int,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final states, and the states in which segments start; either of the latter empty where there is no need."""
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    rates, decay, initial_state = _whole(rates), _whole(decay), _whole(initial_state)
    there = rates is None, decay is None, initial_state is None
    strides = q.stride(), k.stride(), v.stride()
    segments = _cut_alike(q, v, cu_seqlens, chunk, *strides, *there, strict, sign, return_state)
    final, starts = _new_states(q, v, segments, return_state)
    states = initial_state
    if not segments.single:
        starts = states = segment_states(segments, k, v, initial_state, rates=rates, gates=decay, sign=sign)
    out, _, _ = segment_pass(
        segments, q, k, v, states=states, rates=rates, gates=decay, chunk=chunk, strict=strict, sign=sign,
        wrongs=_unmarked(segments, q), end=final if return_state else None, name="out",
    )  # fmt: skip
    return out, final, starts


def _new_states(q: Tensor, v: Tensor, segments: Segments, return_state: bool) -> tuple[Tensor, Tensor]:
    """Room for final states and for those in which segments start."""
    shape = q.shape[2], q.shape[3], v.shape[3]
    final = q.new_empty((segments.sequences if return_state else 0, *shape), dtype=torch.float32)
    return final, q.new_empty((0 if segments.single else segments.count, *shape), dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, rates, decay, initial_state, cu_seqlens, chunk, strict, sign, return_state):
    segments = _cut(q, v, cu_seqlens, chunk)
    return v.new_empty(v.shape), *_new_states(q, v, segments, return_state)


@torch.library.custom_op("kvbind::causal_linear_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor | None,
    decay: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    chunk: int,
    strict: bool,
    sign: int,
    needs_rates: bool,
    needs_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rates, decay and the initial state; empty where nobody needs them."""
    q, k, v, d_out = last_contiguous(q), last_contiguous(k), last_contiguous(v), last_contiguous(d_out)
    rates, gates, initial_state, d_final = _whole(rates), _whole(decay), _whole(initial_state), _whole(d_final)
    there = rates is None, gates is None, initial_state is None, d_final is None
    strides = q.stride(), k.stride(), v.stride(), d_out.stride()
    segments = _cut_alike(q, v, cu_seqlens, chunk, *strides, *there, strict, sign, needs_rates, needs_initial_state)
    initial_states, d_states = (initial_state, d_final) if segments.single else (starts, None)
    if not segments.single:
        d_states = segment_states(segments, q, d_out, d_final, rates=None, gates=gates, sign=1, reverse=True)
    heads, widths = q.shape[2], (v.shape[3], q.shape[3])
    d_initial = q.new_empty((segments.sequences if needs_initial_state else 0, *starts.shape[1:]), dtype=torch.float32)
    tile_states = None if gates is None else q.new_empty((segments.tiles(q.shape[1]), heads, *widths))
    wrongs = _unmarked(segments, q)

    def go(name: str, read: Tensor, key: Tensor, value: Tensor, states: Tensor | None, **options):
        return segment_pass(
            segments, read, key, value, states=states, rates=rates, gates=gates, chunk=chunk, strict=strict, sign=sign,
            wrongs=wrongs, name=name, **options,
        )  # fmt: skip

    gated = gates is not None
    dq, read_dots, _ = go(
        "dq", d_out, v, k, initial_states, transposed=True, primal=q if gated else None, tile_states=tile_states
    )  # fmt: skip
    dk, write_dots, anchors = go(
        "dk", v, d_out, q, d_states, transposed=True, reverse=True, primal=k if gated else None, tile_states=tile_states
    )  # fmt: skip
    dv, rate_dots, _ = go(
        "dv", k, q, d_out, d_states, reverse=True,
        end=d_initial if needs_initial_state else None, primal=v if needs_rates else None,
    )  # fmt: skip
    d_rates = q.new_empty(0, dtype=torch.float32)
    d_decay = torch.empty_like(d_rates)
    if needs_rates:
        d_rates = rate_dots.sum(0)
    if gates is not None:
        d_decay = gate_gradients(segments, q, k, v, d_out, read_dots, write_dots, anchors, rates, gates, sign)
    return dq, dk, dv, d_rates, d_decay, d_initial


@_backward.register_fake
def _(
    d_out, d_final, q, k, v, rates, decay, initial_state, starts, cu_seqlens, chunk, strict, sign,
    needs_rates, needs_initial_state,
):  # fmt: skip
    segments = _cut(q, v, cu_seqlens, chunk)
    each_token = torch.float32
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(q.shape[:3] if needs_rates else (0,), dtype=each_token),
        q.new_empty(q.shape[:3] if decay is not None else (0,), dtype=each_token),
        q.new_empty((segments.sequences if needs_initial_state else 0, *starts.shape[1:]), dtype=torch.float32),
    )


def _setup(ctx, inputs, output):
    *tensors, chunk, strict, sign, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = chunk, strict, sign
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, d_final, _):
    q, k, v, rates, decay, initial_state, cu_seqlens, starts = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(v)
    needs = ctx.needs_input_grad
    dq, dk, dv, d_rates, d_decay, d_initial = dispatcher.call(
        _backward, d_out, d_final, q, k, v, rates, decay, initial_state, starts, cu_seqlens, *ctx.options, needs[3],
        needs[5],
    )  # fmt: skip
    return dispatcher.asked(needs, dq, dk, dv, d_rates, d_decay, d_initial)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor | None,
    decay: Tensor | None,
    initial_state: Tensor | None,
    chunk: int,
    mode: str,
    cu_seqlens: Tensor | None,
    sign: float,
) -> None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"q must be float32, bfloat16 or float16; got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D]; got shape {tuple(x.shape)}")
        if not 16 <= x.shape[-1] <= 512:
            raise ValueError(f"{name} must have a width from 16 to 512; got {x.shape[-1]}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {tuple(q.shape)}; got {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, Dv] with q's {tuple(q.shape[:3])}; got {tuple(v.shape)}")
    for name, gate in (("rates", rates), ("decay", decay)):
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {tuple(q.shape[:3])}; got shape {tuple(gate.shape)}")
    check_choice("mode", mode, MODES)
    check_positive_int("chunk", chunk)
    if mode != "token" and chunk > TILE:
        raise ValueError(f"chunk must be at most {TILE} for mode={mode!r}; got {chunk}")
    if mode != "token" and decay is not None:
        raise ValueError(f"decay must be None for mode={mode!r}; gates need mode='token'")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1.0 or -1.0; got {sign!r}")
    expected = (sequence_count("cu_seqlens", cu_seqlens, q.shape[0]), q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {list(expected)}; got shape {tuple(initial_state.shape)}")
