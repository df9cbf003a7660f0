"""Fast networks: the small networks whose weights are a sequence's state.

Every network is `f(x) = gate(x; Theta) * (phi(x; Theta) W)`: features `phi`, a last layer `W` ("out") that is linear, and
(GLU alone) a gate on the output. `Linear` and `MLP` may have biases, and an output head behind the last layer. Gradients
are closed-form (specification, section 1).

Shapes: `...` are leading dimensions (batch, heads) that inputs and weights share by broadcasting, `T` tokens; inputs
`[..., T, Dk]`, outputs `[..., T, Dv]`, matrices `[..., in, out]`, vectors `[..., 1, out]`, features `[..., T, F]`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.files import shortened
from kvbind.inner.value import LATER, Value, check_bool, check_choice, check_positive, check_positive_int

Weights = Mapping[str, Tensor]
Rates = Mapping[str, Tensor | float]
"""Learning rates by matrix name, each a number or `[..., T, 1]`."""


@dataclass(frozen=True, repr=False)
class LayerNormHead(Value):
    """An output head behind a network's last layer: layer normalization over its channels, `h(z) = gamma LN(z) + beta`.

    LN has the biased variance. With `residual` the network is `f(x) = x + h(z(x))`, which needs `Dk = Dv`.

    Weights beside the network's: `{"gamma": [H, Dv], "beta": [H, Dv]}`, which the inner loop leaves as they are; with `fast`
    `{"gamma": [H, Dv]}` alone, in `h(z) = (1 + gamma) LN(z)`, which it updates, decays and moves as any other.

    Attributes:
        residual: the network's input is added.
        where: the head is in the "loss", in what outputs "read", or in "both".
        eps: added to the variance.
        fast: gamma learns inside the sequence too.
    """

    residual: bool = True
    where: Literal["both", "loss", "read"] = "both"
    eps: float = 1e-6
    fast: bool = False

    def __post_init__(self) -> None:
        check_bool("residual", self.residual)
        check_bool("fast", self.fast)
        check_choice("where", self.where, ("both", "loss", "read"))
        check_positive("eps", self.eps)
        if self.fast and self.where == "read":
            raise ValueError("fast needs a head in the loss, where='both' or 'loss'; got where='read'")

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of its weights."""
        return ("gamma",) if self.fast else ("gamma", "beta")

    def normalized(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`LN(z)`, and the standard deviation `[..., 1]` that it divides by."""
        centred = z - z.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred / deviation, deviation

    def gain(self, weights: Weights) -> Tensor:
        """What multiplies `LN(z)`."""
        return 1 + weights["gamma"] if self.fast else weights["gamma"]

    def apply(self, weights: Weights, z: Tensor, x: Tensor) -> Tensor:
        """The network's output from `z` `[..., T, Dv]` and its input."""
        y = self.normalized(z)[0] * self.gain(weights)
        if not self.fast:
            y = y + weights["beta"]
        return x + y if self.residual else y

    def pull(self, weights: Weights, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`-dL/dz` from `g = -dL/df`, and each token's `-dL/dgamma`, `[..., T, Dv]` both."""
        y, deviation = self.normalized(z)
        d = g * self.gain(weights)
        inner = d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True)
        return inner / deviation, g * y


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
        z = gated(self.gate(weights, x), self.read(self.features(weights, x), weights["out"]))
        return z + weights["out.bias"] if self.has_bias else z

    def apply(self, weights: Weights, x: Tensor) -> Tensor:
        """`f(x)` as outputs read it: `[..., T, Dk]` to `[..., T, Dv]`."""
        z, head = self.last_layer(weights, x), self.output_head
        return z if head is None or head.where == "loss" else head.apply(weights, z, x)

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


def check_head(head: object) -> None:
    """Raise `TypeError` unless `head` is a `LayerNormHead` or None."""
    if head is not None and not isinstance(head, LayerNormHead):
        raise TypeError(f"head must be a LayerNormHead or None; got {head!r}")


def gated(gate: Tensor | None, x: Tensor) -> Tensor:
    """`gate * x`, or `x` where there is no gate."""
    return x if gate is None else gate * x


@dataclass(frozen=True, repr=False)
class Linear(Network):
    """`f(x) = x W`: one matrix, no `Theta` (TTT-Linear, DeltaNet, linear attention, variants 3 to 6 of the paper).

    Weights: `{"out": [H, Dk, Dv]}`; with `bias` also `{"out.bias": [H, Dv]}`, and those of the head.

    Attributes:
        bias: a bias behind the matrix, updated with it.
        head: what stands behind that, a `LayerNormHead` or None.
    """

    bias: bool = field(default=False, metadata=LATER)
    head: LayerNormHead | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_bool("bias", self.bias)
        check_head(self.head)

    @property
    def has_bias(self) -> bool:
        return self.bias

    @property
    def output_head(self) -> LayerNormHead | None:
        return self.head

    @property
    def rows_are_keys(self) -> bool:
        return True

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("out",)

    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
        return {"out": (key_width, value_width)}

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        return x


MOST_LAYERS = 1024
"""Hidden layers of the deepest fast network: a limit for numbers from files, far above what anybody trains."""

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "identity"]


