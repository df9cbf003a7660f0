"""What a fast network is: features, a linear last layer, maybe a gate and a head, and its gradients in closed form.

Every network is `f(x) = gate(x; Theta) * (phi(x; Theta) W)`: features `phi`, a last layer `W` ("out") that is linear, and
(GLU alone) a gate on the output. `Linear` and `MLP` may have biases, and an output head behind the last layer. Gradients
are closed-form (specification, section 1).

Shapes: `...` are leading dimensions (batch, heads) that inputs and weights share by broadcasting, `T` tokens; inputs
`[..., T, Dk]`, outputs `[..., T, Dv]`, matrices `[..., in, out]`, vectors `[..., 1, out]`, features `[..., T, F]`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbind.inner.head import LayerNormHead
from kvbind.inner.value import Value, check_positive_int

Weights = Mapping[str, Tensor]

Rates = Mapping[str, Tensor | float]
"""Learning rates by matrix name, each a number or `[..., T, 1]`."""


class Network(Value, abc.ABC):
    """A fast network. Subclasses say what `phi` is and how the loss reaches `Theta`."""

    input_axes: ClassVar[tuple[int, ...]] = (-2,)
    """The axes of a fast matrix that one output channel sums over; norms of channels run over them."""

    @property
    @abc.abstractmethod
    def matrices(self) -> tuple[str, ...]:
        """The names of the fast matrices; the last is always "out", the others are `Theta`."""

    @property
    def theta(self) -> tuple[str, ...]:
        """The names of the matrices before the last layer."""
        return self.matrices[:-1]

    @abc.abstractmethod
    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Each matrix's shape without batch and heads, for the given widths; `hidden` has `hidden_layers` entries."""

    @property
    def has_bias(self) -> bool:
        """Whether its layers have biases, "M.bias" of each matrix M, which are updated with their matrices."""
        return False

    @property
    def output_head(self) -> LayerNormHead | None:
        """What stands behind the last layer, or None."""
        return None

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the weights that are no matrices: biases, and what the head has."""
        biases = tuple(f"{name}.bias" for name in self.matrices) if self.has_bias else ()
        return biases if self.output_head is None else (*biases, *self.output_head.vectors)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all weights, matrices first."""
        return (*self.matrices, *self.vectors)

    def updated(self, matrices: tuple[str, ...]) -> tuple[str, ...]:
        """These matrices, and the vectors that are updated with them."""
        head = ("gamma",) if self.output_head is not None and self.output_head.fast else ()
        return (*matrices, *(f"{name}.bias" for name in matrices if self.has_bias), *head)

    def rate_of(self, name: str) -> str:
        """The matrix whose learning rate a weight takes where it is given none of its own."""
        return name if name in self.matrices else name.removesuffix(".bias") if name.endswith(".bias") else "out"

    def vector_shapes(self, key_width: int, value_width: int, hidden: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Each vector's shape without batch and heads, as `shapes` has the matrices'."""
        shapes = self.shapes(key_width, value_width, hidden)
        return {name: (shapes[self.rate_of(name)][-1],) for name in self.vectors}

    @property
    def rows_are_keys(self) -> bool:
        """Whether the rows of every matrix are the channels of a key, so that each may decay on its own."""
        return False

    @property
    def hidden_layers(self) -> int:
        """How many hidden widths the network has."""
        return 0

    def hidden_widths(self, weights: Weights) -> tuple[int, ...]:
        """The hidden widths that `weights` have."""
        return ()

    @abc.abstractmethod
    def features(self, weights: Weights, x: Tensor) -> Tensor:
        """`phi(x; Theta)`: `[..., T, Dk]` to `[..., T, F]`."""

    def gate(self, weights: Weights, x: Tensor) -> Tensor | None:
        """What multiplies the last layer's output, `[..., T, Dv]`, or None where nothing does."""
        return None

    @property
    def has_gate(self) -> bool:
        """Whether anything multiplies the last layer's output."""
        return type(self).gate is not Network.gate

    def read(self, features: Tensor, out: Tensor) -> Tensor:
        """Features times the last layer: `[..., T, F]`, `[..., F, Dv]` to `[..., T, Dv]`."""
        return features @ out

    def write(self, features: Tensor, g: Tensor) -> Tensor:
        """The sum over tokens of `phi^T g`: `[..., T, F]`, `[..., T, Dv]` to `[..., F, Dv]`."""
        return features.mT @ g

    def last_layer(self, weights: Weights, x: Tensor) -> Tensor:
        """What the last layer makes of `x`, before a head: `[..., T, Dk]` to `[..., T, Dv]`."""
        return self._last(weights, self.gate(weights, x), self.features(weights, x))

    def _last(self, weights: Weights, gate: Tensor | None, features: Tensor) -> Tensor:
        z = gated(gate, self.read(features, weights["out"]))
        return z + weights["out.bias"] if self.has_bias else z

    def apply(self, weights: Weights, x: Tensor) -> Tensor:
        """`f(x)` as outputs read it: `[..., T, Dk]` to `[..., T, Dv]`."""
        return self._headed(weights, self.last_layer(weights, x), x)

    def _headed(self, weights: Weights, z: Tensor, x: Tensor) -> Tensor:
        head = self.output_head
        return z if head is None or head.where == "loss" else head.apply(weights, z, x)

    def apply_to_rows(self, weights: Weights, x: Tensor) -> Tensor:
        """`f(x)` of rows `[B, H, T, Dk]` whose weights before the last layer are the same, `[1, H, in, out]`.

        Each of those is read once: a product with all rows' tokens, in place of one for every row.
        """
        tokens = x.transpose(0, 1).flatten(1, 2)[None]

        def by_row(y: Tensor) -> Tensor:
            return y[0].unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)

        gate = self.gate(weights, tokens)
        z = self._last(weights, None if gate is None else by_row(gate), by_row(self.features(weights, tokens)))
        return self._headed(weights, z, x)

    def predict(self, weights: Weights, x: Tensor) -> Tensor:
        """`f(x)` as the loss takes it: `apply`, but for a head that is not in both."""
        head = self.output_head
        if head is None or head.where == "both":
            return self.apply(weights, x)
        z = self.last_layer(weights, x)
        return z if head.where == "read" else head.apply(weights, z, x)

    @property
    def applies_itself(self) -> bool:
        """Whether `apply` is the one above: features, last layer, gate and head, and nothing that only its class knows."""
        return type(self).apply is Network.apply and type(self).predict is Network.predict

    @property
    def gradients_lag(self) -> bool:
        """Whether `apply` was overridden in a class that did not override `gradients` with it."""
        mro = type(self).__mro__
        return _first(mro, "apply") < _first(mro, "gradients")

    def through_head(self, weights: Weights, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """`-dL/dz` of the last layer's output from `g = -dL/df`, and each token's gradient of a fast gamma."""
        head = self.output_head
        if head is None or head.where == "read":
            return g, None
        d, gamma = head.pull(weights, self.last_layer(weights, x), g)
        return d, gamma if head.fast else None

    def gradients(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        """`sum_i rate_i * (-dL_i/dM)` for each matrix `M` in `names`.

        Args:
            weights: the fast weights at which gradients are taken.
            x: keys `[..., T, Dk]`.
            g: `-dL/df` at those keys, `[..., T, Dv]`.
            rates: each matrix's learning rate.
            names: the matrices that are updated.

        Raises:
            NotImplementedError: of the class that says nothing on how the loss reaches `Theta`.
        """
        # of the last layer alone; networks with Theta override this
        if not set(self.theta).isdisjoint(names):
            raise NotImplementedError(
                f"{type(self).__name__} must define gradients to update {', '.join(self.theta)}; update='last' does without"
            )
        g, gamma = self.through_head(weights, x, g)
        updates = {"out": self.write(self.features(weights, x), gated(self.gate(weights, x), rates["out"] * g))}
        if self.has_bias:
            updates["out.bias"] = row_sum(rates["out.bias"], g)
        if gamma is not None:
            updates["gamma"] = row_sum(rates["gamma"], gamma)
        return {name: updates[name] for name in names}

    def pulled_back(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        """`gradients` by automatic differentiation of `predict`, for classes that override `apply` alone."""
        found: dict[str, Tensor] = {}
        for name in names:

            def output(weight: Tensor, name: str = name) -> Tensor:
                return self.predict({**weights, name: weight}, x)

            pull = torch.func.vjp(output, weights[name])[1]
            (found[name],) = pull(rates[name] * g)
        return found

    def initial(
        self,
        heads: int,
        key_width: int,
        value_width: int,
        hidden: int | Sequence[int] | None = None,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Starting weights: matrices from a normal distribution of variance `1 / fan_in`, `[heads, in, out]` each; biases 0.

        Args:
            heads: number of heads.
            key_width: Dk.
            value_width: Dv.
            hidden: hidden width, or one per hidden layer; default `key_width`.
            generator: source of randomness.
            dtype: of the result.
            device: of the result.

        Raises:
            TypeError: a size that is no int.
            ValueError: a size below 1, or another number of hidden widths than of hidden layers.
        """
        widths = (
            [key_width if hidden is None else hidden] * self.hidden_layers
            if not isinstance(hidden, Sequence)
            else list(hidden)
        )
        for argument, size in (("heads", heads), ("key_width", key_width), ("value_width", value_width)):
            check_positive_int(argument, size)
        for width in widths:
            check_positive_int("hidden", width)
        if len(widths) != self.hidden_layers:
            raise ValueError(f"hidden must have one width for each of {self.hidden_layers} hidden layers; got {widths}")
        matrices = {
            name: torch.randn(self.stored_shape(heads, shape), generator=generator, dtype=dtype, device=device)
            / math.sqrt(math.prod(shape[axis] for axis in self.input_axes))
            for name, shape in self.shapes(key_width, value_width, widths).items()
        }
        head = self.output_head
        ones = () if head is None or head.fast else ("gamma",)
        vectors = {
            name: torch.full((heads, *shape), float(name in ones), dtype=dtype, device=device)
            for name, shape in self.vector_shapes(key_width, value_width, widths).items()
        }
        return matrices | vectors

    def stored_shape(self, heads: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which users give a matrix of `shape` for `heads` heads, without batch."""
        return (heads, *shape)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the class under "kind"."""
        return {"kind": type(self).__name__, **super().to_dict()}


def _first(classes: Sequence[type], name: str) -> int:
    """The place of the first class that defines `name`."""
    return next(i for i, cls in enumerate(classes) if name in vars(cls))


def row_sum(rate: Tensor | float, g: Tensor) -> Tensor:
    """The sum over tokens of rates times rows `[..., T, D]`, a vector `[..., 1, D]`."""
    return (rate * g).sum(-2, keepdim=True)


def gated(gate: Tensor | None, x: Tensor) -> Tensor:
    """`gate * x`, or `x` where there is no gate."""
    return x if gate is None else gate * x
