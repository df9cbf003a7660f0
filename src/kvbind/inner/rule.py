"""The update rule of one write: the lines of section 1 of the specification, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from kvbind.inner.fields import Anchor
from kvbind.inner.losses import descent_direction
from kvbind.inner.network import Network, Rates, Weights
from kvbind.inner.spec import InnerLoop

NORM_EPS = 1e-5

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class FastWeights:
    """What the rule reads and writes; every tensor but those of `window` `[..., in, out]` with the same leading dimensions.

    Attributes:
        weights: every weight of the fast network.
        momentum: the momentum buffer of each updated weight; empty without momentum.
        norms: the starting norm of each output channel of each updated matrix; empty without normalization.
        accumulated: with `normalize="read"`, the weights that updates enter, of which `weights` are the normalized copy;
            empty otherwise.
        window: what a window holds of earlier writes. Over updates, of each updated weight the last `n - 1`,
            `[..., n - 1, in, out]`; over gradients, keys "k", values "v", rates "rates.M" and what else belongs to keys of
            the tokens of the last `n - 1` writes, `[..., (n - 1) chunk, D]`. Empty without a window.
        anchor: the anchor of each updated weight; empty without.
        importance: its importance; empty without.
        travelled: with `read_rate`, the sum of the span's updates so far, of which tokens see a share; empty otherwise.
    """

    weights: Weights
    momentum: Parts
    norms: Parts
    accumulated: Parts = field(default_factory=dict)
    window: Parts = field(default_factory=dict)
    anchor: Parts = field(default_factory=dict)
    importance: Parts = field(default_factory=dict)
    travelled: Parts = field(default_factory=dict)

    @staticmethod
    def start(spec: InnerLoop, weights: Weights, tokens: Parts | None = None) -> FastWeights:
        """The state of a sequence that has read nothing.

        Args:
            spec: the inner loop.
            weights: its starting weights.
            tokens: with a window over gradients, what it holds of tokens like the sequence's, by name, of any length.
        """
        # contiguous, where weights may be transposed, as kernels would only copy zeros to make them so
        zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
        updated = {name: weights[name] for name in spec.updated}
        matrices = {name: weights[name] for name in spec.network.matrices if name in updated}
        detach, earlier = () if spec.anchor is None else spec.anchor.detach, spec.window_size - 1
        window: dict[str, Tensor] = {}
        if earlier and spec.sums_updates:
            window = {name: torch.stack([zeros(x)] * earlier, dim=-3) for name, x in updated.items()}
        elif earlier and tokens is not None:
            room = earlier * (spec.chunk or 1)
            out = weights["out"]
            window = {name: out.new_zeros(len(out), x.shape[1], room, *x.shape[3:]) for name, x in tokens.items()}
        return FastWeights(
            weights=weights,
            momentum={name: zeros(x) for name, x in updated.items()} if spec.momentum else {},
            norms={name: starting_norm(spec, x) for name, x in matrices.items()} if spec.normalize else {},
            accumulated=updated if spec.normalize == "read" else {},
            window=window,
            anchor={name: x.detach() if "start" in detach else x for name, x in updated.items()} if spec.anchor else {},
            importance={name: torch.full_like(x, spec.anchor.start) for name, x in updated.items()} if spec.anchor else {},
        )

    def parts(self) -> dict[str, Parts]:
        """The groups of tensors, by name."""
        return {name: getattr(self, name) for name in PARTS}

    def map(self, change: Callable[[Tensor], Tensor]) -> FastWeights:
        """These weights with every tensor changed."""
        return FastWeights(**{part: {name: change(x) for name, x in group.items()} for part, group in self.parts().items()})

    def join(self, other: FastWeights, choose: Callable[[Tensor, Tensor], Tensor]) -> FastWeights:
        """Each tensor chosen from this one and its like in `other`."""
        theirs = other.parts()
        return FastWeights(
            **{
                part: {name: choose(x, theirs[part][name]) for name, x in group.items()}
                for part, group in self.parts().items()
            }
        )


PARTS = tuple(part.name for part in fields(FastWeights))


def channel_norm(network: Network, matrix: Tensor) -> Tensor:
    """The L2 norm of each output channel of a fast matrix; the input axes stay, with length 1."""
    return torch.linalg.vector_norm(matrix, dim=network.input_axes, keepdim=True)


def starting_norm(spec: InnerLoop, matrix: Tensor) -> Tensor:
    """What line 6 gives back to each output channel."""
    return channel_norm(spec.network, matrix.detach() if spec.detach_norms else matrix)


def gradient(
    spec: InnerLoop, weights: Weights, k: Tensor, v: Tensor, rates: Rates, erase: Tensor | None = None
) -> dict[str, Tensor]:
    """Line 1: the summed update of each weight, gradients taken at `weights`.

    Args:
        spec: the inner loop.
        weights: fast weights, `[..., in, out]`.
        k: keys `[..., T, Dk]`.
        v: values `[..., T, Dv]`.
        rates: learning rate of each updated weight, a number or `[..., T, 1]`.
        erase: where the residual reads, `[..., T, Dk]`; None for the keys.
    """
    network = spec.network
    prediction = network.predict(weights, k if erase is None else erase) if spec.loss == "squared" else None
    g = descent_direction(spec.loss, prediction, v)
    if network.gradients_lag:
        return network.pulled_back(weights, k, g, rates, spec.updated)
    return network.gradients(weights, k, g, rates, spec.updated)


def decayed(spec: InnerLoop, weights: Weights, gates: Parts) -> Weights:
    """Line 0: the weights that gradients see, where retention comes before them."""
    if not spec.decays_before:
        return weights
    return {name: gates["retention"] * x if name in spec.updated else x for name, x in weights.items()}


def shape_update(spec: InnerLoop, matrix: Tensor) -> Tensor:
    """Line 3: orthogonalize or clip one matrix's update."""
    return shape_updates(spec, {"out": matrix})["out"]


