"""The recurrent form of SwiGLU and one-layer networks: chunk after chunk, an update of the weights that it starts from.

Only the writes are sequential. A pass goes through the chunks and stores the weights before each and after the last; what
tokens read is then computed for many chunks at once (`batched_chunks`). One chunk's update (`chunk_update`) is three
launches and Newton-Schulz: the factors of the gradients (`swiglu_gradients`), their products over the chunk's tokens with
momentum added (`chunk_matmul`), and the update of the weights (`weight_update`). They are captured as a CUDA graph
(`repeated`). Where the last layer alone is updated, the gradients do not depend on it: then the products and
orthogonalizations of many chunks are launched together, and what is left to do in order is momentum and the update.

For the gradient a call stores what its chunks start from and no token's intermediates: weights in the operands' dtype,
velocities in that of Newton-Schulz (or float32), and channels' norms. It goes from the last chunks to the first: the
reads' gradients of several chunks at once, then one by one the weights' update, Newton-Schulz, momentum and the second
derivatives of the loss. The formulas stand with the kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.cuda_graphs import repeated
from kvbind.kernels.launching.warm_up import warmed_up
from kvbind.kernels.recurrent.batched_chunks import BatchedReads, LastLayerWrites
from kvbind.kernels.recurrent.chunk_update import ChunkUpdate, ChunkUpdateBackward
from kvbind.kernels.recurrent.packed_weights import PackedWeights
from kvbind.kernels.recurrent.update_rule import ChunkRule, chunk_of
from kvbind.kernels.recurrent.weight_update import apply, apply_backward, momentum_backward, momentum_forward
from kvbind.kernels.recurrent.workspace import Workspace, aligned, by_chunk, copy

LARGEST_WIDTH = 2048
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def recurrent_swiglu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor,
    rate_gate: Tensor | None,
    rate_up: Tensor | None,
    rate_down: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    momentum_state: Sequence[Tensor] | None,
    norms: Sequence[Tensor] | None,
    *,
    chunk: int,
    update_all: bool,
    normalize: bool,
    coefficients: Sequence[Sequence[float]] | None,
    sign: float,
    own_chunk: bool,
    precision: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, tuple[Tensor, ...] | None]:
    """Run the update rule (specification, section 1; dot-product loss, one step) over whole chunks.

    Args:
        q: what is read, `[B, T, H, Dk]`; bfloat16, float16 or float32, in which products take their operands.
        k: keys `[B, T, H, Dk]` in q's dtype.
        v: values `[B, T, H, Dv]` in q's dtype.
        gate: W_gate `[B, H, Dk, Dh]`, float32; None, with `up`, for the network `f(x) = x W` of `down` alone.
        up: W_up `[B, H, Dk, Dh]`, float32.
        down: the last layer `[B, H, Dh, Dv]`, float32.
        rate_gate: learning rates of W_gate, float32 `[B, T, H]`, where that is updated.
        rate_up: likewise of W_up.
        rate_down: likewise of the last layer.
        momentum: each chunk's mean gate `m_c`, float32 `[B, H, T / chunk]`, or None.
        decay: each chunk's mean gate `a_c`, likewise.
        momentum_state: with `momentum`, the buffer of each updated matrix, float32, laid out as that; None for zeros.
        norms: with `normalize`, the starting norm of each channel of each updated matrix, `[B, H, 1, out]`; None for
            those of the weights given.
        chunk: tokens in a chunk; T is a multiple.
        update_all: update W_gate, W_up and the last layer, in this order, or the last layer alone.
        normalize: after each update, give every output channel its starting norm back.
        coefficients: of Newton-Schulz, an `(a, b, c)` per iteration, or None.
        sign: 1 for descent, -1 for ascent.
        own_chunk: tokens read the weights after their own chunk's update rather than before it.
        precision: in which Newton-Schulz takes its operands.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype; W_gate, W_up and the last layer after the last chunk, float32; and the
        momentum buffers, or None.

    Raises:
        ValueError: T is no positive multiple of `chunk`, or operands are given in part.
    """
    tokens = q.shape[1]
    if tokens < chunk or tokens % chunk:
        raise ValueError(f"q must have a positive multiple of chunk={chunk} tokens; got {tokens}")
    if (gate is None) != (up is None) or (update_all and gate is None):
        raise ValueError("gate and up must both be given, or both be None with update_all=False")
    theta = None if gate is None or up is None else torch.cat((gate.flatten(2), up.flatten(2)), -1)
    if not update_all:
        weights, rates = down.flatten(2), rate_down.unsqueeze(0)
    elif theta is None or rate_gate is None or rate_up is None:
        raise ValueError("rate_gate and rate_up must be given with update_all=True")
    else:
        weights, theta = torch.cat((theta, down.flatten(2)), -1), None
        rates = torch.stack((rate_gate, rate_up, rate_down))
    updated = (gate, up, down) if update_all else (down,)
    velocity = start = None
    if momentum is not None:
        velocity = (
            torch.zeros_like(weights) if momentum_state is None else torch.cat([x.flatten(2) for x in momentum_state], -1)
        )
    if normalize:
        given = norms or [torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in updated if x is not None]
        start = torch.cat([x.flatten(2) for x in given], -1)

    operands = (q, k, v, theta, weights, rates, momentum, decay, velocity, start)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    flat = [float(x) for row in coefficients or () for x in row]
    out, end, moved, *_ = dispatcher.call(
        _recurrent, *operands, chunk, down.shape[-2], update_all, float(sign), own_chunk, flat, precision, keep
    )
    shapes = [x.shape for x in updated if x is not None]
    ends = _matrices(end, shapes)
    velocities = None if momentum is None else _matrices(moved, shapes)
    if update_all:
        gate, up = ends[:2]
    return out, gate, up, ends[-1], velocities


def covers(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `recurrent_swiglu` takes operands of `dtype` and of these key, hidden and value widths."""
    return dtype in DTYPES and all(width % 16 == 0 and 0 < width <= LARGEST_WIDTH for width in widths)


