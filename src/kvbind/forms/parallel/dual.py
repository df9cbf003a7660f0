"""The dual form of mini-batch inner loops: the tokens of a span at once, span after span, whatever is updated.

Between two points at which gradients are renewed every gradient is taken at the same weights, so that it is known before
the span's first update. Each of its tokens writes `x_i^T d_i` into a matrix: what came into the layer, and the negative
gradient of the loss by what left it. What token t sees of a matrix is then, as in `kvbind.forms.parallel.affine`,

    M_t = b_t M_s + f_t D_s + sum_(j <= t) G_tj r_j x_j^T d_j

with products of gates as coefficients, and a layer's output is `h M_t` without any matrix per token: a read of `M_s` and
`D_s`, and attention of the layer's inputs to those of the keys. Layer by layer this is the dual form of TTT-Linear and
TTT-MLP (arXiv 2407.04620), here with momentum, decay, windows and rates of steps and readers besides. A bias is a matrix
behind an input of ones, and so is a head's fast gamma.

Across spans nothing is associative, as the next gradients read the state nonlinearly: spans run in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvbind.forms.parallel.affine import left_by
from kvbind.forms.parallel.affine_blocks import BlockLayout, Part, parts
from kvbind.forms.parallel.affine_flow import Move, Rows, apart, flow_of
from kvbind.forms.parallel.affine_operands import AffineRule, Columns, Gates, behind, check
from kvbind.forms.parallel.finite import seen_product

Weights = Mapping[str, Tensor]
Rates = Mapping[str, Tensor | float]
Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""A function of one number, and its derivative."""


