"""The gradient of the chunkwise parallel form of sequences of one length, of which `equal_chunks` is the form itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbind.kernels.chunked.prefix_sums import blocks_of, bound_scan_backward
from kvbind.kernels.common.operands import cdiv, ready, zeros
from kvbind.kernels.equal_chunks import tma_products as products
from kvbind.kernels.equal_chunks.tma_products import TokenRows

if TYPE_CHECKING:
    from kvbind.kernels.equal_chunks.operator import LaunchPlan

RUNS = 8
"""Into how many parts the sum of a shared matrix's gradient over a sequence's tokens is cut."""


class BackwardLaunches:
    """The launches of the backward pass of a plan."""

    def __init__(self, plan: LaunchPlan) -> None:
        s, like = plan.shapes, plan.like
        output, hiddens = plan.output, plan.hiddens
        self.queries, self.keys, self.values = (plan.rows(x, x.shape[3]) for x in (s.q, s.k, s.v))
        self.reads = cdiv(plan.length, s.chunk)
        self.to_states = plan.bound_write(s.q if s.theta is None else hiddens, output, self.reads)
        self.from_output = plan.bound_product(
            output, hiddens if s.theta else self.queries, states=plan.states, own=s.own, transposed=True
        )
        self.from_values = plan.bound_product(
            s.v, hiddens if s.theta else self.keys, states=plan.complete, transposed=True,
            rates=None if s.theta else s.rates, against=None if s.theta or s.rates is None else s.k,
        )  # fmt: skip
        self.to_values = plan.bound_product(
            hiddens if s.theta else s.k, self.values, states=plan.complete, rates=None if s.theta else s.rates
        )
        if s.theta is not None:
            theta = s.theta
            self.query_features = products.features_backward(s.q, theta, like, None, hiddens)
            self.key_features = products.features_backward(s.k, theta, like, s.rates, hiddens)
            joined = self.joined = s.q.like(theta.factors * plan.hidden)
            # one set of matrices for all sequences is met as one long sequence
            batch, length = (1, plan.batch * plan.length) if theta.sets == 1 else (plan.batch, plan.length)
            flat = TokenRows((batch, length, *joined.shape[2:]), (length * joined.strides[1], *joined.strides[1:]))
            keys = s.k.like(plan.key_width)
            keys_flat = TokenRows((batch, length, *keys.shape[2:]), (length * keys.strides[1], *keys.strides[1:]))
            self.queries = self.keys = keys
            self.to_keys = products.product(flat, keys_flat, products.DEPTH * 4, 1, like, transposed=True)
            run = cdiv(cdiv(plan.length, RUNS), products.DEPTH) * products.DEPTH
            self.runs = cdiv(plan.length, run)
            self.query_theta = products.write(s.q, joined, run, self.runs, like)
            # tokens of an incomplete chunk have written nothing, whatever they hold
            inside = plan.complete * s.chunk
            self.key_theta = products.write(s.k.first(inside), joined.first(inside), run, self.runs, like)
        scan = partial(
            bound_scan_backward, plan.batch, plan.heads, plan.size, plan.order, chunks=plan.chunks, reads=self.reads,
            behind=s.own, sign=s.sign,
        )  # fmt: skip
        if plan.staged:
            self.states_scan = scan(stated=True, momentum=False, decay=s.decay)
            self.moving_scan = scan(stated=False, momentum=s.momentum, decay=False)
        else:
            self.states_scan = scan(stated=True, momentum=s.momentum, decay=s.decay)

    def run(
        self,
        plan: LaunchPlan,
        stream: int,
        d_output: Tensor,
        d_end: Tensor | None,
        d_end_velocity: Tensor | None,
        inputs: Sequence[Any],
        saved: Sequence[Any],
    ) -> list[Any]:
        """Gradients of q, k, v, rates, momentum and decay means, the start, and theta side by side."""
        s, unused = plan.shapes, plan.like
        q, k, v, rates, momentum, decay = inputs
        cast, states, velocities, iterates, squares = saved
        zero = plan.no_velocity
        rate = unused if rates is None else rates
        both = None if cast is None else torch.cat(cast.unbind(0), dim=-1)

        by_runs: Any = None
        if s.theta is None:
            dq = plan.tokens(self.queries)
            self.from_output(stream, d_output, states, dq, unused, unused, unused)
            parts = plan.matrices(plan.batch * self.reads)
            self.to_states(stream, q, d_output, parts)
        else:
            dh, seen = plan.tokens(plan.hiddens), plan.tokens(plan.hiddens)
            self.from_output(stream, d_output, states, dh, unused, unused, unused)
            du = plan.tokens(self.joined)
            self.query_features(stream, q, cast, dh, seen, du, unused, unused)
            del dh
            parts = plan.matrices(plan.batch * self.reads)
            self.to_states(stream, seen, d_output, parts)
            del seen
            dq = plan.tokens(self.queries)
            self.to_keys(stream, du, both, dq, unused, unused, unused)
            by_runs = self._theta(plan)
            self.query_theta(stream, q, du, by_runs[0])
            del du

        d_state = plan.wide.new_empty((plan.batch, plan.heads, plan.hidden, plan.value_width))
        nothing = zeros(plan.device, plan.batch * plan.heads * plan.size)
        d_end = nothing if d_end is None else ready(d_end)
        d_end_velocity = nothing if d_end_velocity is None else ready(d_end_velocity)
        counts = (blocks_of(plan.size), plan.batch, plan.complete, plan.heads)
        d_momentum = plan.wide.new_empty(counts) if momentum is not None else None
        d_decay = plan.wide.new_empty(counts) if decay is not None else None
        d_velocity = plan.matrices(plan.batch) if momentum is not None else unused
        m, r = unused if momentum is None else momentum, unused if decay is None else decay
        held = unused if velocities is None else velocities
        dm, dr = unused if d_momentum is None else d_momentum, unused if d_decay is None else d_decay
        if plan.staged:
            d_shaped = plan.matrices(plan.chunks)
            self.states_scan(
                stream, parts, unused, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                d_shaped, d_state, unused, unused, dr,
            )  # fmt: skip
            out_dtype = plan.dtype if momentum is None else torch.float32
            d_writes = plan.orthogonal(True).backward(stream, (iterates, squares), d_shaped, out_dtype)
            if momentum is not None:
                d_moved, d_writes = d_writes, plan.matrices(plan.chunks, unused)
                self.moving_scan(
                    stream, d_moved, unused, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                    d_writes, unused, d_velocity, dm, unused,
                )  # fmt: skip
        else:
            d_writes = plan.matrices(plan.chunks, unused)
            self.states_scan(
                stream, parts, unused, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                d_writes, d_state, d_velocity, dm, dr,
            )  # fmt: skip
        del parts

        d_rates: Tensor | None = None
        dv = plan.tokens(self.values)
        if s.theta is None:
            dk = plan.tokens(self.keys)
            sums = unused if rates is None else self._sums(plan, plan.key_width, 128)
            self.from_values(stream, v, d_writes, dk, k, rate, sums)
            self.to_values(stream, k, d_writes, dv, unused, rate, unused)
        else:
            dh, written = plan.tokens(plan.hiddens), plan.tokens(plan.hiddens)
            self.from_values(stream, v, d_writes, dh, unused, unused, unused)
            du = plan.tokens(self.joined)
            sums = unused if rates is None else self._sums(plan, plan.hidden, 64)
            self.key_features(stream, k, cast, dh, written, du, rate, sums)
            del dh
            self.to_values(stream, written, d_writes, dv, unused, unused, unused)
            del written
            dk = plan.tokens(self.keys)
            self.to_keys(stream, du, both, dk, unused, unused, unused)
            self.key_theta(stream, k, du, by_runs[1])
        if rates is not None:
            d_rates = sums.sum(-1)
        if not plan.whole:
            for x in (dk, dv, d_rates):
                if x is not None:
                    x[:, plan.complete * s.chunk :].zero_()
        d_momentum, d_decay = (None if x is None else x.sum(0) for x in (d_momentum, d_decay))
        d_theta = None if by_runs is None else by_runs.sum((0, 2))
        return [dq, dk, dv, d_rates, d_momentum, d_decay, d_state, d_theta]

    def _sums(self, plan: LaunchPlan, width: int, tile: int) -> Tensor:
        return plan.wide.new_empty((plan.batch, plan.length, plan.heads, cdiv(width, tile)))

    def _theta(self, plan: LaunchPlan) -> Tensor:
        """Room for the gradient of theta by way of queries and of keys, in parts, `[2, sets, parts, H, D, count * F]`."""
        theta = plan.shapes.theta
        assert theta is not None
        parts = plan.batch * self.runs // theta.sets
        shape = (2, theta.sets, parts, plan.heads, plan.key_width, theta.factors * plan.hidden)
        return plan.wide.new_empty(shape)
