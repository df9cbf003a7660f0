"""The delta rule and its kin in chunks: `S_t = a_t o S_{t-1} + r_t k_t^T (v_t - e_t M_t)`, `o_t = q_t S_t`.

Four steps, of which one goes through the chunks in order: what each chunk does to the state (`prepare`; with gates per key
channel, first what these make of queries and keys: `channels`), the state before each chunk (`states`), and what queries
read (`outputs`). The backward pass (`backward`) takes the gradient of the state through the same kernel from the end.

Instances: the delta rule in its WY representation (arXiv 2406.06484), gated (2412.06464), with gates per key channel
(2510.26692), gated linear attention (2312.06635). Kept for the backward pass: the operands, and of each chunk its inverse,
the state before it, and what it does to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.kernels.affine.backward import key_gradients, pair_gradients, state_gradients, value_gradients
from kvbind.kernels.affine.channels import channel_gradients, scale
from kvbind.kernels.affine.outputs import outputs
from kvbind.kernels.affine.prepare import prepare
from kvbind.kernels.affine.solve import solve
from kvbind.kernels.affine.states import states as run_states
from kvbind.kernels.affine.tiles import cut
from kvbind.kernels.causal.segments import Segments, product_precision, token_strides
from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import DTYPES, cdiv, last_contiguous, power_of_2, sequence_count
from kvbind.kernels.launching import dispatcher

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
        kernel: "solve", "prepare", "states", "outputs", "state_gradients", "value_gradients", "pair_gradients",
            "key_gradients", and with gates per key channel "scale" and "channel_gradients".
        dtype: of the operands.
        key: width of keys.
        value: width of values.
    """
    bk, bv, warps, stages = {
        "scale": (16, 16, 4, 1),
        "solve": (128, 16, 4, 1),
        # Triton 3.6 makes of one block of 64 value columns and several of 64 key channels a kernel that computes wrong
        "prepare": (64, 64, 4, 1) if min(key, value) > 64 else (128, 128, 4, 1),
        "states": (128, 16, 8, 4) if key <= 128 else (128, 16, 4, 1),
        "outputs": (128, 128, 4, 1),
        "state_gradients": (64, 128, 4, 2),
        "value_gradients": (64, 64, 4, 2),
        "pair_gradients": (64, 64, 8, 2),
        "key_gradients": (64, 64, 4, 2),
        "channel_gradients": (32, 64, 8, 1),
    }[kernel]
    if dtype == torch.float32:
        # products are three of TF32, from tiles of twice the bytes
        bk, bv, stages = 32, min(bv, 32), 1
        if kernel == "states":
            bk, bv, warps = (32 if key <= 128 else 64), 16, 4
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


class Kept(NamedTuple):
    """What the forward pass leaves for the backward one; what there is not is empty.

    Attributes:
        solved: T of each chunk, `[chunks, H, C, C]`.
        moves: M, `[chunks, H, Dk, Dk]`.
        keeps: the product of its gates, float32 `[chunks, H]` or `[chunks, H, Dk]`.
        marks: 1 for tokens that hold what is not finite, int8 `[B, T, H]`.
        states: the state before it, `[chunks, H, Dk, Dv]`.
        scaled_q, scaled_k, scaled_e: with gates per key channel, these scaled to the chunk's ends, like q.
        reads: with them, A, `[chunks, H, C, C]`.
        residuals: with them, `L / r`, float32 likewise.
    """

    solved: Tensor
    moves: Tensor
    keeps: Tensor
    marks: Tensor
    states: Tensor
    scaled_q: Tensor
    scaled_k: Tensor
    scaled_e: Tensor
    reads: Tensor
    residuals: Tensor

    @staticmethod
    def room(segments: Segments, q: Tensor, v: Tensor, chunk: int, delta: bool, channel: bool) -> Kept:
        """Empty tensors of these shapes."""
        (_, _, heads, key), value, count = q.shape, v.shape[3], segments.count
        some, pairs = (count if delta else 0), (heads, chunk, chunk)
        scaled, wide = (q.shape if channel else (0,)), torch.float32
        return Kept(
            q.new_empty((some, *pairs)),
            q.new_empty((some, heads, key, key)),
            q.new_empty((count, heads, key) if channel else (count, heads), dtype=wide),
            q.new_empty(q.shape[:3], dtype=torch.int8),
            q.new_empty((count, heads, key, value)),
            q.new_empty(scaled),
            q.new_empty(scaled),
            q.new_empty(scaled if delta else (0,)),
            q.new_empty((count if channel else 0, *pairs)),
            q.new_empty((some if channel else 0, *pairs), dtype=wide),
        )


def _is_by_channel(gates: Tensor | None) -> bool:
    return gates is not None and gates.dim() > 3


