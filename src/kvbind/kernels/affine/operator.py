"""The delta rule and its kin in chunks: `S_t = a_t o S_{t-1} + r_t k_t^T (v_t - e_t M_t)`, `o_t = q_t S_t`.

Four steps, of which one goes through the chunks in order: what each chunk does to the state (`prepare`; with gates per key
channel, first what these make of queries and keys: `channels`), the state before each chunk (`states`), and what queries
read (`outputs`). The backward pass (`backward`) takes the gradient of the state through the same kernel from the end.

Instances: the delta rule in its WY representation (arXiv 2406.06484), gated (2412.06464), with gates per key channel
(2510.26692), gated linear attention (2312.06635). Kept for the backward pass: the operands, and of each chunk its inverse,
the state before it, and what it does to the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.kernels import direct
from kvbind.kernels.affine.backward import key_gradients, pair_gradients, state_gradients, value_gradients
from kvbind.kernels.affine.outputs import outputs
from kvbind.kernels.affine.prepare import prepare
from kvbind.kernels.affine.solve import solve
from kvbind.kernels.affine.states import states as run_states
from kvbind.kernels.affine.tiles import cut
from kvbind.kernels.causal_segments import Segments, product_precision, token_strides
from kvbind.kernels.common import DTYPES, cdiv, last_contiguous, on_device_of, power_of_2

ORDERS = ("before", "after")
CHUNKS = (16, 32, 64)
NARROWEST, WIDEST = 16, 256


class Blocks(NamedTuple):
    """How one kernel cuts widths, and how it is launched."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int


def blocks_of(kernel: str, dtype: torch.dtype, key: int, value: int) -> Blocks:
    """The blocks of a kernel for operands of these widths.

    Args:
        kernel: "solve", "prepare", "states", "outputs", "state_gradients", "value_gradients", "pair_gradients" or
            "key_gradients".
        dtype: of the operands.
        key: width of keys.
        value: width of values.
    """
    bk, bv, warps, stages = {
        "solve": (128, 16, 4, 1),
        "prepare": (128, 128, 4, 1),
        "states": (128, 16, 4, 3 if key <= 128 else 1),
        "outputs": (128, 128, 4, 1),
        "state_gradients": (128, 128, 4, 1),
        "value_gradients": (64, 64, 4, 2),
        "pair_gradients": (64, 64, 8, 2),
        "key_gradients": (64, 64, 4, 2),
    }[kernel]
    if dtype == torch.float32:
        # products are three of TF32, from tiles of twice the bytes
        bk, bv, stages = 32, min(bv, 32), 1
        if kernel == "states":
            bk, bv = (32 if key <= 128 else 64), 16
    return Blocks(min(bk, max(power_of_2(key), 16)), min(bv, max(power_of_2(value), 16)), warps, stages)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None or not x.numel() else x


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else token_strides(x)


def _options(q: Tensor, v: Tensor, chunk: int, before: bool, delta: bool) -> dict[str, object]:
    return {
        "DK": q.shape[-1], "DV": v.shape[-1], "C": chunk, "BEFORE": before, "DELTA": delta,
        "PRECISION": product_precision(q.dtype),
    }  # fmt: skip


def _exact(dtype: torch.dtype) -> str:
    """The precision of products of float32 numbers that are made on the way."""
    return product_precision(dtype) if dtype == torch.float32 else "tf32"


def _run_states(
    segments: Segments, moves: Tensor | None, writes: Tensor, keeps: Tensor, out: Tensor, initial: Tensor | None,
    final: Tensor | None, reverse: bool,
) -> None:  # fmt: skip
    heads, key, value = writes.shape[1:]
    blocks = blocks_of("states", writes.dtype, key, value)
    run_states[(segments.sequences * heads * cdiv(value, blocks.BV),)](
        writes, moves, keeps, out, initial, final, segments.offsets, segments.each, heads,
        DK=key, DV=value, NK=cdiv(key, blocks.BK), DELTA=moves is not None, REVERSE=reverse, CHANNEL=keeps.dim() > 2,
        PRECISION=product_precision(writes.dtype), STAGES=blocks.num_stages, **blocks._asdict(),
    )  # fmt: skip


