"""The chunkwise parallel form (arXiv 2602.21204, appendix H): every chunk at once, forward and backward by hand.

Forward, with static features `Phi` and chunks `c`:

    G_c = Phi(K_c)^T diag(lr) V_c          features and rates in one kernel, then a product over the chunk's tokens
    D_c = G_c + m_c D_{c-1}                scan
    S_c = a_c S_{c-1} + sign NS(D_c)       scan; one pass for both where nothing is orthogonalized
    O_c = Phi(Q_c) S                       features, then a product with the state that the chunk sees

Backward, from `dO`: `dS_c = Phi(Q_c)^T dO_c`; from the last chunk to the first `dS_{c-1} += a_c dS_c`,
`da_c = <S_{c-1}, dS_c>`, `dNS_c = sign dS_c`, then `dD_{c-1} += m_c dD_c`, `dm_c = <D_{c-1}, dD_c>`, `dG_c = dD_c`; and
`dPhi(K) = diag(lr) V dG^T`, `dV = diag(lr) Phi(K) dG`, `dlr = <Phi(K), V dG^T>`. Features are computed anew and never
stored; saved are the states in the operands' dtype, the momentum buffers (float32, where there is momentum) and
Newton-Schulz's iterates.

Over ranks (`kvbind.kernels.chunked.rank_exchange`), each scan is preceded by an exchange of where ranks end from nothing,
during which the queries' features are found; backward, by one of the gradients of where they start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kvbind.kernels.chunked.prefix_sums import scan, scan_backward
from kvbind.kernels.chunked.rank_exchange import RankExchange
from kvbind.kernels.chunked.span_products import THETA, features, features_backward, product, write
from kvbind.kernels.chunked.span_tables import SpanTables
from kvbind.kernels.common.operands import last_contiguous
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.warm_up import warmed_up
from kvbind.kernels.newton_schulz.operator import newton_schulz_backward, newton_schulz_forward, saved_shapes


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SpanTables,
    state: Tensor,
    *,
    theta: Tensor | None = None,
    activation: str = "identity",
    rates: Tensor | None = None,
    momentum: Tensor | None = None,
    velocity: Tensor | None = None,
    decay: Tensor | None = None,
    coefficients: Sequence[Sequence[float]] = (),
    orthogonal_dtype: torch.dtype = torch.bfloat16,
    sign: float = 1.0,
    across: RankExchange | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an inner loop whose writes add up, over the chunks of a layout.

    Products take operands in q's dtype (bfloat16, float16 or float32) and accumulate in float32; gates, scans and states are
    float32, and a state is rounded to q's dtype where a product reads it. Differentiable in every tensor.

    Args:
        q: queries `[query rows, heads, D]`, the last axis contiguous.
        k: keys `[writing rows, heads, D]`, likewise.
        v: values `[writing rows, heads, Dv]`, likewise; q, k, v have one dtype.
        layout: which rows belong together.
        state: the last layer to start from, float32 `[S, heads, F, Dv]`, matrices contiguous.
        theta: the other matrices, float32 `[1 or 2, S or 1, heads, D, F]`: `act(x theta_0)`, times `x theta_1` where there
            is one; None for features that are the keys themselves.
        activation: a name that `kvbind.kernels.common.activations` knows.
        rates: learning rates, float32 `[writing rows, heads]`; None for 1.
        momentum: chunk means of the gates, float32 `[chunks, heads]`, with `velocity`.
        velocity: the momentum buffer to start from, float32 `[S, heads, F, Dv]`.
        decay: chunk means of the gates, float32 `[chunks, heads]`.
        coefficients: Newton-Schulz's; empty for no orthogonalization.
        orthogonal_dtype: the precision of its products.
        sign: 1 for descent, -1 for ascent.
        across: how the first and last sequences go on over ranks; `velocity` is then zero.

    Returns:
        Outputs `[query rows, heads, Dv]` in q's dtype, and the state and the momentum buffer after each sequence's last
        complete chunk, float32 `[S, heads, F, Dv]` (the latter empty without momentum).
    """
    idle = layout.idle if layout.idle is not None else layout.chunk_lengths.new_empty(0)
    tables = [
        layout.reads, layout.read_pieces, layout.row_pieces, layout.writes, layout.chunk_pieces, layout.whole_chunks,
        layout.sequences, layout.query_runs, layout.key_runs, idle,
    ]  # fmt: skip
    tensors = (q, k, v, theta, rates, momentum, velocity, decay, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    output, end_state, end_velocity, *_ = dispatcher.call(
        _chunked, q, k, v, theta, rates, momentum, velocity, decay, state, tables,
        [layout.longest_read, layout.longest_write, layout.rows], activation,
        [x for row in coefficients for x in row], orthogonal_dtype, sign, keep, "" if across is None else across.group,
        [] if across is None else across.numbers(),
    )  # fmt: skip
    return output, end_state, end_velocity


@torch.library.custom_op("kvbind::chunked", mutates_args=())
# ranks exchange what they compute
@warmed_up("tables", "sizes", "numbers", unless="group")
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor | None,
    rates: Tensor | None,
    momentum: Tensor | None,
    velocity: Tensor | None,
    decay: Tensor | None,
    state: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    activation: str,
    coefficients: Sequence[float],
    orthogonal_dtype: torch.dtype,
    sign: float,
    keep: bool,
    group: str,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    reads, _, _, writes, chunk_pieces, whole_chunks, sequences, *_ = tables
    longest_read, longest_write, rows = sizes
    cast = None if theta is None else theta.to(q.dtype)
    if cast is None:
        parts = write(k, v, writes, rates)
    else:
        parts = write(features(k, cast, writes, longest_write, activation, rates), v, writes)
    run = partial(scan, sign=sign, rows=rows, dtype=q.dtype)
    iterates, squares = state.new_empty(0, dtype=orthogonal_dtype), state.new_empty(0)
    across, seen, entered = RankExchange.of(group, numbers), None, state.new_empty(0)
    staged = bool(coefficients) or (across is not None and momentum is not None)
    if staged:
        if across is not None and momentum is not None and velocity is not None:
            sent = across.send_end(parts, chunk_pieces, sequences, momentum)
            seen = q if cast is None else features(q, cast, reads, longest_read, activation)
            velocity = across.receive_start(sent, velocity)
            # where nothing came in, the backward pass has what was given
            entered = velocity if across.continues else entered
        velocities, _, end_velocity, _ = run(
            parts, chunk_pieces, sequences, state=None, keep=True, momentum=momentum, velocity=velocity
        )
        parts, pieces = velocities, whole_chunks
        if coefficients:
            parts, (iterates, squares) = newton_schulz_forward(
                velocities, triples(coefficients), orthogonal_dtype, keep, out_dtype=orthogonal_dtype
            )
    else:
        pieces = chunk_pieces
    if across is not None:
        sent = across.send_end(parts, pieces, sequences, decay, state, sign)
        if seen is None:
            seen = q if cast is None else features(q, cast, reads, longest_read, activation)
        state = across.receive_start(sent, state)
    if staged:
        _, states, _, end_state = run(parts, pieces, sequences, state=state, decay=decay, keep=False)
        if not keep or momentum is None:
            velocities = velocities.new_empty(0)
    else:
        velocities, states, end_velocity, end_state = run(
            parts, pieces, sequences, state=state, momentum=momentum, velocity=velocity, decay=decay,
            keep=keep and momentum is not None,
        )  # fmt: skip
    del parts
    if seen is None:
        seen = q if cast is None else features(q, cast, reads, longest_read, activation)
    output, _ = product(seen, states, reads, longest_read)
    if not keep:
        states, entered = states.new_empty(0), entered.new_empty(0)
    return output, end_state, end_velocity, states, velocities, iterates, squares, entered


def triples(coefficients: Sequence[float]) -> list[tuple[float, float, float]]:
    """Newton-Schulz's `(a, b, c)`, which operators take as one list."""
    return list(zip(coefficients[::3], coefficients[1::3], coefficients[2::3], strict=True))


@_chunked.register_fake
def _(
    q, k, v, theta, rates, momentum, velocity, decay, state, tables, sizes, activation, coefficients, orthogonal_dtype,
    sign, keep, group, numbers,
):  # fmt: skip
    rows, heads = sizes[2], q.shape[1]
    matrix = state.shape[2:]
    chunks, count = len(tables[4]), len(tables[6])
    none = q.new_empty(0, dtype=torch.float32)
    stored, across = keep and momentum is not None, RankExchange.of(group, numbers)
    iterates, squares = (0,), (0,)
    if coefficients:
        shape, iterations = (chunks, heads, *matrix), len(coefficients) // 3
        iterates, squares = saved_shapes(shape, iterations, orthogonal_dtype, keep, q.device)
    return (
        q.new_empty(*q.shape[:2], v.shape[2]),
        state.new_empty(count, heads, *matrix),
        state.new_empty(count, heads, *matrix) if momentum is not None else none,
        q.new_empty(rows, heads, *matrix) if keep else q.new_empty(0),
        state.new_empty(chunks, heads, *matrix) if stored else none,
        state.new_empty(iterates, dtype=orthogonal_dtype),
        state.new_empty(squares),
        state.new_empty(count, heads, *matrix) if stored and across is not None and across.continues else none,
    )


@torch.library.custom_op("kvbind::chunked_backward", mutates_args=())
# ranks exchange what they compute
@warmed_up("tables", "sizes", "numbers", unless="group")
def _chunked_backward(
    d_output: Tensor,
    d_end_state: Tensor,
    d_end_velocity: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor | None,
    rates: Tensor | None,
    momentum: Tensor | None,
    velocity: Tensor | None,
    decay: Tensor | None,
    states: Tensor,
    velocities: Tensor,
    iterates: Tensor,
    squares: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    activation: str,
    coefficients: Sequence[float],
    orthogonal_dtype: torch.dtype,
    sign: float,
    group: str,
    numbers: Sequence[int],
) -> list[Tensor]:
    reads, read_pieces, row_pieces, writes, chunk_pieces, whole_chunks, sequences, query_runs, key_runs, idle = tables
    longest_read, longest_write, _ = sizes
    chunks, dtype = len(chunk_pieces), q.dtype
    cast = None if theta is None else theta.to(dtype)
    both = None if cast is None else torch.cat(cast.unbind(0), dim=-1)

    if cast is None or both is None:
        seen, du = q, None
    else:
        seen, du, _ = features_backward(q, cast, d_output, states, reads, longest_read, activation)
    parts = write(seen, d_output, read_pieces)
    del seen

    across = RankExchange.of(group, numbers)
    staged = bool(coefficients) or (across is not None and momentum is not None)
    back = partial(scan_backward, chunks=chunks, sign=sign)
    running = partial(back, parts, row_pieces, decay=decay)
    moving = partial(back, momentum=momentum, velocity=velocity, dtype=dtype)
    sent = None
    if across is not None:
        gradient = d_end_state[: across.count]
        if across.continues:
            first = sequences[: across.count]
            _, gradient, *_ = running(sequences=first, d_end_state=d_end_state, dtype=torch.float32, start_only=True)
        sent = across.send_start_gradient(gradient, decay)
    if du is None or both is None:
        dq, _ = product(d_output, states, reads, longest_read, transposed=True)
    else:
        dq, _ = product(du, both, reads, longest_read, column=THETA, transposed=True)
        d_theta = write(q, du, query_runs)
    del du
    if across is not None and sent is not None:
        d_end_state = across.receive_end_gradient(sent, d_end_state)

    d_velocity, d_momentum = None, None
    if staged:
        d_shaped, d_state, _, _, d_decay = running(
            sequences=sequences, dtype=torch.float32, rows=states, d_end_state=d_end_state
        )
        del parts, running
        if not coefficients:
            d_moved = d_shaped
        elif momentum is None:
            d_writes = newton_schulz_backward(
                (iterates, squares), d_shaped, triples(coefficients), orthogonal_dtype, out_dtype=dtype
            )
        else:
            d_moved = newton_schulz_backward((iterates, squares), d_shaped, triples(coefficients), orthogonal_dtype)
        if momentum is not None:
            if across is not None and d_end_velocity is not None:
                gradient = d_end_velocity[: across.count]
                if across.continues:
                    first = sequences[: across.count]
                    _, _, gradient, *_ = moving(
                        d_moved, whole_chunks, sequences=first, d_end_velocity=d_end_velocity, start_only=True
                    )
                sent = across.send_start_gradient(gradient, momentum)
                d_end_velocity = across.receive_end_gradient(sent, d_end_velocity)
            d_writes, _, d_velocity, d_momentum, _ = moving(
                d_moved, whole_chunks, sequences=sequences, velocities=velocities, d_end_velocity=d_end_velocity
            )
    else:
        d_writes, d_state, d_velocity, d_momentum, d_decay = moving(
            parts, row_pieces, sequences=sequences, velocities=velocities, d_end_velocity=d_end_velocity, rows=states,
            d_end_state=d_end_state, decay=decay,
        )  # fmt: skip
    if across is not None:
        d_state = across.without_start(d_state)
        d_velocity = None if d_velocity is None else across.without_start(d_velocity)

    if cast is None or both is None:
        dk, d_rates = product(
            v, d_writes, writes, longest_write, transposed=True, rates=rates, against=None if rates is None else k
        )
        dv, _ = product(k, d_writes, writes, longest_write, rates=rates)
    else:
        written, du, d_rates = features_backward(k, cast, v, d_writes, writes, longest_write, activation, rates)
        dv, _ = product(written, d_writes, writes, longest_write)
        del written
        dk, _ = product(du, both, writes, longest_write, column=THETA, transposed=True)
        blank_(du, idle)
        d_theta = d_theta + write(k, du, key_runs)
    for x in (dk, dv, d_rates):
        if x is not None:
            blank_(x, idle)
    found = [dq, dk, dv, d_state]
    if theta is not None:
        d_theta = d_theta.unflatten(0, (theta.shape[1], -1)).sum(1)
        found.append(torch.stack(d_theta.split(theta.shape[-1], dim=-1)))
    for wanted, x in ((rates, d_rates), (momentum, d_momentum), (momentum, d_velocity), (decay, d_decay)):
        if wanted is not None and x is not None:
            found.append(x)
    return found


def blank_(x: Tensor, idle: Tensor) -> None:
    """Zero rows of `x`: those that `idle` lists, or marks."""
    if idle.dtype == torch.bool:
        x.masked_fill_(idle.reshape(-1, *(1,) * (x.dim() - 1)), 0)
    elif len(idle):
        x.index_fill_(0, idle, 0)


@_chunked_backward.register_fake
def _(
    d_output, d_end_state, d_end_velocity, q, k, v, theta, rates, momentum, velocity, decay, states, velocities,
    iterates, squares, tables, sizes, activation, coefficients, orthogonal_dtype, sign, group, numbers,
):  # fmt: skip
    found = [q, k, v, d_end_state, theta, rates, momentum, None if momentum is None else velocity, decay]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in found if x is not None]


