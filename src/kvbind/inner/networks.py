"""The fast networks: the small networks whose weights are a sequence's state, each a `kvbind.inner.network.Network`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.files import shortened
from kvbind.inner.activations import ACTIVATIONS, Activation, activation_of, silu_slope
from kvbind.inner.head import LayerNormHead, check_head
from kvbind.inner.network import Network, Rates, Weights, row_sum
from kvbind.inner.value import LATER, check_bool, check_choice, check_positive_int


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
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
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


NETWORKS: dict[str, type[Network]] = {cls.__name__: cls for cls in (Linear, MLP, SwiGLU, GLU, DepthwiseConv)}
"""The fast networks by class name, as `to_dict` writes them under "kind"."""