class Head(Protocol):
    """What stands behind a last layer; vectors of weights are `[..., 1, Dv]`, or `[..., T, Dv]` with one for each token."""

    @property
    def where(self) -> str:
        """The head is in the "loss", in what outputs "read", or in "both"."""

    @property
    def fast(self) -> bool:
        """Its gamma is updated."""

    def apply(self, weights: Weights, z: Tensor, x: Tensor) -> Tensor:
        """The network's output from the last layer's, `[..., T, Dv]`, and the network's input."""

    def pull(self, weights: Weights, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`-dL/dz` from `g = -dL/df`, and each token's `-dL/dgamma`, `[..., T, Dv]` both."""


@dataclass(frozen=True)
class Layers:
    """A network of layers one behind the other.

    Attributes:
        names: of the matrices `[B, H, in, out]`, last one last. A bias of "M" is "M.bias", `[B, H, 1, out]`.
        activation: what stands between two layers, and its slope; None for nothing.
        bias: layers have biases.
        head: what stands behind the last layer, or None. Its weights are "gamma" and maybe "beta".
    """

    names: tuple[str, ...]
    activation: Activation | None = None
    bias: bool = False
    head: Head | None = None

    def apply(self, layer: Callable[[str, Tensor], Tensor], vectors: Weights, x: Tensor) -> Tensor:
        """What outputs read.

        Args:
            layer: what a layer, by name, makes of its input, bias included.
            vectors: weights of the head.
            x: `[..., T, Dk]`.
        """
        h = x
        for name in self.names[:-1]:
            h = self._act(layer(name, h))
        z = layer(self.names[-1], h)
        return z if self.head is None or self.head.where == "loss" else self.head.apply(vectors, z, x)

    def writes(
        self, rule: AffineRule, weights: Weights, k: Tensor, e: Tensor, v: Tensor
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What tokens write into each weight: `x` and `d` of its negative gradient `x^T d`, by name.

        Args:
            rule: which loss.
            weights: where gradients are taken.
            k: keys `[..., T, Dk]`.
            e: what the squared loss reads in their place.
            v: values `[..., T, Dv]`.
        """
        inputs, before, z = self._forward(weights, k)
        in_loss = self.head is not None and self.head.where != "read"
        d = v
        if rule.loss == "squared":
            read = z if e is k else self._forward(weights, e)[2]
            if self.head is not None and in_loss:
                read = self.head.apply(weights, read, e)
            d = v - read
        found: dict[str, tuple[Tensor, Tensor]] = {}
        ones = k.new_ones(1, 1).expand(*k.shape[:-1], 1)
        if self.head is not None and in_loss:
            d, gamma = self.head.pull(weights, z, d)
            found["gamma"] = ones, gamma
        for i, name in reversed(list(enumerate(self.names))):
            found[name] = inputs[i], d
            found[f"{name}.bias"] = ones, d
            if i:
                d = d @ weights[name].mT
                d = d if self.activation is None else d * self.activation[1](before[i - 1])
        return found

    def _forward(self, weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What comes into each layer, what leaves all but the last, and what leaves the last."""
        inputs, left = [x], []
        for name in self.names:
            z = inputs[-1] @ weights[name]
            left.append(z + weights[f"{name}.bias"] if self.bias else z)
            if name != self.names[-1]:
                inputs.append(self._act(left[-1]))
        return inputs, left[:-1], left[-1]

    def _act(self, x: Tensor) -> Tensor:
        return x if self.activation is None else self.activation[0](x)


@dataclass(frozen=True)
class DualState:
    """What goes on from call to call.

    Attributes:
        weights: by name, those of layers and head, `[B, H, in, out]`.
        buffers: of each weight that is updated, as `AffineState` has them, `[B, H, W, in, out]`.
        recent: the last `rule.history` columns; None where there are none yet.
        rates: their learning rates by weight, `[B, H, rule.history]`.
    """

    weights: Weights
    buffers: Weights
    recent: Columns | None = None
    rates: Weights | None = None


def dual(
    rule: AffineRule, layers: Layers, q: Tensor, columns: Columns, rates: Rates, gates: Gates, state: DualState
) -> tuple[Tensor, DualState]:
    """Run tokens from a refresh point on, span after span.

    Computed in the weights' dtype, or in float32 where that is narrower.

    Args:
        rule: how columns enter the state and are read.
        layers: the network.
        q: what is read, `[B, H, N / writes, Dk]`.
        columns: N keys, values and what the squared loss reads, `[B, H, N, D]`; their own `rate` is not read.
        rates: learning rate of each weight that is updated, a number or `[B, H, N]`.
        gates: as in `affine`, none of them by key channel.
        state: the state at the first column, which is a refresh point.

    Returns:
        Outputs `[B, H, N / writes, Dv]`, and the state at the last refresh point, or with `refresh=None` after the last
        complete update.

    Raises:
        ValueError: gates that the rule excludes, or that differ from channel to channel.
    """
    updated = tuple(rates)
    check(rule, len(columns), gates, buffers_of(state.buffers))
    if gates.decay is not None and gates.decay.values.dim() != 3:
        raise ValueError(f"decay must be [B, H, S], one per head; got {list(gates.decay.values.shape)}")
    dtype = torch.promote_types(state.weights[layers.names[-1]].dtype, torch.float32)
    q, columns = q.to(dtype), columns.map(lambda x: x.to(dtype))
    each = {name: replace(columns, rate=rate).rates().to(dtype) for name, rate in rates.items()}
    if rule.history:
        columns = replace(columns, rate=1.0).after(state.recent, rule.history)
        earlier = state.rates or {}
        each = {name: behind(earlier.get(name), x, rule.history) for name, x in each.items()}
    weights = {name: x.to(dtype) for name, x in state.weights.items()}
    buffers = {name: state.buffers[name].to(dtype) for name in updated}
    run = _DualRun(rule, layers, weights, buffers)
    total, outputs, end, whole = len(columns) - rule.history, [], run, 0
    for part in parts(rule, total, gates, linear=False):
        layout = BlockLayout(rule, part, q.device)
        its = columns.map(layout.windows)
        its_rates = {name: layout.windows(x).unsqueeze(-1) for name, x in each.items()}
        output, run = run.part(
            layout, part, q[:, :, part.start // rule.writes : part.stop // rule.writes], its, its_rates, gates
        )
        outputs.append(output)
        if part.complete:
            end, whole = run, part.stop
    if gates.read_rate is not None and rule.refresh is None and end.renewed is not None:
        left, begun = left_by(rule, gates, whole), end.renewed
        moved = {name: begun[name] + left * (end.weights[name] - begun[name]) for name in updated}
        end = replace(end, weights=dict(end.weights) | moved)
    output = torch.cat(outputs, dim=2) if outputs else columns.v[:, :, :0]
    if not rule.history:
        return output, DualState(end.weights, end.buffers)
    window = slice(whole, whole + rule.history)
    held = {name: x[:, :, window] for name, x in each.items()}
    return output, DualState(end.weights, end.buffers, columns.span(window.start, window.stop), held)


def buffers_of(buffers: Weights) -> int:
    """How many buffers there are of each weight."""
    counts = [x.shape[2] for x in buffers.values()]
    return min(counts) if counts else 0


@dataclass(frozen=True)
class _DualRun:
    """A call under way.

    Attributes:
        rule, layers: of the call.
        weights, buffers: where it stands.
        renewed: weights at the last refresh point; None before the first.
    """

    rule: AffineRule
    layers: Layers
    weights: Weights
    buffers: Weights
    renewed: Weights | None = None

    def part(
        self, layout: BlockLayout, part: Part, q: Tensor, columns: Columns, rates: Mapping[str, Tensor], gates: Gates
    ) -> tuple[Tensor, _DualRun]:
        """Outputs `[B, H, R, Dv]` of one part, whose blocks `columns` and `rates` are, and where the call then stands."""
        gates, run, count = gates.of(self.rule, part, q.dtype), self, part.blocks
        k, v, e = columns.k, columns.v, columns.k if columns.e is None else columns.e
        # the shares of places and columns are those that features of one 1 take
        ones = k.new_ones(1, 1, 1, 1, 1)
        q = layout.blocks(q)
        flow = flow_of(
            self.rule,
            gates,
            layout,
            ones.expand(*k.shape[:-1], 1),
            buffers_of(self.buffers),
        )
        on_state, on_buffers, on_columns = flow.reads(ones.expand(*q.shape[:-1], 1), ones.expand(*k.shape[:-1], 1))
        decay = gates.decay.factor()[..., None] if self.rule.before and gates.decay is not None else None
        read_rate = None if gates.read_rate is None else gates.read_rate[..., None]
        tensors = (q, k, v, e, decay, read_rate, on_state, on_columns, *on_buffers, *rates.values())
        outputs = []
        for b, (move, its) in enumerate(
            zip(flow.moves(count), zip(*(apart(x, count) for x in tensors), strict=True), strict=True)
        ):
            its_q, its_k, its_v, its_e, its_decay, its_read_rate, *shares = its
            its_buffers, its_rates = shares[2 : 2 + len(on_buffers)], shares[2 + len(on_buffers) :]
            if part.renews == "all" or (part.renews == "first" and not b):
                run = replace(run, renewed=run.weights)
            ends = part.ends and (part.renews == "all" or b == count - 1)
            block = _Block(
                run,
                move,
                (shares[0], its_buffers, shares[1]),
                layout.seen,
                dict(zip(rates, its_rates, strict=True)),
                its_read_rate,
            )
            output, run = block.run(its_q, its_k, its_e if columns.e is not None else its_k, its_v, its_decay, ends)
            outputs.append(output)
        return torch.cat(outputs, dim=2), run


@dataclass(frozen=True)
class _Block:
    """One block of tokens whose gradients are all taken at the same weights.

    Attributes:
        start: where the call stands before it.
        move: how state and buffers move over it.
        shares: what its reads take of the state, of buffers and of columns: `[B, H, R, 1]`, such of each, `[B, H, R, L]`.
        seen: which columns each read sees, bool `[R, L]`.
        rates: learning rate of each weight that is updated, `[B, H, L, 1]`.
        read_rate: `[B, H, R, 1]`, or None.
    """

    start: _DualRun
    move: Move
    shares: Rows
    seen: Tensor
    rates: Mapping[str, Tensor]
    read_rate: Tensor | None

    def run(self, q: Tensor, k: Tensor, e: Tensor, v: Tensor, decay: Tensor | None, ends: bool) -> tuple[Tensor, _DualRun]:
        """Outputs, and where the call then stands; `decay` acts before the gradient, and `ends` says that a stretch does."""
        start, layers = self.start, self.start.layers
        assert start.renewed is not None
        at = start.renewed
        if decay is not None:
            at = dict(at) | {name: decay * at[name] for name in self.rates}
        found = layers.writes(start.rule, at, k, e, v)
        writes = {name: (found[name][0], rate * found[name][1]) for name, rate in self.rates.items()}

        def layer(name: str, h: Tensor) -> Tensor:
            z = self._read(writes, name, h)
            return z + self._read(writes, f"{name}.bias", ones) if layers.bias else z

        ones = q.new_ones(q.shape[-2], 1)
        vectors = {name: start.weights[name] for name in ("gamma", "beta") if name in start.weights}
        if "gamma" in writes:
            vectors["gamma"] = self._read(writes, "gamma", ones)
        output = layers.apply(layer, vectors, q)

        weights, buffers = dict(start.weights), dict(start.buffers)
        for name, (x, d) in writes.items():
            weights[name], buffers[name] = self.move.step(x, d, weights[name], buffers[name])
            if self.read_rate is not None and ends:
                weights[name] = at[name] + self.read_rate[:, :, -1:] * (weights[name] - at[name])
        return output, replace(start, weights=weights, buffers=buffers)

    def _read(self, writes: Mapping[str, tuple[Tensor, Tensor]], name: str, h: Tensor) -> Tensor:
        """What rows `[B, H, R, in]` read of a weight, each as it sees it."""
        weight = self.start.weights[name]
        if name not in writes:
            return h @ weight
        x, d = writes[name]
        on_state, on_buffers, on_columns = self.shares
        scores = torch.where(self.seen, on_columns * (h @ x.mT), 0.0)
        output = seen_product(scores, d, self.seen)
        for share, buffer in zip(on_buffers, self.start.buffers[name].unbind(2), strict=True):
            output = output + share * (h @ buffer)
        if self.read_rate is None:
            return output + on_state * (h @ weight)
        assert self.start.renewed is not None
        base = self.start.renewed[name]
        return h @ base + self.read_rate * (output + on_state * (h @ (weight - base)))