def _setup(ctx, inputs, output) -> None:
    q, k, v, theta, rates, momentum, velocity, decay, _, tables, sizes, *flags = inputs
    saved = output[3:]
    # or autograd would fill gradients of all that is saved with zeros
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(q, k, v, theta, rates, momentum, velocity, decay, *saved, *tables)
    ctx.sizes, ctx.flags = sizes, flags


def _backward(ctx, d_output, d_end_state, d_end_velocity, *_):
    q, k, v, theta, rates, momentum, velocity, decay, *saved = ctx.saved_tensors
    states, velocities, iterates, squares, entered, *tables = saved
    activation, coefficients, orthogonal_dtype, sign, _, group, numbers = ctx.flags
    if len(entered):
        velocity = entered
    if d_output is None:
        d_output = q.new_zeros(*q.shape[:2], v.shape[2])
    d_output = last_contiguous(d_output)
    at_end = [d_end_state] if momentum is None else [d_end_state, d_end_velocity]
    if any(grad is None for grad in at_end):
        # read alone, so that one will do for both
        zeros = torch.zeros(len(tables[6]), *states.shape[1:], dtype=torch.float32, device=q.device)
    at_end = [zeros if grad is None else grad.contiguous() for grad in at_end]
    grads = dispatcher.call(
        _chunked_backward, d_output, at_end[0], None if momentum is None else at_end[1],
        q, k, v, theta, rates, momentum, velocity, decay, states, velocities, iterates, squares, tables,
        ctx.sizes, activation, coefficients, orthogonal_dtype, sign, group, numbers,
    )  # fmt: skip
    found = iter(grads)
    dq, dk, dv, d_state = (next(found) for _ in range(4))
    d_theta, d_rates, d_momentum, d_velocity, d_decay = (
        None if x is None else next(found) for x in (theta, rates, momentum, velocity, decay)
    )
    # autograd takes a list without elements for one of tensors
    no_coefficients, no_numbers = None if coefficients else [], None if numbers else []
    return (
        dq, dk, dv, d_theta, d_rates, d_momentum, d_velocity, d_decay, d_state,
        [None] * len(tables), None, None, no_coefficients, None, None, None, None, no_numbers,
    )  # fmt: skip


torch.library.register_autograd("kvbind::chunked", _backward, setup_context=_setup)