def shape_updates(spec: InnerLoop, updates: Parts) -> Parts:
    """Line 3 for all matrices, vectors staying; those of one shape, up to transposition, are orthogonalized as one batch."""
    if spec.clip:
        return {name: x / (channel_norm(spec.network, x) + 1) for name, x in updates.items()}
    if spec.orthogonalize is None:
        return updates
    shaped: dict[str, Tensor] = {}
    matrices = {name: x for name, x in updates.items() if name not in spec.network.vectors}
    wide = {name: x.mT if x.shape[-2] > x.shape[-1] else x for name, x in matrices.items()}
    # the axes before a matrix are those of every other
    for shape in dict.fromkeys(x.shape[-2:] for x in wide.values()):
        names = [name for name, x in wide.items() if x.shape[-2:] == shape]
        batch = spec.orthogonalize(torch.stack([wide[name] for name in names]))
        shaped |= dict(zip(names, batch.unbind(), strict=True))
    return dict(updates) | {
        name: shaped[name].mT if x.shape[-2:] != shaped[name].shape[-2:] else shaped[name] for name, x in matrices.items()
    }


def rescale(network: Network, matrix: Tensor, norm: Tensor) -> Tensor:
    """Line 6's factor: what takes each output channel of `matrix` to `norm`."""
    return norm / (channel_norm(network, matrix) + NORM_EPS)


def apply_update(spec: InnerLoop, state: FastWeights, updates: Parts, gates: Parts) -> FastWeights:
    """Lines 2 to 6': enter one write's summed gradients into the weights.

    Args:
        spec: the inner loop.
        state: what there was before.
        updates: line 1's result.
        gates: the write's gates by name, broadcastable to the weights.
    """
    momentum, retention, step_rate = (gates.get(name) for name in ("momentum", "retention", "step_rate"))
    if momentum is not None:
        updates = {name: g + momentum * state.momentum[name] for name, g in updates.items()}
    moved, window = updates, state.window
    if spec.sums_updates:
        held = {name: window[name].expand(*x.shape[:-2], -1, -1, -1) for name, x in updates.items()}
        window = {name: torch.cat((held[name][..., 1:, :, :], x.unsqueeze(-3)), dim=-3) for name, x in updates.items()}
        updates = {name: x + held[name].sum(-3) for name, x in updates.items()}
    weights, accumulated, anchors, importances = dict(state.weights), {}, {}, {}
    travelled: dict[str, Tensor] = {}
    for name, shaped in shape_updates(spec, updates).items():
        update = shaped if step_rate is None else step_rate * shaped
        signed = update if spec.sign > 0 else -update
        if spec.read_rate:
            travelled[name] = state.travelled[name] + signed
            continue
        matrix = state.accumulated.get(name, state.weights[name])
        if retention is not None:
            matrix = retention * matrix
        matrix = matrix + signed
        if spec.anchor is not None:
            importances[name] = importance(spec.anchor, state.importance[name], update, matrix, state.anchor[name])
            matrix = matrix - pull(spec.anchor, importances[name]) * (matrix - state.anchor[name])
        if spec.normalize == "read":
            accumulated[name] = matrix
        if name in state.norms:
            matrix = matrix * rescale(spec.network, matrix, state.norms[name])
        if spec.anchor is not None:
            anchors[name] = following(spec.anchor, state.anchor[name], accumulated.get(name, matrix))
        weights[name] = matrix
    return FastWeights(
        weights, moved if momentum is not None else {}, state.norms, accumulated, window, anchors, importances, travelled
    )


def importance(anchor: Anchor, before: Tensor, update: Tensor, matrix: Tensor, anchored: Tensor) -> Tensor:
    """Line 5', first: how important each weight has been."""
    if "importance" in anchor.detach:
        update, matrix, anchored = update.detach(), matrix.detach(), anchored.detach()
    if anchor.importance == "drift":
        new = (update * (matrix - anchored)).abs()
    else:
        new = update.abs() if anchor.importance == "absolute" else update.square()
    return anchor.decay * before + (1 - anchor.decay) * new


def pull(anchor: Anchor, importances: Tensor) -> Tensor:
    """Line 5', then: the share of the way to its anchor that each weight is drawn, `strength w(F)`."""
    if anchor.weight == "importance":
        return anchor.strength * importances
    axes = (-2, -1) if anchor.peak == "head" else tuple(range(importances.dim()))
    return anchor.strength * (1 - importances / (importances.amax(axes, keepdim=True) + 1e-8))


def following(anchor: Anchor, anchored: Tensor, matrix: Tensor) -> Tensor:
    """Line 6': the anchor after a write."""
    followed = matrix.detach() if "follow" in anchor.detach else matrix
    return anchor.follow * anchored + (1 - anchor.follow) * followed


def seen_share(state: FastWeights, share: Tensor) -> Weights:
    """With `read_rate`, the weights of which tokens see `share` of what the span has written, `M_s + c sum U`."""
    return dict(state.weights) | {name: state.weights[name] + share * x for name, x in state.travelled.items()}


def set_off(spec: InnerLoop, state: FastWeights, share: Tensor | None = None) -> FastWeights:
    """A point at which gradients are renewed, with `read_rate`: the span before it ends with `share` of its writes."""
    if not spec.read_rate:
        return state
    weights = state.weights if share is None else seen_share(state, share)
    nothing = {name: torch.zeros_like(weights[name]) for name in spec.updated}
    return FastWeights(weights, {}, {}, window=state.window, travelled=nothing)