class _CallOperands:
    """One call's operands, as both directions need them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, theta: Tensor | None, rates: Tensor, momentum: Tensor | None,
        decay: Tensor | None, norms: Tensor | None, chunk: int, hidden: int, update_all: bool, sign: float,
        own_chunk: bool, coefficients: Sequence[float], precision: torch.dtype,
    ) -> None:  # fmt: skip
        packing = PackedWeights(q.shape[-1], hidden, v.shape[-1], update_all)
        swiglu = update_all or theta is not None
        self.rule = ChunkRule(chunk, packing, swiglu, sign, own_chunk, tuple(coefficients), precision)
        self.q, self.k, self.v, self.rates = aligned(q), aligned(k), aligned(v), rates
        self.gates = self.momentum, self.decay = by_chunk(momentum), by_chunk(decay)
        self.norms = None if norms is None else norms.flatten(0, 1).contiguous()
        self.workspace = Workspace(self.rule, q)
        self.flags = (momentum is not None, decay is not None, norms is not None)
        self.reader = BatchedReads(self.workspace, theta)
        self.writer = LastLayerWrites(self.workspace, self.reader)
        if update_all:
            self.rates_by_chunk = rates.unflatten(2, (-1, chunk)).movedim(2, 0).contiguous()

    def repeated(
        self, make: type[ChunkUpdate] | type[ChunkUpdateBackward]
    ) -> contextlib.AbstractContextManager[tuple[Any, Callable[[], None]]]:
        """One chunk's work, captured if it was met before."""
        key = self.workspace.key(make.__name__, *self.flags)
        return repeated(key, self.q.device, lambda: make(self.workspace, *self.flags))

    def lies_as_buffers(self) -> bool:
        """Whether Triton compiles the same kernels for tokens here as for copies of them, so that graphs load none."""
        strides = [stride for x in (self.k, self.v) for stride in x.stride()[:3]]
        fit = all(stride % 16 == 0 and stride < 2**31 for stride in strides)
        fit = fit and (self.k.data_ptr() | self.v.data_ptr()) % 16 == 0
        return fit and self.rates_by_chunk[0].numel() % 4 == 0

    def chunk(self, step: ChunkUpdate | ChunkUpdateBackward, c: int) -> list[tuple[Tensor, Tensor]]:
        """What to copy for a step to have chunk `c`."""
        span = self.workspace.span
        pairs = [(step.k, span(self.k, c, c + 1)), (step.v, span(self.v, c, c + 1)), (step.rates, self.rates_by_chunk[c])]
        return [*pairs, *((step.gates[i], gate[c]) for i, gate in enumerate(self.gates) if gate is not None)]


