"""The chunkwise parallel form of sequences of one length: what `kvbind.kernels.chunked` computes, planned once.

A `LaunchPlan` holds every launch of a forward and of a backward call, bound to shapes, strides and dtypes. A call like an
earlier one allocates its results and launches; nothing is derived again. Products are those of
`kvbind.kernels.equal_chunks.tma_products`, or the vendor's library's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvbind.kernels.chunked.prefix_sums import MatrixOrder, bound_scan
from kvbind.kernels.common.devices import multiprocessors, on_device_of
from kvbind.kernels.common.operands import filled, laid_out, zeros
from kvbind.kernels.equal_chunks import library_products
from kvbind.kernels.equal_chunks import tma_products as products
from kvbind.kernels.equal_chunks.call_shapes import CallShapes
from kvbind.kernels.equal_chunks.library_products import LibraryProduct, LibraryWrite
from kvbind.kernels.equal_chunks.tma_products import TokenRows
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.bound_kernel import BoundKernel, stream_of
from kvbind.kernels.launching.warm_up import can_warm_up, compiling_ahead
from kvbind.kernels.newton_schulz.operator import BoundNewtonSchulz

if TYPE_CHECKING:
    from kvbind.kernels.equal_chunks.backward import BackwardLaunches

_met: set[tuple[Any, ...]] = set()


class LaunchPlan:
    """The launches of calls of some shapes.

    Args:
        shapes: of the calls.
        like: a tensor of their dtype on their device.
    """

    def __init__(self, shapes: CallShapes, like: Tensor) -> None:
        s, self.shapes, self.dtype, self.device = shapes, shapes, like.dtype, like.device
        self.index = like.device.index if like.is_cuda else -1
        self.batch, self.length, self.heads, self.key_width = s.q.shape
        self.value_width = s.v.shape[3]
        self.hidden = s.theta.hidden if s.theta else self.key_width
        self.complete = self.length // s.chunk
        self.chunks = self.batch * self.complete
        self.whole = self.complete * s.chunk == self.length
        self.size = self.hidden * self.value_width
        # what room for others is asked of, which takes the host less than to name a dtype and a device
        self.like, self.wide = like.new_empty(0), like.new_empty(0, dtype=torch.float32)
        self.staged = bool(s.coefficients)
        self.lying = s.q.strides, s.k.strides, s.v.strides, s.rates
        self.met: set[str] = set()
        self.orthogonals: dict[bool, BoundNewtonSchulz] = {}
        self.no_velocity = zeros(self.device, self.size) if s.momentum else self.like

        # where the vendor's library takes the operands and is faster, everything lies head by head
        large = 2 * self.batch * self.length * self.heads * self.size >= library_products.LEAST
        self.by_head = self.whole and large and library_products.fits(like, s.q, s.k, s.v)
        last = s.own or not self.by_head
        self.states = self.complete + last
        self.order = MatrixOrder.by_head(self.complete, last) if self.by_head else MatrixOrder.by_chunk(self.heads)
        complete = self.complete
        self.sequences = torch.tensor(
            [(b * complete, complete, complete, b * self.states) for b in range(self.batch)],
            dtype=torch.int32, device=self.device,
        )  # fmt: skip
        self.output, self.hiddens = self.rows(s.v, self.value_width), self.rows(s.k, self.hidden)
        written = s.k if s.theta is None and s.rates is None else self.hiddens
        self.read = self.bound_product(s.q if s.theta is None else self.hiddens, self.output, states=self.states, own=s.own)
        self.write = self.bound_write(written, s.v, self.complete)
        if s.theta is not None:
            self.query_features = products.features(s.q, s.theta, like, out=self.hiddens)
            self.key_features = products.features(s.k, s.theta, like, s.rates, self.hiddens)
        elif s.rates is not None:
            self.rated_keys = products.rated(s.k, s.rates, self.hiddens)

    def rows(self, like: TokenRows, width: int) -> TokenRows:
        """As many tokens as others, of another width, in the order of this plan."""
        return like.by_head(width) if self.by_head else like.like(width)

    def bound_product(
        self,
        x: TokenRows,
        y: TokenRows,
        *,
        states: int,
        own: bool = False,
        transposed: bool = False,
        rates: Sequence[int] | None = None,
        against: TokenRows | None = None,
    ) -> LibraryProduct | BoundKernel:
        """Tokens times their chunk's matrix, as `tma_products.product` has it."""
        chunk = self.shapes.chunk
        if self.by_head and states == self.complete and rates is None and against is None:
            return LibraryProduct(x, y, chunk, transposed=transposed)
        return products.product(
            x,
            y,
            chunk,
            states,
            self.like,
            by_head=self.by_head,
            own=own,
            transposed=transposed,
            rates=rates,
            against=against,
        )

    def bound_write(self, x: TokenRows, g: TokenRows, parts: int) -> LibraryWrite | BoundKernel:
        """The sum over each chunk's tokens of `x^T g`, as `tma_products.write` has it."""
        chunk = self.shapes.chunk
        return LibraryWrite(x, g, chunk) if self.by_head else products.write(x, g, chunk, parts, self.like)

    def tokens(self, rows: TokenRows) -> Tensor:
        """Room for tokens."""
        return self.like.new_empty_strided(rows.shape, rows.strides)

    def matrices(self, count: int, like: Tensor | None = None) -> Tensor:
        """Room for matrices of the last layer's shape, so many of each head; float32, or of a tensor's dtype."""
        return (self.wide if like is None else like).new_empty((count * self.heads, self.hidden, self.value_width))

    @cached_property
    def scans(self) -> list[BoundKernel]:
        """Of the forward pass: momentum and states in one, or each in its own with Newton-Schulz between them."""
        s = self.shapes
        moving: dict[str, Any] = {"momentum": s.momentum}
        stated: dict[str, Any] = {"state": s.start, "decay": s.decay}
        kinds = [moving, stated] if self.staged else [moving | stated]
        return [
            bound_scan(self.batch, self.heads, self.size, self.order, sign=s.sign,
                       keep="momentum" in kind and s.momentum, **kind)
            for kind in kinds
        ]  # fmt: skip

    def orthogonal(self, keep: bool) -> BoundNewtonSchulz:
        """Newton-Schulz of all chunks' writes."""
        if keep not in self.orthogonals:
            s, shape = self.shapes, (self.chunks * self.heads, self.hidden, self.value_width)
            self.orthogonals[keep] = BoundNewtonSchulz(shape, s.coefficients, s.precision, keep, multiprocessors(self.like))
        return self.orthogonals[keep]

    def forward(
        self,
        stream: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        decay: Tensor | None,
        start: Tensor,
        theta: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """Outputs `[B, T, H, Dv]`, the state and the momentum buffer after the last complete chunk, and what is saved.

        Args:
            stream: of the device.
            q: queries `[B, T, H, Dk]`.
            k: keys `[B, T, H, Dk]`.
            v: values `[B, T, H, Dv]`.
            rates: as `CallShapes` has them.
            momentum: chunk means of the gates, float32 `[B, chunks, H]`, contiguous.
            decay: chunk means of the decay gates, the same.
            start: float32 `[B or 1, H, F, Dv]`, matrices contiguous.
            theta: the other matrices, `[B or 1, H, D, F]` each.
            keep: keep what the backward pass needs.
        """
        s, unused = self.shapes, self.like
        cast: Any = None
        seen, written = q, k
        if s.theta is not None:
            cast = torch.stack(tuple(theta)).to(self.dtype)
            written = self.tokens(self.hiddens)
            self.key_features(stream, k, cast, written, unused if rates is None else rates)
        elif rates is not None:
            written = self.tokens(self.hiddens)
            self.rated_keys(stream, k, rates, written)
        parts = self.matrices(self.chunks)
        self.write(stream, written, v, parts)
        del written
        shape = (self.batch, self.heads, self.hidden, self.value_width)
        end = self.wide.new_empty(shape)
        end_velocity = self.wide.new_empty(shape) if s.momentum else None
        states = self.matrices(self.batch * self.states, unused)
        velocities: Any = None
        iterates: Any = None
        squares: Any = None
        m, r = unused if momentum is None else momentum, unused if decay is None else decay
        zero, moved = self.no_velocity, unused if end_velocity is None else end_velocity
        if self.staged:
            if momentum is not None:
                velocities = self.matrices(self.chunks)
                self.scans[0](stream, parts, unused, m, r, zero, unused, self.sequences, velocities, unused, moved, unused)
                parts = velocities
            shaped, (iterates, squares) = self.orthogonal(keep).forward(stream, parts, s.precision)
            self.scans[1](stream, shaped, unused, m, r, zero, start, self.sequences, unused, states, moved, end)
        else:
            velocities = self.matrices(self.chunks) if keep and momentum is not None else None
            scan = self.scans[0] if velocities is not None or momentum is None else self.forgetful_scan
            scan(
                stream, parts, unused, m, r, zero, start, self.sequences,
                unused if velocities is None else velocities, states, moved, end,
            )  # fmt: skip
        del parts
        if s.theta is not None:
            seen = self.tokens(self.hiddens)
            self.query_features(stream, q, cast, seen, unused)
        output = self.tokens(self.output)
        self.read(stream, seen, states, output, unused, unused, unused)
        saved = [cast, states, velocities, iterates, squares] if keep else []
        return output, end, end_velocity, saved

    def means(self, gate: Tensor | None) -> Tensor | None:
        """A gate `[B, T, H]` averaged over each complete chunk, `[B, chunks, H]`."""
        if gate is None:
            return None
        b, t, h = gate.stride()
        chunk = self.shapes.chunk
        apart = gate.as_strided((self.batch, self.complete, chunk, self.heads), (b, t * chunk, t, h))
        return apart.mean(2, dtype=torch.float32)

    def spread(self, mean: Tensor) -> Tensor:
        """The gradient of a gate `[B, T, H]` from that of its means."""
        chunk = self.shapes.chunk
        tokens = (mean.unsqueeze(2) * filled(self.device, chunk, 1 / chunk).unsqueeze(1)).flatten(1, 2)
        return tokens if self.whole else F.pad(tokens, (0, 0, 0, self.length - tokens.shape[1]))

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        decay: Tensor | None,
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
            decay: decay gates, float32 `[B, T, H]`, or None.
            start: float32 `[H, F, Dv]` or `[B, H, F, Dv]`, matrices contiguous.
            theta: the other matrices, float32 `[H, D, F]` or `[B, H, D, F]`.
        """
        tensors = (q, k, v, rates, momentum, decay, start, *theta)
        with on_device_of(q):
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
                return _Planned.apply(self, *tensors)
            return self.evaluated(q, k, v, rates, momentum, decay, start, theta, False)[:3]

    def evaluated(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor | None,
        momentum: Tensor | None,
        decay: Tensor | None,
        start: Tensor,
        theta: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None]]:
        """`forward` of gates `[B, T, H]` on the current stream; keeps the gates' means too where it keeps anything."""
        with dispatcher.marked("equal_chunks"):
            m, r = self.means(momentum), self.means(decay)
            args = stream_of(self.index), q, k, v, rates, m, r, start, theta, keep
            if "forward" not in self.met:
                self.warm_up("forward", self.forward, args)
            output, end, moved, saved = self.forward(*args)
        return output, end, moved, [m, r, *saved]

    def warm_up(self, part: str, body: Callable[..., Any], args: Sequence[Any]) -> None:
        """Before the first call of a kind, compile all that `body` launches, in threads.

        A kind is all that compilation depends on: not how many tokens and sequences there are, nor where they lie.
        """
        self.met.add(part)
        s = self.shapes
        flags = self.by_head, s.own, s.rates is None, s.momentum, s.decay, s.chunk, s.coefficients, s.precision
        theta = s.theta and s.theta._replace(sets=1)
        kind = part, self.dtype, self.device, self.heads, self.key_width, self.value_width, theta, *flags
        if kind not in _met and can_warm_up(args):
            with compiling_ahead():
                body(*args)
            _met.add(kind)

    def like_saved(self, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What begins with q, k, v and rates as in the forward pass, also where hooks of autograd brought it otherwise."""
        pointers = 0
        for x in saved:
            if x is not None:
                pointers |= x.data_ptr()
        if not pointers % 16 and all(x is None or x.stride() == lies for x, lies in zip(saved, self.lying, strict=False)):
            return saved
        first = zip(saved, self.lying, strict=False)
        rest = [x if x is None or not x.data_ptr() % 16 else x.clone() for x in saved[len(self.lying) :]]
        return [x if x is None or lies is None else laid_out(x, lies) for x, lies in first] + rest

    @cached_property
    def forgetful_scan(self) -> BoundKernel:
        """Momentum and states in one, of which nothing is saved."""
        s = self.shapes
        return bound_scan(
            self.batch,
            self.heads,
            self.size,
            self.order,
            sign=s.sign,
            keep=False,
            momentum=s.momentum,
            state=s.start,
            decay=s.decay,
        )

    @cached_property
    def backward_launches(self) -> BackwardLaunches:
        """Those of the backward pass, bound when there is one."""
        from kvbind.kernels.equal_chunks.backward import BackwardLaunches

        return BackwardLaunches(self)


class _Planned(torch.autograd.Function):
    """A plan with its gradients."""

    @staticmethod
    def forward(ctx: Any, plan: LaunchPlan, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v, rates, momentum, decay, start, *theta = tensors
        output, end, velocity, saved = plan.evaluated(q, k, v, rates, momentum, decay, start, theta, True)
        ctx.save_for_backward(q, k, v, rates, *saved)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.shared, ctx.theta = plan, start.dim() == 3, (*theta[0].shape[:-1], len(theta), -1) if theta else ()
        return output, end, velocity

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        # what makes an error of a second differentiation costs as much as a launch
        return _differentiate_once(ctx, *gradients) if torch.is_grad_enabled() else _differentiate(ctx, *gradients)


def _differentiate(ctx: Any, d_output: Tensor | None, d_end: Tensor | None, d_velocity: Tensor | None) -> Any:
    plan = ctx.plan
    saved = plan.like_saved(ctx.saved_tensors)
    d_output = plan.tokens(plan.output).zero_() if d_output is None else laid_out(d_output, plan.output.strides)
    with dispatcher.marked("equal_chunks_backward"):
        args = plan, stream_of(plan.index), d_output, d_end, d_velocity, saved[:6], saved[6:]
        if "backward" not in plan.met:
            plan.warm_up("backward", plan.backward_launches.run, args)
        dq, dk, dv, d_rates, d_momentum, d_decay, d_start, d_theta = plan.backward_launches.run(*args)
        gates = [None if x is None else plan.spread(x) for x in (d_momentum, d_decay)]
    if ctx.shared:
        d_start = d_start.sum(0) if plan.batch > 1 else d_start[0]
    found = () if d_theta is None else d_theta.view(ctx.theta).unbind(-2)
    return None, dq, dk, dv, d_rates, *gates, d_start, *found


_differentiate_once = once_differentiable(_differentiate)
