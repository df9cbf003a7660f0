"""The update rule of one chunk: the six lines of section 1 of the specification, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kvbind.inner.losses import descent_direction
from kvbind.inner.networks import Network, Rates, Weights
from kvbind.inner.spec import InnerLoop

NORM_EPS = 1e-5


@dataclass(frozen=True)
class FastWeights:
    """What the rule reads and writes; every tensor `[..., in, out]` with the same leading dimensions.

    Attributes:
        weights: every matrix of the fast network.
        momentum: the momentum buffer of each updated matrix; empty without momentum.
        norms: the starting norm of each output channel of each updated matrix; empty without normalization.
        accumulated: with `normalize="read"`, the weights that updates enter, of which `weights` are the normalized copy;
            empty otherwise.
    """

    weights: Weights
    momentum: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    accumulated: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def start(spec: InnerLoop, weights: Weights) -> FastWeights:
        """The state of a sequence that has read nothing."""
        # contiguous, where weights may be transposed, as kernels would only copy zeros to make them so
        zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
        return FastWeights(
            weights=weights,
            momentum={name: zeros(weights[name]) for name in spec.updated} if spec.momentum else {},
            norms={name: channel_norm(spec.network, weights[name]) for name in spec.updated} if spec.normalize else {},
            accumulated={name: weights[name] for name in spec.updated} if spec.normalize == "read" else {},
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> FastWeights:
        """These weights with every tensor changed."""
        parts = (self.weights, self.momentum, self.norms, self.accumulated)
        return FastWeights(*({name: change(x) for name, x in part.items()} for part in parts))


def channel_norm(network: Network, matrix: Tensor) -> Tensor:
    """The L2 norm of each output channel of a fast matrix; the input axes stay, with length 1."""
    return torch.linalg.vector_norm(matrix, dim=network.input_axes, keepdim=True)


def gradient(spec: InnerLoop, weights: Weights, k: Tensor, v: Tensor, rates: Rates) -> dict[str, Tensor]:
    """Line 1: the summed update of each matrix, gradients taken at `weights`.

    Args:
        spec: the inner loop.
        weights: fast weights, `[..., in, out]`.
        k: keys `[..., T, Dk]`.
        v: values `[..., T, Dv]`.
        rates: learning rate of each matrix, a number or `[..., T, 1]`.
    """
    prediction = spec.network.apply(weights, k) if spec.loss == "squared" else None
    return spec.network.gradients(weights, k, descent_direction(spec.loss, prediction, v), rates, spec.updated)


def shape_update(spec: InnerLoop, matrix: Tensor) -> Tensor:
    """Line 3: orthogonalize or clip one matrix's update."""
    return shape_updates(spec, {"": matrix})[""]


def shape_updates(spec: InnerLoop, updates: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Line 3 for all matrices; those of one shape, up to transposition, are orthogonalized as one batch."""
    if spec.clip:
        return {name: x / (channel_norm(spec.network, x) + 1) for name, x in updates.items()}
    if spec.orthogonalize is None:
        return updates
    shaped: dict[str, Tensor] = {}
    wide = {name: x.mT if x.shape[-2] > x.shape[-1] else x for name, x in updates.items()}
    for shape in dict.fromkeys(x.shape for x in wide.values()):
        names = [name for name, x in wide.items() if x.shape == shape]
        batch = spec.orthogonalize(torch.stack([wide[name] for name in names]))
        shaped |= dict(zip(names, batch.unbind(), strict=True))
    return {name: shaped[name].mT if x.shape != shaped[name].shape else shaped[name] for name, x in updates.items()}


def rescale(network: Network, matrix: Tensor, norm: Tensor) -> Tensor:
    """Line 6's factor: what takes each output channel of `matrix` to `norm`."""
    return norm / (channel_norm(network, matrix) + NORM_EPS)


def apply_update(
    spec: InnerLoop,
    state: FastWeights,
    updates: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
) -> FastWeights:
    """Lines 2 to 6: enter one chunk's summed gradients into the weights.

    Args:
        spec: the inner loop.
        state: weights, momentum and norms before.
        updates: line 1's result.
        gates: the chunk's gates by name, `m_c` and `a_c` among them, broadcastable to the matrices.
    """
    momentum, retention = gates.get("momentum"), gates.get("retention")
    if momentum is not None:
        updates = {name: g + momentum * state.momentum[name] for name, g in updates.items()}
    weights, accumulated = dict(state.weights), {}
    for name, update in shape_updates(spec, updates).items():
        matrix = state.accumulated.get(name, state.weights[name])
        if retention is not None:
            matrix = retention * matrix
        matrix = matrix + update if spec.sign > 0 else matrix - update
        if spec.normalize == "read":
            accumulated[name] = matrix
        if spec.normalize:
            matrix = matrix * rescale(spec.network, matrix, state.norms[name])
        weights[name] = matrix
    return FastWeights(weights, updates if momentum is not None else {}, state.norms, accumulated)