@torch.library.custom_op("kvbind::recurrent_swiglu", mutates_args=())
@warmed_up("momentum", "decay")
def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor | None, weights: Tensor, rates: Tensor, momentum: Tensor | None,
    decay: Tensor | None, velocity: Tensor | None, norms: Tensor | None, chunk: int, hidden: int, update_all: bool,
    sign: float, own_chunk: bool, coefficients: Sequence[float], precision: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _CallOperands(q, k, v, theta, rates, momentum, decay, norms, chunk, hidden, update_all, sign, own_chunk,
                 coefficients, precision)  # fmt: skip
    workspace, packing, rule, z = call.workspace, call.rule.packing, call.rule, call.workspace.z
    out = workspace.rows(workspace.tokens, packing.value)
    running = weights.detach().flatten(0, 1).clone(memory_format=torch.contiguous_format)
    moving = None if velocity is None else velocity.detach().flatten(0, 1).clone(memory_format=torch.contiguous_format)

    # without a gradient to come, what one segment's chunks start from makes room for the next segment's
    length = workspace.chunks if keep else min(rule.segment(z), workspace.chunks)
    states = workspace.empty(length + 1, z, packing.size, dtype=workspace.low)
    velocities = workspace.empty(length + 1, z, packing.size, dtype=rule.velocity_dtype)
    found = workspace.empty(*((length, z, packing.channels) if norms is not None else (0,)))
    states[0].copy_(running)
    velocities[0].zero_() if moving is None else velocities[0].copy_(moving)

    with contextlib.ExitStack() as stack:
        if update_all:
            step, run = stack.enter_context(call.repeated(ChunkUpdate))
            step.start(running, moving, call.norms)
            # launches take tensors where they lie, if the kernels are those of the step's own buffers; a graph takes the
            # tensors that it was captured with
            in_place = run == step.run and call.lies_as_buffers()
            aligned_gates = [None if x is None else F.pad(x, (0, -z % 4)) for x in call.gates]
        for first, stop in rule.segments(workspace.chunks, z):
            place = first if keep else 0
            if first and not keep:
                states[0].copy_(states[length])
            here = slice(place, place + stop - first)
            after = slice(here.start + 1, here.stop + 1)
            if update_all:
                for c in range(first, stop):
                    at = place + c - first
                    if in_place:
                        step.update(
                            *(workspace.span(x, c, c + 1) for x in (call.k, call.v)), call.rates_by_chunk[c],
                            *(None if x is None else x[c] for x in aligned_gates), states[at : at + 1],
                            states[at + 1 : at + 2], velocities[at + 1 : at + 2], found[at : at + 1],
                        )  # fmt: skip
                        continue
                    copy(call.chunk(step, c))
                    run()
                    results = [(states[at + 1], step.state[0]), (velocities[at + 1], step.velocities[0])]
                    copy(results if norms is None else [*results, (found[at], step.found[0])])
            else:
                k_here, v_here = workspace.span(call.k, first, stop), workspace.span(call.v, first, stop)
                rates_here = workspace.span(rates, first, stop, axis=2)
                if moving is None or call.momentum is None:
                    call.writer.forward(k_here, v_here, rates_here, velocities[after])
                else:
                    written = workspace.empty(stop - first, z, packing.size)
                    call.writer.forward(k_here, v_here, rates_here, written)
                    momentum_forward(moving, written, call.momentum[first:stop], velocities[after])
                updates = rule.orthogonalize(velocities[after])
                gates = None if call.decay is None else call.decay[first:stop]
                normed = (None, None) if norms is None else (call.norms, found[here])
                apply(packing, running, updates, states[after], sign, gates, *normed)
            call.reader.forward(
                workspace.span(call.q, first, stop), states[after if own_chunk else here], workspace.span(out, first, stop)
            )
        if update_all:
            running.copy_(step.weights)
            if moving is not None:
                moving.copy_(step.velocity)
    per_head = (workspace.batch, workspace.heads, -1)
    end = moving.view(per_head) if moving is not None else workspace.empty(0)
    if not keep:
        states, found = workspace.empty(0, dtype=workspace.low), workspace.empty(0)
        velocities = workspace.empty(0, dtype=rule.velocity_dtype)
    return out, running.view(per_head), end, states, velocities, found


