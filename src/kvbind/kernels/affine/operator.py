"""The delta rule and its kin in chunks: `S_t = a_t o S_{t-1} + r_t k_t^T (v_t - e_t M_t)`, `o_t = q_t S_t`.

Chunks are first prepared all at once (`decays`, `prepare`; with gates per key channel, between the two what these make of
queries and keys: `channels`), then `states` goes through them in order, for the state and outputs. The backward pass takes
the gradient of the state through them from the end (`state_gradients`), then those of operands all at once (`backward`).

Instances: the delta rule in its WY representation (arXiv 2406.06484), gated (2412.06464), with gates per key channel
(2510.26692), gated linear attention (2312.06635). Kept for the backward pass: the operands, and of each chunk its inverse,
the state before it, and what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.kernels.affine.backward import key_gradients, pair_gradients
from kvbind.kernels.affine.channels import channel_gradients, scale, scores, steep_scores
from kvbind.kernels.affine.decays import PLANES, decays, gate_gradients
from kvbind.kernels.affine.launches import HEADS, AffineCall, constants_of, parts_of
from kvbind.kernels.affine.prepare import prepare
from kvbind.kernels.affine.state_gradients import part_gradients, state_gradients
from kvbind.kernels.affine.states import chain
from kvbind.kernels.affine.states import parts as run_parts
from kvbind.kernels.affine.states import states as run_states
from kvbind.kernels.affine.tiles import cut
from kvbind.kernels.causal.segments import Segments, product_precision, token_strides
from kvbind.kernels.common.devices import by_warpgroups, on_device_of
from kvbind.kernels.common.operands import DTYPES, cdiv, last_contiguous, sequence_count
from kvbind.kernels.launching import dispatcher

ORDERS = ("before", "after")
CHUNKS = (16, 32, 64)
NARROWEST, WIDEST = 16, 256


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None or not x.numel() else x


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else token_strides(x)


def _precision(dtype: torch.dtype) -> str:
    """The precision of products, and of those of float32 numbers that are made on the way."""
    return product_precision(dtype) if dtype == torch.float32 else "tf32"


def _call(
    q: Tensor, v: Tensor, rates: Tensor | None, gates: Tensor | None, before: bool, delta: bool, chunk: int
) -> AffineCall:  # fmt: skip
    channel = gates is not None and gates.dim() > 3
    by_head, widths = gates is not None and not channel, (q.shape[3], v.shape[3])
    precision, warpgroups = _precision(q.dtype), by_warpgroups(q)
    return AffineCall(q.dtype, *widths, chunk, before, delta, channel, rates is not None, by_head, precision, warpgroups)


def _parts(segments: Segments, q: Tensor, v: Tensor) -> int:
    return parts_of(segments.sequences, segments.count, q.shape[2], v.shape[3])


class Kept(NamedTuple):
    """What the forward pass leaves for the backward one; what there is not is empty.

    Attributes:
        solved: T of each chunk, `[chunks, H, C, C]`.
        reads: A, `[chunks, H, C, C]`.
        decays: what rates and gates per head are to each token, float32 `[10, chunks, H, C]`: `decays.PLANES`; b is NaN
            where an output is.
        keeps: the product of a chunk's gates, float32 `[chunks, H]` or `[chunks, H, Dk]`.
        marks: 1 for tokens that hold what is not finite, int8 `[B, T, H]`.
        states: the transpose of the state before each chunk, `[chunks, H, Dv, Dk]`.
        written: U, `[chunks, H, C, Dv]`.
        moves: F of each part of a sequence, transposed, float32 `[sequences * parts, H, Dk, Dk]`.
        scaled_q, scaled_k, scaled_e: with gates per key channel, these scaled to the chunk's ends, like q.
        sums: with them, their summed logarithms from each chunk's start on, float32, like q.
        residuals: with them, `L / r`, float32 `[chunks, H, C, C]`.
        steep: with them, 1 for chunks of which a gate is too small to divide by, int8 `[chunks, H]`.
    """

    solved: Tensor
    reads: Tensor
    decays: Tensor
    keeps: Tensor
    marks: Tensor
    states: Tensor
    written: Tensor
    moves: Tensor
    scaled_q: Tensor
    scaled_k: Tensor
    scaled_e: Tensor
    sums: Tensor
    residuals: Tensor
    steep: Tensor

    @staticmethod
    def room(segments: Segments, q: Tensor, v: Tensor, chunk: int, delta: bool, channel: bool, keep: bool) -> Kept:
        """Empty tensors of these shapes; without `keep`, no states and no writes."""
        (_, _, heads, key), value, count = q.shape, v.shape[3], segments.count
        some, held, parts = (count if delta else 0), (count if keep else 0), _parts(segments, q, v)
        scaled, wide = (q.shape if channel else (0,)), torch.float32
        return Kept(
            q.new_empty((some, heads, chunk, chunk)),
            q.new_empty((count, heads, chunk, chunk)),
            q.new_empty((len(PLANES), count, heads, chunk), dtype=wide),
            q.new_empty((count, heads, key) if channel else (count, heads), dtype=wide),
            q.new_empty(q.shape[:3], dtype=torch.int8),
            q.new_empty((held, heads, value, key)),
            q.new_empty((held, heads, chunk, value)),
            q.new_empty((segments.sequences * parts if parts > 1 else 0, heads, key, key), dtype=wide),
            q.new_empty(scaled),
            q.new_empty(scaled),
            q.new_empty(scaled if delta else (0,)),
            q.new_empty(scaled, dtype=wide),
            q.new_empty((some if channel else 0, heads, chunk, chunk), dtype=wide),
            q.new_empty((count if channel else 0, heads), dtype=torch.int8),
        )


@torch.library.custom_op("kvbind::affine_chunks", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None, gates: Tensor | None,
    initial: Tensor | None, cu_seqlens: Tensor | None, before: bool, delta: bool, chunk: int, keep: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]:  # fmt: skip
    """Outputs, final states, and `Kept`."""
    segments, call = cut(q, cu_seqlens, chunk), _call(q, v, rates, gates, before, delta, chunk)
    tokens, heads, key, value = *q.shape[1:], v.shape[3]
    kept = Kept.room(segments, q, v, chunk, delta, call.channel, keep)
    out, final = v.new_empty(v.shape), q.new_empty((segments.sequences, heads, key, value), dtype=torch.float32)
    by_head, parts = (gates if call.gates else None), _parts(segments, q, v)
    cuts, grid = (segments.table, tokens, segments.each, heads), segments.count * heads
    places = (segments.table, segments.offsets, tokens, segments.each, heads, parts)
    wholes, rests, seen_wholes, seen_rests, _, _, reaches, tails, weights, shares = kept.decays.unbind()
    logs = (wholes, rests, seen_wholes, seen_rests) if call.gates else (None,) * 4
    with on_device_of(q):
        decays[(segments.count * cdiv(heads, HEADS),)](
            kept.decays, rates, by_head, kept.keeps, kept.marks, *cuts[:3], wholes.numel(), heads,
            **constants_of("decays", call),
        )  # fmt: skip
        if call.channel:
            strides = *token_strides(q), *token_strides(k), *_strides(erase)
            scale[(grid,)](
                q, k, erase, gates, kept.sums, kept.scaled_q, kept.scaled_k, kept.scaled_e, kept.keeps, reaches,
                kept.marks, kept.steep, *cuts, *strides, **constants_of("scale", call),
            )  # fmt: skip
            scores[(grid * (chunk // 16),)](
                q, k, erase, kept.sums, kept.reads, kept.residuals, *cuts, *strides, **constants_of("scores", call),
            )  # fmt: skip
            steep_scores[(grid,)](
                q, k, erase, gates, kept.scaled_q, kept.scaled_k, kept.scaled_e, kept.reads, kept.residuals, kept.steep,
                *cuts, *strides, **constants_of("steep_scores", call),
            )  # fmt: skip
            q, k, erase = kept.scaled_q, kept.scaled_k, kept.scaled_e if delta else None
        strides = *token_strides(k), *_strides(erase), *token_strides(v)
        prepare[(grid,)](
            q, k, erase, v, *logs, weights, _optional(kept.residuals), kept.solved, kept.reads, reaches, kept.keeps,
            kept.marks, *cuts, *token_strides(q), *strides, **constants_of("prepare", call),
        )  # fmt: skip
        ends, chains = _ends(segments, parts, q, v), segments.sequences * heads
        if parts > 1:
            its = constants_of("parts", call)
            run_parts[(chains * (parts - 1) * (cdiv(value, its["BV"]) + cdiv(key, its["BV"])),)](
                k, erase, v, kept.solved, weights, shares, tails, kept.keeps, initial, ends, kept.moves, *places,
                *strides, **its,
            )  # fmt: skip
            its = constants_of("chain", call)
            chain[(chains * cdiv(value, its["BV"]),)](ends, kept.moves, heads, parts, **its)
        its = constants_of("states", call)
        run_states[(chains * parts * cdiv(value, its["BV"]),)](
            q, k, erase, v, kept.solved, kept.reads, weights, shares, reaches, tails, kept.keeps, out,
            _optional(kept.states), _optional(kept.written), initial, final, ends, *places, *token_strides(q), *strides,
            **its,
        )  # fmt: skip
    return out, final, *kept


def _ends(segments: Segments, parts: int, q: Tensor, v: Tensor) -> Tensor:
    """Room for states behind parts, or gradients of those before them, transposed."""
    return q.new_empty((segments.sequences * parts, q.shape[2], v.shape[3], q.shape[3]), dtype=torch.float32)


@_forward.register_fake
def _(q, k, v, erase, rates, gates, initial, cu_seqlens, before, delta, chunk, keep):
    segments, channel = cut(q, cu_seqlens, chunk), gates is not None and gates.dim() > 3
    final = q.new_empty((segments.sequences, *q.shape[2:], v.shape[3]), dtype=torch.float32)
    return v.new_empty(v.shape), final, *Kept.room(segments, q, v, chunk, delta, channel, keep)


@torch.library.custom_op("kvbind::affine_chunks_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, erase: Tensor | None, rates: Tensor | None,
    gates: Tensor | None, cu_seqlens: Tensor | None, kept: Sequence[Tensor], before: bool, delta: bool, chunk: int,
    needs_initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, erase, rates, gates and the initial state; empty where there is none."""
    segments, held = cut(q, cu_seqlens, chunk), Kept(*kept)
    call = _call(q, v, rates, gates, before, delta, chunk)
    tokens, heads, key, value = *q.shape[1:], v.shape[3]
    d_out = last_contiguous(d_out)

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return q.new_empty((0,) if x is None else x.shape, dtype=dtype or q.dtype)

    dq, dk, dv, de = like(q), like(k), like(v), like(erase)
    d_rates, d_gates = like(rates, torch.float32), like(gates, torch.float32)
    d_initial = q.new_empty((segments.sequences if needs_initial else 0, heads, key, value), dtype=torch.float32)
    d_states, d_right = torch.empty_like(held.states), torch.empty_like(held.written)
    d_reads, d_residuals = torch.empty_like(held.reads), torch.empty_like(held.solved)
    wholes, rests, _, seen_rests, floored, seen_floored, reaches, tails, weights, shares = held.decays.unbind()
    by_head, parts, plane = (gates if call.gates else None), _parts(segments, q, v), wholes.numel()
    logs = (floored, rests, seen_floored, seen_rests) if call.gates else (None,) * 4
    places = (segments.table, segments.offsets, tokens, segments.each, heads, parts)
    cuts, grid = (segments.table, tokens, segments.each, plane, heads), segments.count * heads
    chains, strips = segments.sequences * heads, constants_of("gate_gradients", call)["NK"]
    scaled = (held.scaled_q, held.scaled_k, _optional(held.scaled_e)) if call.channel else (q, k, erase)
    operands = (d_out, *scaled, held.solved, held.reads, shares, reaches, tails, held.keeps)
    strides = *token_strides(d_out), *(x for each in scaled for x in _strides(each))
    given = *token_strides(d_out), *token_strides(q), *token_strides(k), *_strides(erase)
    # what pairs, and each block of key channels, give to rates and gates
    gifts = q.new_empty((2 + 3 * strips, *wholes.shape), dtype=torch.float32)
    anchors = q.new_empty((strips, *wholes.shape[:2]), dtype=torch.float32)
    with on_device_of(q):
        ends = _ends(segments, parts, q, v)
        if parts > 1:
            its = constants_of("part_gradients", call)
            part_gradients[(chains * (parts - 1) * cdiv(value, its["BV"]),)](
                *operands, d_final, ends, *places, *strides, **its,
            )  # fmt: skip
            its = constants_of("chain", call, True)
            chain[(chains * cdiv(value, its["BV"]),)](ends, held.moves, heads, parts, **its)
        its = constants_of("state_gradients", call)
        state_gradients[(chains * parts * cdiv(value, its["BV"]),)](
            *operands, d_states, d_right, d_final, _optional(d_initial), ends, *places, *strides, **its,
        )  # fmt: skip
        pair_gradients[(grid,)](
            d_out, q, k, erase, v, *logs, weights, _optional(held.residuals), held.marks, held.written, d_right, dv, d_reads,
            d_residuals, gifts, *cuts, *given, *token_strides(v), **constants_of("pair_gradients", call),
        )  # fmt: skip
        if call.channel:
            for kernel in ("channel_gradients", "steep_channel_gradients"):
                channel_gradients[(grid * strips,)](
                    d_out, q, k, erase, weights, gates, held.sums, held.marks, held.steep, held.states, d_states,
                    held.written, d_right, d_reads, d_residuals, gifts, d_gates, dq, dk, de, *cuts, *given,
                    **constants_of(kernel, call),
                )  # fmt: skip
        else:
            key_gradients[(grid * strips,)](
                d_out, q, k, erase, reaches, tails, shares, held.written, d_right, held.states, d_states, held.marks,
                d_reads, d_residuals, dq, dk, de, gifts, anchors, *cuts, *given, **constants_of("key_gradients", call),
            )  # fmt: skip
        if rates is not None or by_head is not None:
            gate_gradients[(segments.count * cdiv(heads, HEADS),)](
                gifts, anchors, held.decays, by_head, _optional(d_rates), d_gates if call.gates else None, *cuts,
                **constants_of("gate_gradients", call),
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
    ctx.options = options[:-1]
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

    operands = (q, k, v, rate, erase, gate, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    found = dispatcher.call(
        _forward, narrow(q), narrow(k), narrow(v), None if erase is None else narrow(erase), plain(rate), plain(gate),
        plain(state), None if boundaries is None else boundaries.to(q.device), gate_acts == "before", residual, chunk, keep,
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