@dataclass(frozen=True, repr=False)
class MLP(Network):
    """`f(x) = act(... act(x W_in) ...) W`: a multi-layer perceptron (TTT-MLP, Titans, Atlas).

    Weights: `{"in": [H, Dk, Dh], "out": [H, Dh, Dv]}`; with `depth` of 2 or more, `"in.0"`, `"in.1"`, ... in place of "in";
    with `bias` also `{"in.bias": [H, Dh], "out.bias": [H, Dv]}`, and those of the head.

    Attributes:
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu", "tanh" or "identity".
        depth: number of hidden layers.
        bias: a bias behind each matrix, updated with it.
        head: what stands behind the last layer, a `LayerNormHead` or None.
    """

    activation: Activation = "gelu"
    depth: int = 1
    bias: bool = field(default=False, metadata=LATER)
    head: LayerNormHead | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(_ACTIVATIONS))
        check_positive_int("depth", self.depth)
        if self.depth > MOST_LAYERS:
            raise ValueError(f"depth must be at most {MOST_LAYERS}; got {shortened(self.depth)}")
        check_bool("bias", self.bias)
        check_head(self.head)

    @property
    def has_bias(self) -> bool:
        return self.bias

    @property
    def output_head(self) -> LayerNormHead | None:
        return self.head

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*(("in",) if self.depth == 1 else (f"in.{i}" for i in range(self.depth))), "out")

    @property
    def hidden_layers(self) -> int:
        return self.depth

    def hidden_widths(self, weights: Weights) -> tuple[int, ...]:
        return tuple(weights[name].shape[-1] for name in self.theta)

    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int]) -> dict[str, tuple[int, ...]]:
        widths = (key_width, *hidden, value_width)
        return {name: (widths[i], widths[i + 1]) for i, name in enumerate(self.matrices)}

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        act, _ = activation_of(self.activation)
        for name in self.theta:
            x = act(self._layer(weights, name, x))
        return x

    def _layer(self, weights: Weights, name: str, x: Tensor) -> Tensor:
        return x @ weights[name] + weights[f"{name}.bias"] if self.bias else x @ weights[name]

    def gradients(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        act, slope = activation_of(self.activation)
        g, gamma = self.through_head(weights, x, g)
        inputs, before = [x], []
        for name in self.theta:
            before.append(self._layer(weights, name, inputs[-1]))
            inputs.append(act(before[-1]))
        updates = {"out": inputs[-1].mT @ (rates["out"] * g)}
        if self.bias:
            updates["out.bias"] = row_sum(rates["out.bias"], g)
        if gamma is not None:
            updates["gamma"] = row_sum(rates["gamma"], gamma)
        if self.theta[0] in names:
            upper, d = "out", g
            for i, name in reversed(list(enumerate(self.theta))):
                d = (d @ weights[upper].mT) * slope(before[i])
                updates[name] = inputs[i].mT @ (rates[name] * d)
                if self.bias:
                    updates[f"{name}.bias"] = row_sum(rates[f"{name}.bias"], d)
                upper = name
        return {name: updates[name] for name in names}


@dataclass(frozen=True, repr=False)
class SwiGLU(Network):
    """`f(x) = (silu(x W_gate) * (x W_up)) W`: the fast network of LaCT (arXiv 2505.23884).

    Weights: `{"gate": [H, Dk, Dh], "up": [H, Dk, Dh], "out": [H, Dh, Dv]}`.
    """

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("gate", "up", "out")

    @property
    def hidden_layers(self) -> int:
        return 1

    def hidden_widths(self, weights: Weights) -> tuple[int, ...]:
        return (weights["gate"].shape[-1],)

    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"gate": (key_width, hidden[0]), "up": (key_width, hidden[0]), "out": (hidden[0], value_width)}

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        return F.silu(x @ weights["gate"]) * (x @ weights["up"])

    def gradients(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        u, p = x @ weights["gate"], x @ weights["up"]
        s = F.silu(u)
        updates = {"out": (s * p).mT @ (rates["out"] * g)}
        if set(names) != {"out"}:
            dh = g @ weights["out"].mT
            updates["up"] = x.mT @ (rates["up"] * dh * s)
            updates["gate"] = x.mT @ (rates["gate"] * dh * p * silu_slope(u))
        return {name: updates[name] for name in names}


@dataclass(frozen=True, repr=False)
class GLU(Network):
    """`f(x) = silu(x W_gate) * (x W)`: the gate is on the output (ViTTT's heads, arXiv 2512.01643).

    Weights: `{"gate": [H, Dk, Dv], "out": [H, Dk, Dv]}`.
    """

    @property
    def rows_are_keys(self) -> bool:
        return True

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("gate", "out")

    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
        return {"gate": (key_width, value_width), "out": (key_width, value_width)}

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        return x

    def gate(self, weights: Weights, x: Tensor) -> Tensor:
        return F.silu(x @ weights["gate"])

    def gradients(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        u = x @ weights["gate"]
        updates = {"out": x.mT @ (rates["out"] * g * F.silu(u))}
        if set(names) != {"out"}:
            z = x @ weights["out"]
            updates["gate"] = x.mT @ (rates["gate"] * g * z * silu_slope(u))
        return {name: updates[name] for name in names}


@dataclass(frozen=True, repr=False)
class DepthwiseConv(Network):
    """A 3x3 convolution of each channel on a grid of tokens: the second branch of ViTTT (arXiv 2512.01643).

    Features are a token's zero-padded 3x3 neighbourhood, per channel, in the order of the kernel (cross-correlation, as
    `torch.nn.Conv2d`): `[..., T, D]` to `[..., T, D, 9]`.

    Weights: `{"out": [C, 3, 3]}` with `C = H * D` channels; inside the library `[..., D, 3, 3]`.

    Attributes:
        grid: height and width of the grid whose rows are the sequence; None for a square one.
    """

    grid: tuple[int, int] | None = None
    input_axes: ClassVar[tuple[int, ...]] = (-2, -1)

    def __post_init__(self) -> None:
        if self.grid is None:
            return
        if not isinstance(self.grid, tuple | list) or len(self.grid) != 2:
            raise ValueError(f"grid must be (height, width) or None; got {self.grid!r}")
        for side in self.grid:
            # in a traced program sides may be symbols
            if not isinstance(side, torch.SymInt):
                check_positive_int("grid's height and width", side)
        object.__setattr__(self, "grid", tuple(self.grid))

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("out",)

    def shapes(self, key_width: int, value_width: int, hidden: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
        return {"out": (value_width, 3, 3)}

    def stored_shape(self, heads: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (heads * shape[0], *shape[1:])

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Height and width of the grid of `tokens` tokens.

        Raises:
            ValueError: the tokens do not fill the grid, or are no square where `grid` is None.
        """
        height, width = self.grid or (math.isqrt(tokens),) * 2
        if height * width != tokens:
            need = f"{height} x {width} = {height * width}" if self.grid else "a square number of"
            raise ValueError(f"DepthwiseConv(grid={self.grid}) needs {need} tokens; got {tokens}")
        return height, width

    def features(self, weights: Weights, x: Tensor) -> Tensor:
        *lead, tokens, channels = x.shape
        height, width = self.grid_of(tokens)
        image = F.pad(x.reshape(*lead, height, width, channels), (0, 0, 1, 1, 1, 1))
        shifted = [image[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)]
        return torch.stack(shifted, dim=-1).reshape(*lead, tokens, channels, 9)

    def read(self, features: Tensor, out: Tensor) -> Tensor:
        return (features * out.flatten(-2).unsqueeze(-3)).sum(-1)

    def write(self, features: Tensor, g: Tensor) -> Tensor:
        return (features * g.unsqueeze(-1)).sum(-3).unflatten(-1, (3, 3))


def silu_slope(u: Tensor) -> Tensor:
    """The derivative of silu: `sig(u) (1 + u (1 - sig(u)))`."""
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _gelu_slope(u: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    return cdf + u * torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(u: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (u + cubic * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * scale * (1 + 3 * cubic * u * u)


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (lambda u: F.gelu(u, approximate="tanh"), _gelu_tanh_slope),
    "relu": (F.relu, lambda u: (u > 0).to(u.dtype)),
    "silu": (F.silu, silu_slope),
    "tanh": (torch.tanh, lambda u: 1 - torch.tanh(u).square()),
    "identity": (lambda u: u, torch.ones_like),
}


def activation_of(name: Activation) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """An activation and its derivative."""
    return _ACTIVATIONS[name]


NETWORKS: dict[str, type[Network]] = {cls.__name__: cls for cls in (Linear, MLP, SwiGLU, GLU, DepthwiseConv)}
"""The fast networks by class name, as `to_dict` writes them under "kind"."""