@torch.library.custom_op("kvbind::affine_chunks", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None, gates: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, before: bool, delta: bool, chunk: int,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Outputs, final states, and `Kept`."""
    segments, channel = cut(q, cu_seqlens, chunk), _is_by_channel(gates)
    tokens, heads, key, value = *q.shape[1:], v.shape[3]
    kept = Kept.room(segments, q, v, chunk, delta, channel)
    writes = torch.empty_like(kept.states)
    out, final = v.new_empty(v.shape), q.new_empty((segments.sequences, heads, key, value), dtype=torch.float32)
    options, exact = _options(q, v, chunk, before, delta), _exact(q.dtype)
    alone = {name: options[name] for name in ("DK", "C", "BEFORE", "DELTA", "PRECISION")}
    cuts, grid = (segments.table, tokens, segments.each, heads), (segments.count * heads,)
    with on_device_of(q):
        if channel:
            its = blocks_of("scale", q.dtype, key, value)
            scale[grid](
                q, k, erase, rates, gates, kept.scaled_q, kept.scaled_k, kept.scaled_e, kept.reads, kept.residuals,
                kept.keeps, kept.marks, *cuts, *token_strides(q), *token_strides(k), *_strides(erase),
                **alone, BK=its.BK, num_warps=its.num_warps, num_stages=its.num_stages,
            )  # fmt: skip
            q, k, erase, gates = kept.scaled_q, kept.scaled_k, kept.scaled_e if delta else None, None
        if delta or not channel:
            its = blocks_of("solve", q.dtype, key, value)
            solve[grid](
                k, erase, rates, gates, _optional(kept.residuals), kept.solved, kept.keeps, kept.marks, *cuts,
                *token_strides(k), *_strides(erase),
                **alone, BK=its.BK, EXACT=exact, num_warps=its.num_warps, num_stages=its.num_stages,
            )  # fmt: skip
        prepare[grid](
            k, erase, v, rates, gates, kept.solved, kept.moves, writes, kept.keeps, kept.marks, *cuts,
            *token_strides(k), *_strides(erase), *token_strides(v),
            **options, CHANNEL=channel, **blocks_of("prepare", q.dtype, key, value)._asdict(),
        )  # fmt: skip
        _run_states(segments, _optional(kept.moves), writes, kept.keeps, kept.states, initial, final, False)
        its = blocks_of("outputs", q.dtype, key, value)
        outputs[(segments.count * heads * cdiv(value, its.BV),)](
            q, k, erase, v, rates, gates, _optional(kept.reads), kept.solved, kept.states, kept.marks, out, *cuts,
            *token_strides(q), *token_strides(k), *_strides(erase), *token_strides(v), **options, **its._asdict(),
        )  # fmt: skip
    return out, final, *kept


@_forward.register_fake
def _(q, k, v, erase, rates, gates, initial, cu_seqlens, before, delta, chunk):
    segments = cut(q, cu_seqlens, chunk)
    final = q.new_empty((segments.sequences, *q.shape[2:], v.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), final, *Kept.room(segments, q, v, chunk, delta, _is_by_channel(gates))


@torch.library.custom_op("kvbind::affine_chunks_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None,
    gates: Tensor | None, cu_seqlens: Tensor | None, kept: Sequence[Tensor], before: bool, delta: bool, chunk: int,
    needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, erase, rates, gates and the initial state; empty where there is none."""
    segments, held, channel = cut(q, cu_seqlens, chunk), Kept(*kept), _is_by_channel(gates)
    tokens, heads, key, value = *q.shape[1:], v.shape[3]
    all_tokens = q.shape[0] * tokens
    d_out = last_contiguous(d_out)
    options, cuts = _options(q, v, chunk, before, delta), (segments.table, tokens, segments.each)
    grid = (segments.count * heads,)

    def blocks(kernel: str) -> dict[str, int]:
        return blocks_of(kernel, q.dtype, key, value)._asdict()

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=dtype or q.dtype)

    dq, dk, dv, de = like(q), like(k), like(v), like(erase)
    d_rates, d_gates = like(rates, torch.float32), like(gates, torch.float32)
    d_initial = q.new_empty((segments.sequences if needs_initial else 0, heads, key, value), dtype=torch.float32)
    writes, d_states = torch.empty_like(held.states), torch.empty_like(held.states)
    written, d_right = like(v), like(v if delta else None)
    by_head = gates is not None and not channel
    sums = q.new_empty((4 if by_head else 1, all_tokens, heads), dtype=torch.float32)
    anchors = q.new_empty((segments.count if by_head else 0, heads), dtype=torch.float32)
    d_reads, d_residuals = q.new_empty((segments.count, heads, chunk, chunk)), torch.empty_like(held.solved)
    given, its_gates, found = (q, k, erase), gates, (dq, dk, _optional(de))
    if channel:
        # all but the last kernel know of scaled queries and keys alone
        its_gates, given = None, (held.scaled_q, held.scaled_k, _optional(held.scaled_e))
        found = (like(q), like(k), like(q) if delta else None)
    strides = *token_strides(d_out), *(x for each in given for x in _strides(each))
    reads, operands = _optional(held.reads), (d_out, *given)
    with on_device_of(q):
        state_gradients[grid](
            *operands, rates, its_gates, reads, held.solved, held.marks, writes, *cuts, heads, *strides,
            **options, **blocks("state_gradients"),
        )  # fmt: skip
        _run_states(segments, _optional(held.moves), writes, held.keeps, d_states, d_final, _optional(d_initial), True)
        value_gradients[grid](
            *operands, v, rates, its_gates, reads, held.solved, held.states, d_states, held.marks, written, d_right, dv,
            sums, anchors, *cuts, all_tokens, heads, *strides, *token_strides(v), **options, **blocks("value_gradients"),
        )  # fmt: skip
        pair_gradients[grid](
            *operands, rates, its_gates, _optional(held.residuals), held.marks, written, d_right, sums, anchors, d_reads,
            d_residuals, _optional(d_rates), d_gates if by_head else None, *cuts, all_tokens, heads, *strides, **options,
            CHANNEL=channel, EXACT=_exact(q.dtype), **blocks("pair_gradients"),
        )  # fmt: skip
        its = blocks("key_gradients")
        key_gradients[(segments.count * heads * cdiv(key, its["BK"]),)](
            *operands, rates, its_gates, written, d_right, held.states, d_states, held.marks, d_reads, d_residuals, *found,
            *cuts, heads, *strides, **options, CHANNEL=channel, **its,
        )  # fmt: skip
        if channel:
            its = blocks("channel_gradients")
            channel_gradients[(segments.count * heads * cdiv(key, its["BK"]),)](
                q, k, erase, gates, held.keeps, held.marks, held.states, d_states, d_reads, d_residuals, *found, d_gates,
                dq, dk, _optional(de), *cuts, heads, *token_strides(q), *token_strides(k), *_strides(erase),
                **options, **its,
            )  # fmt: skip
    return dq, dk, dv, de, d_rates, d_gates, d_initial


