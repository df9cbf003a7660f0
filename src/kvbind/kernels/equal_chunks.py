"""The chunkwise parallel form of sequences of one length: what `kvbind.kernels.chunked` computes, planned once.

A `Plan` holds every launch of a forward and of a backward call, bound to shapes, strides and dtypes. A call like an earlier
one allocates its results and launches; nothing is derived again. Products are those of `kvbind.kernels.tma_products`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvbind.kernels import direct
from kvbind.kernels import tma_products as products
from kvbind.kernels.ahead import can_rehearse, compiling_ahead
from kvbind.kernels.bound import Bound, stream_of
from kvbind.kernels.common import cdiv, on_device_of
from kvbind.kernels.newton_schulz import newton_schulz_backward, newton_schulz_forward
from kvbind.kernels.scans import blocks_of, bound_scan, bound_scan_backward
from kvbind.kernels.tma_products import Rows, Theta

RUNS = 8
"""Into how many parts the sum of a shared matrix's gradient over a sequence's tokens is cut."""


@dataclass(frozen=True)
class Shapes:
    """What one call's launches depend on; its tensors come later.

    Attributes:
        q: queries.
        k: keys, of as many tokens.
        v: values.
        chunk: tokens in a chunk, a multiple of `DEPTH`. The last chunk may be incomplete, unless `own`; it does not write.
        own: queries see their own chunk's write.
        sign: 1 for descent, -1 for ascent.
        theta: the matrices before the last, or None for features that are the keys themselves.
        start: strides of sequence and head of the state to start from, `[B, H, F, Dv]`.
        rates: strides of the rates, float32 `[B, T, H]`; None for 1.
        momentum: there are momentum gates; the buffer starts from zeros.
        retention: there are retention gates.
        coefficients: Newton-Schulz's; empty for no orthogonalization.
        precision: of its products.
    """

    q: Rows
    k: Rows
    v: Rows
    chunk: int
    own: bool
    sign: float
    theta: Theta | None
    start: tuple[int, int]
    rates: tuple[int, ...] | None
    momentum: bool
    retention: bool
    coefficients: tuple[tuple[float, float, float], ...]
    precision: torch.dtype


@cache
def zeros(device: torch.device, count: int) -> Tensor:
    """float32 zeros, the same for all plans; never written."""
    return torch.zeros(count, device=device)


_met: set[tuple[Any, ...]] = set()


def compiled_first(kind: tuple[Any, ...], body: Callable[..., Any], *args: Any) -> Any:
    """What `body` returns; before its first call of a kind all that it launches is compiled, in threads."""
    if kind not in _met and can_rehearse(args):
        with compiling_ahead():
            body(*args)
        _met.add(kind)
    return body(*args)


def ready(x: Tensor) -> Tensor:
    """A gradient as launches take it: contiguous, at an address that is a multiple of 16."""
    return x if x.is_contiguous() and not x.data_ptr() % 16 else x.clone(memory_format=torch.contiguous_format)


class LibraryWrite:
    """`tma_products.write` as one product of the vendor's library, for chunks that lie one after another, head by head.

    Args:
        x: the left factor.
        g: the right one.
        chunk: tokens in a chunk; a sequence has a whole number of them.
    """

    def __init__(self, x: Rows, g: Rows, chunk: int) -> None:
        count = math.prod(x.shape[:3]) // chunk
        self.left = (count, x.shape[3], chunk), (chunk * x.shape[3], 1, x.shape[3])
        self.right = (count, chunk, g.shape[3]), (chunk * g.shape[3], g.shape[3], 1)
        self.shape = count, x.shape[3], g.shape[3]

    @staticmethod
    def fits(like: Tensor, *tokens: Rows) -> bool:
        """Whether the library is there for tensors like one, and tokens lie head by head, without gaps."""
        return like.is_cuda and all(x.strides == x.by_head(x.shape[3]).strides for x in tokens)

    def __call__(self, stream: int, x: Any, g: Any, y: Any) -> None:
        """Write to y, float32, sequences outermost, then heads; the stream is the current one."""
        torch.bmm(x.as_strided(*self.left), g.as_strided(*self.right), out_dtype=torch.float32, out=y.view(self.shape))


class Plan:
    """The launches of calls of some shapes.

    Args:
        shapes: of the calls.
        like: a tensor of their dtype on their device.
    """

    def __init__(self, shapes: Shapes, like: Tensor) -> None:
        s, self.shapes, self.dtype, self.device = shapes, shapes, like.dtype, like.device
        self.index = like.device.index if like.is_cuda else -1
        self.batch, self.length, self.heads, self.key_width = s.q.shape
        self.value_width = s.v.shape[3]
        self.hidden = s.theta.hidden if s.theta else self.key_width
        self.complete = self.length // s.chunk
        self.chunks, self.states = self.batch * self.complete, self.complete + 1
        self.whole = self.complete * s.chunk == self.length
        self.size = self.hidden * self.value_width
        self.like = like.new_empty(0)
        self.staged = bool(s.coefficients)
        self.others: dict[Any, Plan] = {}
        self.sequences = self._table(
            [(b * self.complete, self.complete, self.complete, b * self.states) for b in range(self.batch)]
        )
        self.single = self._table([(c, 1) for c in range(self.chunks)])
        self.no_velocity = zeros(self.device, self.size) if s.momentum else None

        output = s.v.like(self.value_width)
        seen = s.q if s.theta is None else s.q.like(self.hidden)
        # the vendor's library is faster where it takes the operands; Newton-Schulz's gradients want chunks outermost
        self.by_head = self.whole and (s.momentum or not self.staged) and LibraryWrite.fits(like, s.k, s.v)
        self.written = s.k.by_head(self.hidden) if self.by_head else s.k.like(self.hidden)
        written = s.k if s.theta is None and s.rates is None else self.written
        self.read = products.product(seen, output, s.chunk, self.states, like, own=s.own)
        self.write: LibraryWrite | Bound
        if self.by_head:
            self.write = LibraryWrite(written, s.v, s.chunk)
        else:
            self.write = products.write(written, s.v, s.chunk, self.complete, like)
        if s.theta is not None:
            self.query_features = products.features(s.q, s.theta, like)
            self.key_features = products.features(s.k, s.theta, like, s.rates, self.written)
        elif s.rates is not None:
            self.rated_keys = products.rated(s.k, s.rates, self.written)

    def _table(self, entries: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32, device=self.device)

    def tokens(self, width: int) -> Tensor:
        """Room for contiguous tokens of a width."""
        return torch.empty((self.batch, self.length, self.heads, width), dtype=self.dtype, device=self.device)

    def matrices(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for matrices of the last layer's shape."""
        shape = (count, self.heads, self.hidden, self.value_width)
        return torch.empty(shape, dtype=dtype, device=self.device)

    @cached_property
    def scans(self) -> list[Bound]:
        """Of the forward pass: momentum and states in one, or each in its own with Newton-Schulz between them."""
        s = self.shapes
        moving: dict[str, Any] = {"momentum": s.momentum, "velocity": (0, 0)}
        stated: dict[str, Any] = {"state": s.start, "retention": s.retention}
        kinds = [moving, stated] if self.staged else [moving | stated]
        return [
            bound_scan(
                self.batch, self.heads, self.size, sign=s.sign, keep="momentum" in kind and s.momentum,
                by_head=self.complete if self.by_head and kind is kinds[0] else 0, **kind,
            )
            for kind in kinds
        ]  # fmt: skip

    def forward(
        self,
        stream: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        retention: Tensor | None,
        start: Tensor,
        theta: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """Outputs `[B, T, H, Dv]`, the state and the momentum buffer after the last complete chunk, and what is kept.

        Args:
            stream: of the device.
            q: queries `[B, T, H, Dk]`.
            k: keys `[B, T, H, Dk]`.
            v: values `[B, T, H, Dv]`.
            rates: as `Shapes` has them.
            momentum: chunk means of the gates, float32 `[chunks, H]`, contiguous.
            retention: likewise.
            start: float32 `[B or 1, H, F, Dv]`, matrices contiguous.
            theta: the other matrices, `[B or 1, H, D, F]` each.
            keep: keep what the backward pass needs.
        """
        s, unused = self.shapes, self.like
        cast: Any = None
        seen, written = q, k
        if s.theta is not None:
            cast = torch.stack(tuple(theta)).to(self.dtype)
            written = self.written.empty(self.like)
            self.key_features(stream, k, cast, written, unused if rates is None else rates)
        elif rates is not None:
            written = self.written.empty(self.like)
            self.rated_keys(stream, k, rates, written)
        parts = self.matrices(self.chunks)
        self.write(stream, written, v, parts)
        del written
        end = self.matrices(self.batch)
        end_velocity = self.matrices(self.batch) if s.momentum else None
        states = self.matrices(self.batch * self.states, self.dtype)
        velocities: Any = None
        iterates: Any = None
        squares: Any = None
        m, r = unused if momentum is None else momentum, unused if retention is None else retention
        zero, moved = (
            unused if self.no_velocity is None else self.no_velocity,
            unused if end_velocity is None else end_velocity,
        )
        if self.staged:
            if momentum is not None:
                velocities = self.matrices(self.chunks)
                self.scans[0](
                    stream, parts, self.single, m, r, zero, unused, self.sequences, velocities, unused, moved, unused
                )
                parts = velocities
            shaped, (iterates, squares) = newton_schulz_forward(
                parts, s.coefficients, s.precision, keep, out_dtype=s.precision
            )
            self.scans[1](stream, shaped, self.single, m, r, zero, start, self.sequences, unused, states, moved, end)
        else:
            velocities = self.matrices(self.chunks) if keep and momentum is not None else None
            scan = self.scans[0] if velocities is not None or momentum is None else self.forgetful_scan
            scan(
                stream, parts, self.single, m, r, zero, start, self.sequences,
                unused if velocities is None else velocities, states, moved, end,
            )  # fmt: skip
        del parts
        if s.theta is not None:
            seen = self.tokens(self.hidden)
            self.query_features(stream, q, cast, seen, unused)
        output = self.tokens(self.value_width)
        self.read(stream, seen, states, output, unused, unused, unused)
        kept = [cast, states, velocities, iterates, squares] if keep else []
        return output, end, end_velocity, kept

    def means(self, gate: Tensor | None) -> Tensor | None:
        """A gate `[B, T, H]` averaged over each complete chunk, `[chunks, H]`."""
        if gate is None:
            return None
        inside = gate if self.whole else gate[:, : self.complete * self.shapes.chunk]
        return inside.unflatten(1, (self.complete, self.shapes.chunk)).mean(2, dtype=torch.float32).flatten(0, 1)

    def spread(self, mean: Tensor) -> Tensor:
        """The gradient of a gate `[B, T, H]` from that of its means."""
        chunk = self.shapes.chunk
        each = (mean / chunk).unflatten(0, (self.batch, self.complete))[:, :, None]
        tokens = each.expand(-1, -1, chunk, -1).flatten(1, 2)
        return tokens if self.whole else F.pad(tokens, (0, 0, 0, self.length - tokens.shape[1]))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        retention: Tensor | None,
        start: Tensor,
        theta: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs `[B, T, H, Dv]`, and the state and the momentum buffer after the last complete chunk; differentiable once.

        Args:
            q: queries `[B, T, H, Dk]`.
            k: keys `[B, T, H, Dk]`.
            v: values `[B, T, H, Dv]`.
            rates: float32 `[B, T, H]`, or None.
            momentum: gates, float32 `[B, T, H]`, or None.
            retention: likewise.
            start: float32 `[H, F, Dv]` or `[B, H, F, Dv]`, matrices contiguous.
            theta: the other matrices, float32 `[H, D, F]` or `[B, H, D, F]`.
        """
        with on_device_of(q):
            tensors = (q, k, v, rates, momentum, retention, start, *theta)
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
                output, end, *velocity = _Planned.apply(self, *tensors)
                return output, end, velocity[0] if velocity else None
            output, end, moved, _ = self.evaluated(q, k, v, rates, momentum, retention, start, theta, False)
            return output, end, moved

    def evaluated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        retention: Tensor | None,
        start: Tensor,
        theta: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """`forward` of gates `[B, T, H]` on the current stream; keeps the gates' means too where it keeps anything."""
        with direct.marked("equal_chunks"):
            m, r = self.means(momentum), self.means(retention)
            output, end, moved, kept = compiled_first(
                self.kind("forward"), self.forward, stream_of(self.index), q, k, v, rates, m, r, start, theta, keep
            )
        return output, end, moved, [m, r, *kept]

    def kind(self, part: str) -> tuple[Any, ...]:
        """All that compilation depends on: not how many tokens and sequences there are, nor where they lie."""
        s = self.shapes
        theta = s.theta and s.theta._replace(sets=1)
        flags = self.by_head, s.own, s.rates is None, s.momentum, s.retention, s.chunk, s.coefficients, s.precision
        return part, self.dtype, self.device, self.heads, self.key_width, self.value_width, theta, *flags

    def of_saved(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor | None) -> Plan:
        """This plan, or its like for tensors that hooks of autograd saved and brought back with other strides."""
        s = self.shapes
        found = (q.stride(), k.stride(), v.stride(), None if rates is None else rates.stride())
        if found == (s.q.strides, s.k.strides, s.v.strides, s.rates):
            return self
        if found not in self.others:
            self.others[found] = Plan(replace(s, q=Rows.of(q), k=Rows.of(k), v=Rows.of(v), rates=found[3]), self.like)
        return self.others[found]

    @cached_property
    def forgetful_scan(self) -> Bound:
        """Momentum and states in one, of which nothing is kept."""
        s = self.shapes
        return bound_scan(
            self.batch, self.heads, self.size, sign=s.sign, keep=False, momentum=s.momentum, velocity=(0, 0),
            state=s.start, retention=s.retention, by_head=self.complete if self.by_head else 0,
        )  # fmt: skip

    @cached_property
    def backward_launches(self) -> Backward:
        """Those of the backward pass, bound when there is one."""
        return Backward(self)


class Backward:
    """The launches of the backward pass of a plan."""

    def __init__(self, plan: Plan) -> None:
        s, like = plan.shapes, plan.like
        output = s.v.like(plan.value_width)
        hiddens, keys = s.q.like(plan.hidden), s.k.like(plan.key_width)
        reads = cdiv(plan.length, s.chunk)
        self.to_states = products.write(s.q if s.theta is None else hiddens, output, s.chunk, reads, like)
        # the partial sums of each state row's gradient: those of the chunk that read it
        rows = []
        for b in range(plan.batch):
            for row in range(plan.states):
                chunk = row - s.own
                there = 0 <= chunk < reads
                rows.append((b * reads + (chunk if there else 0), int(there)))
        self.row_pieces = plan._table(rows)
        self.from_output = products.product(
            output, hiddens if s.theta else keys, s.chunk, plan.states, like, own=s.own, transposed=True
        )
        self.from_values = products.product(
            s.v, hiddens if s.theta else keys, s.chunk, plan.complete, like, transposed=True,
            rates=None if s.theta else s.rates, against=None if s.theta or s.rates is None else s.k,
        )  # fmt: skip
        self.to_values = products.product(
            hiddens if s.theta else s.k, output, s.chunk, plan.complete, like, rates=None if s.theta else s.rates
        )
        if s.theta is not None:
            theta = s.theta
            self.query_features = products.features_backward(s.q, theta, like)
            self.key_features = products.features_backward(s.k, theta, like, s.rates)
            joined = s.q.like(theta.factors * plan.hidden)
            # one set of matrices for all sequences is met as one long sequence
            batch, length = (1, plan.batch * plan.length) if theta.sets == 1 else (plan.batch, plan.length)
            flat = Rows((batch, length, *joined.shape[2:]), (length * joined.strides[1], *joined.strides[1:]))
            keys_flat = Rows((batch, length, *keys.shape[2:]), (length * keys.strides[1], *keys.strides[1:]))
            self.to_keys = products.product(flat, keys_flat, products.DEPTH * 4, 1, like, transposed=True)
            run = cdiv(cdiv(plan.length, RUNS), products.DEPTH) * products.DEPTH
            self.runs = cdiv(plan.length, run)
            self.query_theta = products.write(s.q, joined, run, self.runs, like)
            # tokens of an incomplete chunk have written nothing, whatever they hold
            inside = plan.complete * s.chunk
            self.key_theta = products.write(s.k.first(inside), joined.first(inside), run, self.runs, like)
        moving: dict[str, Any] = {"momentum": s.momentum, "velocity": (0, 0), "retention": False}
        shape = plan.batch, plan.heads, plan.size
        if plan.staged:
            self.states_scan = bound_scan_backward(
                *shape, chunks=plan.chunks, sign=s.sign, stated=True, momentum=False, velocity=(0, 0), retention=s.retention
            )
            self.moving_scan = bound_scan_backward(*shape, chunks=plan.chunks, sign=s.sign, stated=False, **moving)
        else:
            self.states_scan = bound_scan_backward(
                *shape, chunks=plan.chunks, sign=s.sign, stated=True, **(moving | {"retention": s.retention})
            )

    def run(
        self,
        plan: Plan,
        stream: int,
        d_output: Tensor,
        d_end: Tensor | None,
        d_end_velocity: Tensor | None,
        inputs: Sequence[Any],
        kept: Sequence[Any],
    ) -> list[Any]:
        """Gradients of q, k, v, rates, momentum and retention means, the start, and theta side by side."""
        s, unused = plan.shapes, plan.like
        q, k, v, rates, momentum, retention = inputs
        cast, states, velocities, iterates, squares = kept
        zero = unused if plan.no_velocity is None else plan.no_velocity
        rate = unused if rates is None else rates
        both = None if cast is None else torch.cat(cast.unbind(0), dim=-1)

        d_theta: Any = None
        if s.theta is None:
            dq = plan.tokens(plan.key_width)
            self.from_output(stream, d_output, states, dq, unused, unused, unused)
            parts = torch.empty(self.to_states_shape(plan), device=plan.device)
            self.to_states(stream, q, d_output, parts)
        else:
            dh, seen = plan.tokens(plan.hidden), plan.tokens(plan.hidden)
            self.from_output(stream, d_output, states, dh, unused, unused, unused)
            du = plan.tokens(s.theta.factors * plan.hidden)
            self.query_features(stream, q, cast, dh, seen, du, unused, unused)
            del dh
            parts = torch.empty(self.to_states_shape(plan), device=plan.device)
            self.to_states(stream, seen, d_output, parts)
            del seen
            dq = plan.tokens(plan.key_width)
            self.to_keys(stream, du, both, dq, unused, unused, unused)
            d_theta = self._theta(plan, stream, self.query_theta, q, du)
            del du

        d_state = plan.matrices(plan.batch)
        nothing = zeros(plan.device, plan.batch * plan.heads * plan.size)
        d_end = nothing if d_end is None else ready(d_end)
        d_end_velocity = nothing if d_end_velocity is None else ready(d_end_velocity)
        counts = (blocks_of(plan.size), plan.chunks, plan.heads)
        d_momentum = torch.empty(counts, device=plan.device) if momentum is not None else None
        d_retention = torch.empty(counts, device=plan.device) if retention is not None else None
        d_velocity = plan.matrices(plan.batch) if momentum is not None else unused
        m, r = unused if momentum is None else momentum, unused if retention is None else retention
        held = unused if velocities is None else velocities
        dm, dr = unused if d_momentum is None else d_momentum, unused if d_retention is None else d_retention
        if plan.staged:
            d_shaped = plan.matrices(plan.chunks)
            self.states_scan(
                stream, parts, self.row_pieces, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                d_shaped, d_state, unused, unused, dr,
            )  # fmt: skip
            out_dtype = plan.dtype if momentum is None else torch.float32
            d_writes = newton_schulz_backward(
                (iterates, squares), d_shaped, s.coefficients, s.precision, out_dtype=out_dtype
            )
            if momentum is not None:
                d_moved, d_writes = d_writes, plan.matrices(plan.chunks, plan.dtype)
                self.moving_scan(
                    stream, d_moved, self.row_pieces, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                    d_writes, unused, d_velocity, dm, unused,
                )  # fmt: skip
        else:
            d_writes = plan.matrices(plan.chunks, plan.dtype)
            self.states_scan(
                stream, parts, self.row_pieces, m, r, zero, held, states, plan.sequences, d_end, d_end_velocity,
                d_writes, d_state, d_velocity, dm, dr,
            )  # fmt: skip
        del parts

        d_rates: Tensor | None = None
        dv = plan.tokens(plan.value_width)
        if s.theta is None:
            dk = plan.tokens(plan.key_width)
            sums = unused if rates is None else self._sums(plan, plan.key_width, 128)
            self.from_values(stream, v, d_writes, dk, k, rate, sums)
            self.to_values(stream, k, d_writes, dv, unused, rate, unused)
        else:
            dh, written = plan.tokens(plan.hidden), plan.tokens(plan.hidden)
            self.from_values(stream, v, d_writes, dh, unused, unused, unused)
            du = plan.tokens(s.theta.factors * plan.hidden)
            sums = unused if rates is None else self._sums(plan, plan.hidden, 64)
            self.key_features(stream, k, cast, dh, written, du, rate, sums)
            del dh
            self.to_values(stream, written, d_writes, dv, unused, unused, unused)
            del written
            dk = plan.tokens(plan.key_width)
            self.to_keys(stream, du, both, dk, unused, unused, unused)
            d_theta = d_theta + self._theta(plan, stream, self.key_theta, k, du)
        if rates is not None:
            d_rates = sums.sum(-1)
        if not plan.whole:
            for x in (dk, dv, d_rates):
                if x is not None:
                    x[:, plan.complete * s.chunk :].zero_()
        d_momentum, d_retention = (None if x is None else x.sum(0) for x in (d_momentum, d_retention))
        return [dq, dk, dv, d_rates, d_momentum, d_retention, d_state, d_theta]

    def to_states_shape(self, plan: Plan) -> tuple[int, ...]:
        """The shape of the partial sums of the states' gradients."""
        reads = cdiv(plan.length, plan.shapes.chunk)
        return (plan.batch * reads, plan.heads, plan.hidden, plan.value_width)

    def _sums(self, plan: Plan, width: int, tile: int) -> Tensor:
        shape = (plan.batch, plan.length, plan.heads, cdiv(width, tile))
        return torch.empty(shape, device=plan.device)

    def _theta(self, plan: Plan, stream: int, launch: Bound, x: Tensor, du: Tensor) -> Tensor:
        """The gradient of theta, matrices side by side, `[sets, H, D, count * F]`."""
        theta = plan.shapes.theta
        assert theta is not None
        shape = (plan.batch * self.runs, plan.heads, plan.key_width, theta.factors * plan.hidden)
        found = torch.empty(shape, device=plan.device)
        launch(stream, x, du, found)
        return found.unflatten(0, (theta.sets, -1)).sum(1)


class _Planned(torch.autograd.Function):
    """A plan with its gradients."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Any) -> tuple[Tensor, ...]:
        q, k, v, rates, momentum, retention, start, *theta = tensors
        output, end, velocity, kept = plan.evaluated(q, k, v, rates, momentum, retention, start, theta, True)
        ctx.save_for_backward(q, k, v, rates, *kept)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.shapes = plan, [None if x is None else x.shape for x in tensors]
        return (output, end) if velocity is None else (output, end, velocity)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_end: Tensor | None, d_velocity: Tensor | None = None) -> Any:
        saved = [x if x is None or not x.data_ptr() % 16 else x.clone() for x in ctx.saved_tensors]
        plan = ctx.plan.of_saved(*saved[:4])
        d_output = plan.tokens(plan.value_width).zero_() if d_output is None else ready(d_output)
        with direct.marked("equal_chunks_backward"):
            dq, dk, dv, d_rates, d_momentum, d_retention, d_start, d_theta = compiled_first(
                plan.kind("backward"), plan.backward_launches.run, plan, stream_of(plan.index), d_output, d_end, d_velocity,
                saved[:6], saved[6:],
            )  # fmt: skip
            gates = [None if x is None else plan.spread(x) for x in (d_momentum, d_retention)]
        start = ctx.shapes[6]
        if len(start) == 3:
            d_start = d_start.sum(0) if plan.batch > 1 else d_start[0]
        found = [] if d_theta is None else [x.reshape(ctx.shapes[7]) for x in d_theta.split(plan.hidden, dim=-1)]
        return None, dq, dk, dv, d_rates, *gates, d_start, *found
