"""Fast networks: the small networks whose weights are a sequence's state.

Every network is `f(x) = gate(x; Theta) * (phi(x; Theta) W)`: features `phi`, a last layer `W` ("out") that is linear and
bias-free, and (GLU alone) a gate on the output. Gradients are closed-form (specification, section 1).

Shapes: `...` are leading dimensions (batch, heads) that inputs and weights share by broadcasting, `T` tokens; inputs
`[..., T, Dk]`, outputs `[..., T, Dv]`, matrices `[..., in, out]`, features `[..., T, F]`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.files import shortened
from kvbind.inner.value import Value, check_choice, check_positive_int

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

    def apply(self, weights: Weights, x: Tensor) -> Tensor:
        """`f(x)`: `[..., T, Dk]` to `[..., T, Dv]`."""
        return gated(self.gate(weights, x), self.read(self.features(weights, x), weights["out"]))

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
        if set(names) != {"out"}:
            raise NotImplementedError(
                f"{type(self).__name__} must define gradients to update {', '.join(self.theta)}; update='last' does without"
            )
        return {"out": self.write(self.features(weights, x), gated(self.gate(weights, x), rates["out"] * g))}

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
        """Starting weights drawn from a normal distribution of variance `1 / fan_in`, `[heads, in, out]` each.

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
        return {
            name: torch.randn(self.stored_shape(heads, shape), generator=generator, dtype=dtype, device=device)
            / math.sqrt(math.prod(shape[axis] for axis in self.input_axes))
            for name, shape in self.shapes(key_width, value_width, widths).items()
        }

    def stored_shape(self, heads: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which users give a matrix of `shape` for `heads` heads, without batch."""
        return (heads, *shape)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the class under "kind"."""
        return {"kind": type(self).__name__, **super().to_dict()}


def gated(gate: Tensor | None, x: Tensor) -> Tensor:
    """`gate * x`, or `x` where there is no gate."""
    return x if gate is None else gate * x


@dataclass(frozen=True, repr=False)
class Linear(Network):
    """`f(x) = x W`: one matrix, no `Theta` (TTT-Linear, DeltaNet, linear attention, variants 3 to 6 of the paper).

    Weights: `{"out": [H, Dk, Dv]}`.
    """

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

    Weights: `{"in": [H, Dk, Dh], "out": [H, Dh, Dv]}`; with `depth` of 2 or more, `"in.0"`, `"in.1"`, ... in place of "in".

    Attributes:
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu", "tanh" or "identity".
        depth: number of hidden layers.
    """

    activation: Activation = "gelu"
    depth: int = 1

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, tuple(_ACTIVATIONS))
        check_positive_int("depth", self.depth)
        if self.depth > MOST_LAYERS:
            raise ValueError(f"depth must be at most {MOST_LAYERS}; got {shortened(self.depth)}")

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
        act, _ = _ACTIVATIONS[self.activation]
        for name in self.theta:
            x = act(x @ weights[name])
        return x

    def gradients(self, weights: Weights, x: Tensor, g: Tensor, rates: Rates, names: tuple[str, ...]) -> dict[str, Tensor]:
        act, slope = _ACTIVATIONS[self.activation]
        inputs, before = [x], []
        for name in self.theta:
            before.append(inputs[-1] @ weights[name])
            inputs.append(act(before[-1]))
        updates = {"out": inputs[-1].mT @ (rates["out"] * g)}
        if set(names) != {"out"}:
            upper, d = "out", g
            for i, name in reversed(list(enumerate(self.theta))):
                d = (d @ weights[upper].mT) * slope(before[i])
                updates[name] = inputs[i].mT @ (rates[name] * d)
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

NETWORKS: dict[str, type[Network]] = {cls.__name__: cls for cls in (Linear, MLP, SwiGLU, GLU, DepthwiseConv)}
"""The fast networks by class name, as `to_dict` writes them under "kind"."""