@_backward.register_fake
def _(d_out, d_final, q, k, v, erase, rates, gates, cu_seqlens, kept, before, delta, chunk, needs_initial):
    segments, wide = cut(q, cu_seqlens, chunk), torch.float32
    operands = ((q, q.dtype), (k, q.dtype), (v, q.dtype), (erase, q.dtype), (rates, wide), (gates, wide))
    found = [q.new_empty((0,) if x is None else x.shape, dtype=dtype) for x, dtype in operands]
    return *found, q.new_empty((segments.sequences if needs_initial else 0, *q.shape[2:], v.shape[3]), dtype=wide)


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
    dq, dk, dv, de, d_rates, d_gates, d_initial = dispatcher.call(
        _backward, d_out, None if d_final is None else d_final.contiguous(), q, k, v, erase, rates, gates, cu_seqlens,
        list(kept), *ctx.options, needs[6],
    )  # fmt: skip
    return dispatcher.asked(needs, dq, dk, dv, de, d_rates, d_gates, d_initial)


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

    With `gate_acts="before"`, `S' = a_t o S_{t-1}` and `S_t = S' + r_t k_t^T (v_t - e_t S')`; with "after" the residual
    reads `S_{t-1}` itself; without a residual, `S_t = a_t o S_{t-1} + r_t k_t^T v_t`. Outputs are `o_t = q_t S_t`. Gates per
    key channel multiply rows of the state. Products are of operands in q's dtype, sums and states float32. Differentiable,
    once, in every tensor and through the final state. Gates under float32's least normal number count as 0, whose gradient
    is as exact as any.

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

    found = dispatcher.call(
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
    if gate is not None and gate.shape not in (q.shape[:3], q.shape):
        raise ValueError(
            f"gate must be [B, T, H] = {list(q.shape[:3])} or [B, T, H, Dk] = {list(q.shape)}; got shape {list(gate.shape)}"
        )
    check_choice("gate_acts", gate_acts, ORDERS)
    if erase is not None and not residual:
        raise ValueError("erase must be None without a residual, which alone reads there; got a tensor")
    if chunk not in CHUNKS:
        raise ValueError(f"chunk must be 16, 32 or 64; got {chunk!r}")
    expected = (sequence_count("boundaries", boundaries, q.shape[0]), q.shape[2], q.shape[3], v.shape[3])
    if state is not None and state.shape != expected:
        raise ValueError(f"state must be {list(expected)}; got shape {list(state.shape)}")