@_recurrent.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor | None, weights: Tensor, rates: Tensor, momentum: Tensor | None,
    decay: Tensor | None, velocity: Tensor | None, norms: Tensor | None, chunk: int, hidden: int, update_all: bool,
    sign: float, own_chunk: bool, coefficients: Sequence[float], precision: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, size = weights.shape
    count, z = q.shape[1] // chunk, batch * heads
    stored = precision if coefficients else torch.float32
    return (
        q.new_empty(v.shape),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
        weights.new_empty((0,) if velocity is None else weights.shape),
        q.new_empty((count + 1, z, size) if keep else (0,)),
        weights.new_empty((count + 1, z, size) if keep else (0,), dtype=stored),
        weights.new_empty((count, z, norms.shape[-1]) if keep and norms is not None else (0,)),
    )


@torch.library.custom_op("kvbind::recurrent_swiglu_backward", mutates_args=())
@warmed_up("momentum", "decay")
def _recurrent_backward(
    d_out: Tensor | None, d_weights: Tensor | None, d_velocity: Tensor | None,
    states: Tensor, velocities: Tensor, found: Tensor,
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor | None, rates: Tensor, momentum: Tensor | None,
    decay: Tensor | None, norms: Tensor | None, chunk: int, hidden: int, update_all: bool,
    sign: float, own_chunk: bool, coefficients: Sequence[float], precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _CallOperands(q, k, v, theta, rates, momentum, decay, norms, chunk, hidden, update_all, sign, own_chunk,
                 coefficients, precision)  # fmt: skip
    workspace, packing, rule, z = call.workspace, call.rule.packing, call.rule, call.workspace.z
    grad_out = aligned(torch.zeros_like(v) if d_out is None else d_out)
    dq, dk, dv = (workspace.rows(workspace.tokens, width) for width in (packing.key, packing.key, packing.value))
    d_rates = workspace.empty(workspace.chunks, len(rates), workspace.batch, chunk, workspace.heads)

    def begun(x: Tensor | None, size: int) -> Tensor:
        if x is None:
            return torch.zeros(z, size, dtype=torch.float32, device=q.device)
        return x.detach().flatten(0, 1).clone(memory_format=torch.contiguous_format)

    grad, moving, d_norms = begun(d_weights, packing.size), begun(d_velocity, packing.size), begun(None, packing.channels)
    d_theta = workspace.empty(0) if theta is None else torch.zeros(z, theta.shape[-1], dtype=torch.float32, device=q.device)
    d_momentum, d_decay = (workspace.empty(0 if gate is None else workspace.chunks, z) for gate in (momentum, decay))

    with contextlib.ExitStack() as stack:
        if update_all:
            step, run = stack.enter_context(call.repeated(ChunkUpdateBackward))
            step.start(grad, moving, call.norms)
        for first, stop in reversed(rule.segments(workspace.chunks, z)):
            here, after, around = slice(first, stop), slice(first + 1, stop + 1), slice(first, stop + 1)
            reads, more = call.reader.backward(
                workspace.span(call.q, first, stop),
                states[after if own_chunk else here],
                workspace.span(grad_out, first, stop),
                workspace.span(dq, first, stop),
            )
            if more is not None:
                d_theta += more
            saved = rule.saved(velocities[after])
            if update_all:
                for c in reversed(range(first, stop)):
                    operands = [*call.chunk(step, c), *step.keep(chunk_of(saved, c - first, stop - first))]
                    operands += [(step.states, states[c : c + 2]), (step.reads[0], reads[c - first])]
                    if momentum is not None:
                        operands.append((step.velocity[0], velocities[c]))
                    if norms is not None:
                        operands.append((step.found[0], found[c]))
                    copy(operands)
                    run()
                    results = [(workspace.span(dk, c, c + 1), step.dk), (workspace.span(dv, c, c + 1), step.dv)]
                    gates = enumerate((d_momentum, d_decay))
                    results += [(d_gate[c], step.d_gates[i]) for i, d_gate in gates if len(d_gate)]
                    copy([*results, (d_rates[c], step.d_rates)])
                continue
            d_updates = workspace.empty(stop - first, z, packing.size, dtype=rule.velocity_dtype)
            retained = None if call.decay is None else call.decay[here]
            normed = (None, None, None) if norms is None else (call.norms, found[here], d_norms)
            d_retained = apply_backward(
                packing, grad, grad, states[around], reads, d_updates, sign, own_chunk, retained, *normed
            )
            if d_retained is not None:
                d_decay[here] = d_retained
            d_velocities = rule.orthogonalize_backward(saved, d_updates)
            if call.momentum is not None:
                d_written = workspace.empty(stop - first, z, packing.size, dtype=workspace.low)
                d_momentum[here] = momentum_backward(moving, d_velocities, velocities[here], call.momentum[here], d_written)
            else:
                d_written = d_velocities.to(workspace.low)
            d_rate, more = call.writer.backward(
                workspace.span(call.k, first, stop),
                workspace.span(call.v, first, stop),
                workspace.span(rates, first, stop, axis=2),
                d_written,
                workspace.span(dk, first, stop),
                workspace.span(dv, first, stop),
            )
            d_rates[here, 0].copy_(d_rate.unflatten(1, (-1, chunk)).transpose(0, 1))
            if more is not None:
                d_theta += more
        if update_all:
            grad.copy_(step.grad)
            moving.copy_(step.d_velocity)
            d_norms.copy_(step.d_norms)

    def per_head(x: Tensor) -> Tensor:
        return x.unflatten(0, (workspace.batch, workspace.heads))

    def per_gate(x: Tensor) -> Tensor:
        return per_head(x.T.contiguous()) if len(x) else workspace.empty(0)

    return (
        dq, dk, dv, per_head(d_theta) if theta is not None else d_theta, per_head(grad),
        d_rates.movedim(0, 2).flatten(2, 3).contiguous(),
        per_gate(d_momentum), per_gate(d_decay),
        per_head(moving) if momentum is not None else workspace.empty(0),
        per_head(d_norms) if norms is not None else workspace.empty(0),
    )  # fmt: skip


@_recurrent_backward.register_fake
def _(
    d_out: Tensor | None, d_weights: Tensor | None, d_velocity: Tensor | None,
    states: Tensor, velocities: Tensor, found: Tensor,
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor | None, rates: Tensor, momentum: Tensor | None,
    decay: Tensor | None, norms: Tensor | None, chunk: int, hidden: int, update_all: bool,
    sign: float, own_chunk: bool, coefficients: Sequence[float], precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    per_head = (q.shape[0], q.shape[2])

    def like(x: Tensor | None) -> Tensor:
        return rates.new_empty(0) if x is None else rates.new_empty(x.shape)

    size = states.shape[-1]
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), like(theta), rates.new_empty(*per_head, size),
        rates.new_empty(rates.shape), like(momentum), like(decay),
        rates.new_empty(0) if momentum is None else rates.new_empty(*per_head, size), like(norms),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, theta, _, rates, momentum, decay, velocity, norms, *static, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.keep, ctx.static, ctx.moving = keep, static, velocity is not None
    ctx.save_for_backward(*output[3:], q, k, v, theta, rates, momentum, decay, norms)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("kvbind::recurrent_swiglu was called with keep=False, so that it has no gradient")
    d_out, d_weights, d_velocity = grads[:3]
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    dq, dk, dv, d_theta, d_start, d_rates, d_momentum, d_decay, d_moving, d_norms = dispatcher.call(
        _recurrent_backward, d_out, d_weights, d_velocity if ctx.moving else None, *saved, *ctx.static
    )

    def wanted(place: int, d: Tensor) -> Tensor | None:
        return None if saved[place] is None else d

    gates = (wanted(8, d_momentum), wanted(9, d_decay), wanted(8, d_moving))
    return dq, dk, dv, wanted(6, d_theta), d_start, d_rates, *gates, wanted(10, d_norms), *(None,) * (len(ctx.static) + 1)


_recurrent.register_autograd(_backward, setup_context=_setup_context)


def _matrices(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """`[B, H, P]` as its matrices."""
    parts = flat.split([shape[-2] * shape[-1] for shape in shapes], -1)
    return tuple(part.unflatten(-1, shape[-2:]) for part, shape in zip(parts, shapes, strict=True))