def _shapes(segments: Segments, q: Tensor, v: Tensor, chunk: int, delta: bool) -> dict[str, tuple[int, ...]]:
    """Of what is kept of each chunk."""
    each, key, value = (segments.count, q.shape[2]), q.shape[3], v.shape[3]
    some = segments.count if delta else 0
    return {
        "solved": (some, q.shape[2], chunk, chunk),
        "moves": (some, q.shape[2], key, key),
        "keeps": each,
        "states": (*each, key, value),
    }


@torch.library.custom_op("kvbind::affine_chunks", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None, gates: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, before: bool, delta: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs and final states; for the gradient `T`, `M`, gates' products, marks of tokens, and states."""
    segments = cut(q, cu_seqlens, chunk)
    batch, tokens, heads, key = q.shape
    value = v.shape[3]
    shapes = _shapes(segments, q, v, chunk, delta)
    solved, moves, states = (q.new_empty(shapes[name]) for name in ("solved", "moves", "states"))
    writes = torch.empty_like(states)
    keeps = q.new_empty(shapes["keeps"], dtype=torch.float32)
    marks = q.new_empty((batch, tokens, heads), dtype=torch.int8)
    out, final = v.new_empty(v.shape), q.new_empty((segments.sequences, heads, key, value), dtype=torch.float32)
    options = _options(q, v, chunk, before, delta)
    with on_device_of(q):
        its = blocks_of("solve", q.dtype, key, value)
        solve[(segments.count * heads,)](
            k, erase, rates, gates, solved, keeps, marks, segments.table, tokens, segments.each, heads,
            *token_strides(k), *_strides(erase),
            DK=key, C=chunk, BK=its.BK, BEFORE=before, DELTA=delta, PRECISION=options["PRECISION"], EXACT=_exact(q.dtype),
            num_warps=its.num_warps, num_stages=its.num_stages,
        )  # fmt: skip
        prepare[(segments.count * heads,)](
            k, erase, v, rates, gates, solved, moves, writes, keeps, marks, segments.table, tokens, segments.each,
            heads, *token_strides(k), *_strides(erase), *token_strides(v),
            **options, CHANNEL=False, **blocks_of("prepare", q.dtype, key, value)._asdict(),
        )  # fmt: skip
        _run_states(segments, moves if delta else None, writes, keeps, states, initial, final, False)
        blocks = blocks_of("outputs", q.dtype, key, value)
        outputs[(segments.count * heads * cdiv(value, blocks.BV),)](
            q, k, erase, v, rates, gates, None, solved, states, marks, out, segments.table, tokens, segments.each, heads,
            *token_strides(q), *token_strides(k), *_strides(erase), *token_strides(v), **options, **blocks._asdict(),
        )  # fmt: skip
    return out, final, solved, moves, keeps, marks, states


@_forward.register_fake
def _(q, k, v, erase, rates, gates, initial, cu_seqlens, before, delta, chunk):
    segments = cut(q, cu_seqlens, chunk)
    shapes = _shapes(segments, q, v, chunk, delta)
    return (
        v.new_empty(v.shape),
        q.new_empty((segments.sequences, *shapes["states"][1:]), dtype=torch.float32),
        q.new_empty(shapes["solved"]),
        q.new_empty(shapes["moves"]),
        q.new_empty(shapes["keeps"], dtype=torch.float32),
        q.new_empty(q.shape[:3], dtype=torch.int8),
        q.new_empty(shapes["states"]),
    )


@torch.library.custom_op("kvbind::affine_chunks_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None,
    gates: Tensor | None, cu_seqlens: Tensor | None, solved: Tensor, moves: Tensor, keeps: Tensor, marks: Tensor,
    states: Tensor, before: bool, delta: bool, chunk: int, needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, erase, rates, gates and the initial state; empty where there is none."""
    segments = cut(q, cu_seqlens, chunk)
    tokens, heads, key, value = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    d_out = last_contiguous(d_out)
    options = _options(q, v, chunk, before, delta)

    def blocks(kernel: str) -> Blocks:
        return blocks_of(kernel, q.dtype, key, value)

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=dtype or q.dtype)

    writes, d_states = torch.empty_like(states), torch.empty_like(states)
    d_initial = q.new_empty((segments.sequences if needs_initial else 0, heads, key, value), dtype=torch.float32)
    dq, dk, dv, de = like(q), like(k), like(v), like(erase)
    d_rates, d_gates = like(rates, torch.float32), like(gates, torch.float32)
    written, d_right = like(v), like(v if delta else None)
    all_tokens = q.shape[0] * tokens
    sums = q.new_empty((1 if gates is None else 4, all_tokens, heads), dtype=torch.float32)
    anchors = q.new_empty((segments.count, heads), dtype=torch.float32)
    d_reads = q.new_empty((segments.count, heads, chunk, chunk))
    d_residuals = torch.empty_like(solved)
    table, each = segments.table, segments.each
    strides = *token_strides(d_out), *token_strides(q), *token_strides(k), *_strides(erase)
    with on_device_of(q):
        state_gradients[(segments.count * heads,)](
            d_out, q, k, erase, rates, gates, None, solved, marks, writes, table, tokens, each, heads, *strides,
            **options, **blocks("state_gradients")._asdict(),
        )  # fmt: skip
        _run_states(segments, moves if delta else None, writes, keeps, d_states, d_final, _optional(d_initial), True)
        value_gradients[(segments.count * heads,)](
            d_out, q, k, erase, v, rates, gates, None, solved, states, d_states, marks, written, d_right, dv, sums, anchors,
            table, tokens, each, all_tokens, heads, *strides, *token_strides(v), **options,
            **blocks("value_gradients")._asdict(),
        )  # fmt: skip
        pair_gradients[(segments.count * heads,)](
            d_out, q, k, erase, rates, gates, None, marks, written, d_right, sums, anchors, d_reads, d_residuals,
            _optional(d_rates), _optional(d_gates), table, tokens, each, all_tokens, heads, *strides, **options,
            CHANNEL=False, EXACT=_exact(q.dtype), **blocks("pair_gradients")._asdict(),
        )  # fmt: skip
        its = blocks("key_gradients")
        key_gradients[(segments.count * heads * cdiv(key, its.BK),)](
            d_out, q, k, erase, rates, gates, written, d_right, states, d_states, marks, d_reads, d_residuals,
            dq, dk, _optional(de), table, tokens, each, heads, *strides, **options, CHANNEL=False, **its._asdict(),
        )  # fmt: skip
    return dq, dk, dv, de, d_rates, d_gates, d_initial


@_backward.register_fake
def _(d_out, d_final, q, k, v, erase, rates, gates, cu_seqlens, solved, moves, keeps, marks, states, before, delta, chunk,
      needs_initial):  # fmt: skip
    segments = cut(q, cu_seqlens, chunk)

    def like(x, dtype=None):
        return q.new_empty((0,) if x is None else x.shape, dtype=dtype or q.dtype)

    return (
        like(q), like(k), like(v), like(erase), like(rates, torch.float32), like(gates, torch.float32),
        q.new_empty((segments.sequences if needs_initial else 0, *states.shape[1:]), dtype=torch.float32),
    )  # fmt: skip


def _setup(ctx, inputs, output):
    q, k, v, erase, rates, gates, _, cu_seqlens, *options = inputs
    kept = output[2:]
    ctx.save_for_backward(q, k, v, erase, rates, gates, cu_seqlens, *kept)
    ctx.options = options
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, d_final, *_):
    q, k, v, erase, rates, gates, cu_seqlens, *kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if d_out is None:
        d_out = torch.zeros_like(v)
    dq, dk, dv, de, d_rates, d_gates, d_initial = direct.call(
        _backward, d_out, None if d_final is None else d_final.contiguous(), q, k, v, erase, rates, gates, cu_seqlens, *kept,
        *ctx.options, needs[6],
    )  # fmt: skip
    found = (dq, dk, dv, de, d_rates, d_gates, d_initial)
    return *(x if wanted else None for x, wanted in zip(found, needs, strict=False)), *(None,) * 4


_forward.register_autograd(_differentiate, setup_context=_setup)


def affine_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor | None = None,
    erase: Tensor | None = None,
    gate: Tensor | None = None,
    gate_acts: str = "before",
    residual: bool = True,
    state: Tensor | None = None,
    boundaries: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The delta rule and its kin: a state that each token corrects once, and then reads.

    With `gate_acts="before"`, `S' = a_t o S_{t-1}` and `S_t = S' + r_t k_t^T (v_t - e_t S')`; with "after" the residual reads
    `S_{t-1}` itself; without a residual, `S_t = a_t o S_{t-1} + r_t k_t^T v_t`. Outputs are `o_t = q_t S_t`. Gates per key
    channel multiply rows of the state. Products are of operands in q's dtype, sums and states float32. Differentiable, once,
    in every tensor and through the final state. Gates under float32's least normal number count as 0, whose gradient is as
    exact as any.

    An output depends on what it sees alone: a token of which something is not finite leaves every earlier output as it is
    and makes those that see it NaN.

    Args:
        q: queries, `[B, T, H, Dk]`, float32, bfloat16 or float16, of any strides.
        k: keys, `[B, T, H, Dk]`, in any floating dtype.
        v: values, `[B, T, H, Dv]`, in any floating dtype.
        rate: `r`, `[B, T, H]`, computed with in float32; None for 1.
        erase: `e`, keys `[B, T, H, Dk]` at which residuals read; None for k.
        gate: `a`, in [0, 1], `[B, T, H]` or per key channel `[B, T, H, Dk]`, the same as rates; None for 1.
        gate_acts: "before" the residual reads the state, or "after".
        residual: values are written as residuals.
        state: `S_0`, float32 `[B, H, Dk, Dv]`, or `[n, H, Dk, Dv]` for n packed sequences; None for zeros.
        boundaries: int32 or int64 `[n + 1]`, of sequences packed into one row (B = 1), from 0 to T. The host does not look
            at its values.
        chunk: tokens of a chunk, 16, 32 or 64.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype, and the state after all tokens of each sequence, float32 `[B or n, H, Dk, Dv]`.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape or option that does not fit.
    """
    _check(q, k, v, rate, erase, gate, gate_acts, residual, state, boundaries, chunk)

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.float32).contiguous()

    def narrow(x: Tensor) -> Tensor:
        return last_contiguous(x.to(q.dtype))

    found = direct.call(
        _forward, narrow(q), narrow(k), narrow(v), None if erase is None else narrow(erase), plain(rate), plain(gate),
        plain(state), None if boundaries is None else boundaries.to(q.device), gate_acts == "before", residual, chunk,
    )  # fmt: skip
    return found[0], found[1]


def _check(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor | None, erase: Tensor | None, gate: Tensor | None, gate_acts: str,
    residual: bool, state: Tensor | None, boundaries: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16 or float16; got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, T, H, D]; got shape {list(x.shape)}")
        if not NARROWEST <= x.shape[-1] <= WIDEST:
            raise ValueError(f"{name} must have a width from {NARROWEST} to {WIDEST}; got {x.shape[-1]}")
    for name, given in (("k", k), ("erase", erase)):
        if given is not None and given.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}; got {list(given.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, Dv] with q's {list(q.shape[:3])}; got {list(v.shape)}")
    if rate is not None and rate.shape != q.shape[:3]:
        raise ValueError(f"rate must be [B, T, H] = {list(q.shape[:3])}; got shape {list(rate.shape)}")
    if gate is not None and gate.shape not in (q.shape[:3],):
        raise ValueError(
            f"gate must be [B, T, H] = {list(q.shape[:3])} or [B, T, H, Dk] = {list(q.shape)}; got shape {list(gate.shape)}"
        )
    check_choice("gate_acts", gate_acts, ORDERS)
    if erase is not None and not residual:
        raise ValueError("erase must be None without a residual, which alone reads there; got a tensor")
    if chunk not in CHUNKS:
        raise ValueError(f"chunk must be 16, 32 or 64; got {chunk!r}")
    sequences = q.shape[0]
    if boundaries is not None:
        if boundaries.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"boundaries must be int32 or int64; got {boundaries.dtype}")
        if boundaries.dim() != 1 or len(boundaries) < 2:
            raise ValueError(f"boundaries must be [n + 1] for n >= 1 sequences; got shape {list(boundaries.shape)}")
        if q.shape[0] != 1:
            raise ValueError(f"boundaries must come with B = 1, sequences packed into one row; got B = {q.shape[0]}")
        sequences = len(boundaries) - 1
    expected = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must be {list(expected)}; got shape {list(state.shape)}")
