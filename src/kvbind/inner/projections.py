"""`Projections`: how a layer makes of its input what an inner loop takes of tokens, as one value.

An inner loop says which gates it needs; the published layers of one inner loop differ in how they make them. A `Making` is
one such parametrization, with `y = W x (+ b)` a projection of its own. `kvbind.inner.systems.PROJECTIONS` has those of
published systems; `kvbind.layers.FastWeightLayer` builds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from kvbind.inner.value import Value, check_bool, check_choice, check_positive, check_positive_int, nearest

Between = Literal["none", "tanh", "sigmoid"]


@dataclass(frozen=True, repr=False)
class Making(Value):
    """How one gate, rate or factor is made. Subclasses say of what."""

    log: ClassVar[bool] = False
    """Whether it is made as a logarithm, so that small gates keep their gradient."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the class under "kind" and without the fields that have their defaults."""
        default = type(self)()
        changed = {name: value for name, value in super().to_dict().items() if getattr(self, name) != getattr(default, name)}
        return {"kind": type(self).__name__, **changed}


@dataclass(frozen=True, repr=False)
class Projected(Making):
    """A making of `y = W x + b`.

    Attributes:
        rank: inner width of W as a product of two matrices; "head" for the width of a head's values, None for one matrix.
        between: what is applied between the two.
        bias: whether there is b, behind W.
    """

    rank: int | Literal["head"] | None = None
    between: Between = "none"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.rank not in (None, "head"):
            check_positive_int("rank (where it is not 'head')", self.rank)
        check_choice("between", self.between, ("none", "tanh", "sigmoid"))
        check_bool("bias", self.bias)
        if self.rank is None and self.between != "none":
            raise ValueError(f"between needs a rank, as it stands between two matrices; got between={self.between!r}")


@dataclass(frozen=True, repr=False)
class Sigmoid(Projected):
    """`scale sig(y)^power`: the learned gate of most systems.

    Attributes:
        scale: above 0; 2 lets a delta rule's beta reach 2 (arXiv 2411.12537).
        power: above 0; GLA has 1/16 (arXiv 2312.06635).
        start: what `sig(y)` is near before training, between 0 and 1, by b; None for b = 0.
        over_width: divided by the width of a head's values, as TTT's rate (arXiv 2407.04620).
    """

    scale: float = 1.0
    power: float = 1.0
    start: float | None = None
    over_width: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("scale", self.scale)
        check_positive("power", self.power)
        check_bool("over_width", self.over_width)
        if self.start is not None:
            check_positive("start", self.start)
            if self.start >= 1:
                raise ValueError(f"start must be between 0 and 1; got {self.start}")
            if not self.bias:
                raise ValueError("start needs bias=True, which holds it")


@dataclass(frozen=True, repr=False)
class Decay(Projected):
    """`exp(-A softplus(y + dt))`, Mamba's (arXiv 2312.00752): A per head, dt per output.

    Attributes:
        rate: A before training, uniform between these.
        step: `softplus(dt)` before training, log-uniform between these.
    """

    log: ClassVar[bool] = True
    bias: bool = False
    rate: tuple[float, float] = (0.0, 16.0)
    step: tuple[float, float] = (1e-3, 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("rate", self, 0.0)
        _check_range("step", self, 1e-12)


@dataclass(frozen=True, repr=False)
class Bounded(Projected):
    """`exp(-most sig(y))`, which forgets no faster than `exp(-most)` (RWKV-7, arXiv 2503.14456).

    Attributes:
        most: above 0; `exp(-1/2)` there.
        start: b before training, evenly spread between these over the outputs, the slowest first.
    """

    log: ClassVar[bool] = True
    most: float = math.exp(-0.5)
    start: tuple[float, float] = (-5.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("most", self.most)
        _check_range("start", self, -math.inf)


@dataclass(frozen=True, repr=False)
class Softplus(Projected):
    """`softplus(y + softplus^-1(start))`, LaCT's rate (arXiv 2505.23884).

    Attributes:
        start: what it is where y = 0; None for the layer's `base_lr`.
    """

    start: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            check_positive("start", self.start)


@dataclass(frozen=True, repr=False)
class Constant(Making):
    """A number that nothing changes.

    Attributes:
        value: above 0.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check_positive("value", self.value)


@dataclass(frozen=True, repr=False)
class PerHead(Making):
    """RetNet's constants, `1 - 2^(-first - h)` for the heads h = 0, 1, .. (arXiv 2307.08621).

    Attributes:
        first: above 0.
    """

    log: ClassVar[bool] = True
    first: float = 5.0

    def __post_init__(self) -> None:
        check_positive("first", self.first)


@dataclass(frozen=True, repr=False)
class Learned(Making):
    """`sig(d)` of a parameter d per head (Comba, arXiv 2506.02475).

    Attributes:
        start: d before training.
    """

    start: float = 1.0


@dataclass(frozen=True, repr=False)
class Step(Making):
    """`softplus(y + dt)` of the retention's own `Decay`: Mamba-2 writes as much as it forgets (arXiv 2405.21060)."""


@dataclass(frozen=True, repr=False)
class Place(Making):
    """`max(0, 1 / (p + 1) + theta_p)`, p a token's place in its span, theta learned from 0 (TTT, arXiv 2407.04620)."""


MAKINGS: dict[str, type[Making]] = {
    making.__name__: making for making in (Sigmoid, Decay, Bounded, Softplus, Constant, PerHead, Learned, Step, Place)
}
"""The makings by class name, as `to_dict` writes them under "kind"."""

KINDS: dict[str, tuple[type[Making], ...]] = {
    "rate": (Sigmoid, Softplus, Constant),
    "momentum": (Sigmoid, Constant),
    "retention": (Sigmoid, Decay, Bounded, PerHead, Constant),
    "erase": (Sigmoid, Learned, Constant),
    "read_rate": (Place, Sigmoid, Constant),
    "step_rate": (Sigmoid, Softplus, Constant),
    "write_gate": (Sigmoid, Step),
    "removal": (Sigmoid,),
}
"""What each part of `Projections` that is made may be."""


@dataclass(frozen=True, repr=False)
class Projections(Value):
    """How a layer of fast weights makes queries, keys, values, rates, gates and its output.

    In order: `q, k, v` are projections of the input; then the convolution, the activation, `correction`, the L2 norm,
    `powers`, rotary positions and the scale of queries. A part that is made and None is left to the inner loop's fields: a
    rate is a `Softplus` at the layer's `base_lr`, or 1 without `inner.token_lr`; a gate G is a `Sigmoid` that starts where
    `kvbind.inner.gates` says, `read_rate` a `Place`.

    Attributes:
        key_width: width of a head's keys over `hidden_size / heads`.
        value_width: of its values, likewise.
        shared_keys: one query and one key for all heads (Mamba-2).
        tied: queries and keys are one projection, convolved apart (TTT); needs `conv`.
        conv: width of a causal depthwise convolution; 0 for none.
        conv_on: which of "q", "k", "v" it is on.
        conv_bias: whether it has a bias.
        shift: projections read the input mixed with the token before, each by learned shares (RWKV).
        activation: "silu" on queries, keys and values, or "none".
        l2: queries and keys are brought to L2 norm 1, as `x / sqrt(sum x^2 + 1e-6)`.
        powers: p for `sum_(i<=p) c_i x^i`, elementwise on queries and keys, c learned from `1 / i!` (Atlas); 1 for x itself.
        rotary: rotary positions on queries and keys: of the "sequence", of a token's place in its "span" (TTT), or "none".
        rope_theta: base of their wavelengths.
        scale: queries are divided by the root of their width.
        start: the fast matrices start at "zero", or are "learned".
        start_std: standard deviation of learned ones before training; None for `1 / sqrt(fan in)`.
        rate: of writing, one for all matrices.
        momentum: made where the inner loop has that gate; likewise `retention`, `read_rate`, `step_rate`.
        retention: see there.
        read_rate: see there.
        step_rate: see there.
        erase: the share of the key at which residuals read, `e = share k`: a `Sigmoid` per channel, `Learned` per head.
        write_gate: a factor on values: a `Sigmoid` per channel (GDN-2), a `Step` per head (Mamba-2), or None.
        removal: with `writes=2` and `erase`, what a token takes away first: with a factor x per key channel, learned kappa
            and alpha, and `r = l2(k kappa)`, its first write has key `r x`, value 0 and reads at r; its second has key
            `k (1 + (x - 1) alpha)` and takes nothing away (RWKV-7). None for writes that are alike, each with projections
            of its own (DeltaProduct).
        correction: queries are `q - D e`, D learned per head, before their norm (Comba); needs `erase`.
        skip: what passes the fast weights by: "value", `D v` per head (Mamba-2), "bonus", `(sum q k rho) v` behind the
            norm (RWKV-7), or "none".
        output_norm: RMS norm over each head ("rms") or all of them ("rms_all"), layer norm over all ("layer") or each head
            with its own gain and bias ("group"), or "none".
        output_eps: of it; times the head's width for "group".
        output_gate: the function of a gate's projection that multiplies the output: "silu", "sigmoid", "gelu_tanh",
            "linear", or "none".
        gate_rank: as `Projected.rank` has it.
        gate_between: as `Projected.between`.
        gate_bias: as `Projected.bias`.
        gate_first: the gate comes before the norm (Mamba-2).

    Raises:
        ValueError, TypeError: a field that does not fit, or fields that exclude each other.
    """

    key_width: float = 1.0
    value_width: float = 1.0
    shared_keys: bool = False
    tied: bool = False
    conv: int = 0
    conv_on: tuple[str, ...] = ("q", "k", "v")
    conv_bias: bool = False
    shift: bool = False
    activation: Literal["silu", "none"] = "silu"
    l2: bool = True
    powers: int = 1
    rotary: Literal["none", "sequence", "span"] = "none"
    rope_theta: float = 1e4
    scale: bool = False
    start: Literal["learned", "zero"] = "learned"
    start_std: float | None = None
    rate: Making | None = None
    momentum: Making | None = None
    retention: Making | None = None
    erase: Making | None = None
    read_rate: Making | None = None
    step_rate: Making | None = None
    write_gate: Making | None = None
    removal: Making | None = None
    correction: bool = False
    skip: Literal["none", "value", "bonus"] = "none"
    output_norm: Literal["rms", "rms_all", "layer", "group", "none"] = "rms"
    output_eps: float = 1e-5
    output_gate: Literal["none", "silu", "sigmoid", "gelu_tanh", "linear"] = "none"
    gate_rank: int | Literal["head"] | None = None
    gate_between: Between = "none"
    gate_bias: bool = False
    gate_first: bool = False

    def __post_init__(self) -> None:
        for name in ("key_width", "value_width", "rope_theta", "output_eps"):
            check_positive(name, getattr(self, name))
        for name in ("shared_keys", "tied", "conv_bias", "shift", "l2", "scale", "correction", "gate_bias", "gate_first"):
            check_bool(name, getattr(self, name))
        check_choice("activation", self.activation, ("silu", "none"))
        check_choice("rotary", self.rotary, ("none", "sequence", "span"))
        check_choice("start", self.start, ("learned", "zero"))
        check_choice("skip", self.skip, ("none", "value", "bonus"))
        check_choice("output_norm", self.output_norm, ("rms", "rms_all", "layer", "group", "none"))
        check_choice("output_gate", self.output_gate, ("none", "silu", "sigmoid", "gelu_tanh", "linear"))
        check_positive_int("powers", self.powers)
        if self.conv != 0:
            check_positive_int("conv", self.conv)
        if self.start_std is not None:
            check_positive("start_std", self.start_std)
        object.__setattr__(self, "conv_on", tuple(name for name in ("q", "k", "v") if name in _names(self.conv_on)))
        for name, kinds in KINDS.items():
            making = getattr(self, name)
            if making is not None and not isinstance(making, kinds):
                known, number = ", ".join(kind.__name__ for kind in kinds), isinstance(making, int | float)
                hint = f" (Constant({making}) is that for all tokens and heads)" if number and Constant in kinds else ""
                raise TypeError(f"{name} must be one of {known}; got {making!r}{hint}")
        Projected(self.gate_rank, self.gate_between, self.gate_bias)
        if self.tied and not (self.conv and {"q", "k"} <= set(self.conv_on)):
            raise ValueError("tied needs a convolution on both q and k, which tells them apart")
        if self.conv and not self.conv_on:
            raise ValueError("conv_on must name some of 'q', 'k', 'v' where conv is not 0; got none")
        if isinstance(self.retention, Sigmoid) and self.retention.scale > 1:
            raise ValueError(f"retention must not exceed 1, which a Sigmoid of scale={self.retention.scale} does")
        if isinstance(self.retention, Constant) and self.retention.value > 1:
            raise ValueError(f"retention must not exceed 1, which {self.retention!r} does")
        if isinstance(self.write_gate, Step) and not isinstance(self.retention, Decay):
            raise ValueError(f"write_gate=Step() takes its step from a retention that is a Decay; got {self.retention!r}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The value that `to_dict` wrote; fields that are left out take their defaults.

        Raises:
            TypeError: `data` is no dict, or names an unknown field.
            ValueError: a field's value does not fit.
        """
        if isinstance(data, dict):
            made = {name: making_from_dict(name, data[name]) for name in KINDS if isinstance(data.get(name), dict | str)}
            plain = {name: value for name, value in data.items() if name not in made}
            return super().from_dict(plain).replace(**made)
        return super().from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the fields that have their defaults."""
        return {name: value for name, value in super().to_dict().items() if getattr(self, name) != getattr(DEFAULTS, name)}


def making_from_dict(part: str, data: dict[str, Any] | str) -> Making:
    """The making that `to_dict` wrote, or its kind alone, for a part of `Projections`."""
    fields = {"kind": data} if isinstance(data, str) else dict(data)
    kind = fields.pop("kind", None)
    if kind not in MAKINGS:
        raise ValueError(f"{part}'s kind must be one of {', '.join(MAKINGS)}; got {kind!r}{nearest(kind, MAKINGS)}")
    ranges = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return MAKINGS[kind].from_dict({**fields, **ranges})


def _names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, tuple | list):
        raise TypeError(f"conv_on must be a tuple of 'q', 'k', 'v'; got {names!r}")
    for name in names:
        check_choice("conv_on", name, ("q", "k", "v"))
    return tuple(names)


def _check_range(argument: str, making: Making, least: float) -> None:
    found = getattr(making, argument)
    numbers = isinstance(found, tuple | list) and len(found) == 2
    if not numbers or any(isinstance(x, bool) or not isinstance(x, int | float) for x in found):
        raise TypeError(f"{argument} must be two numbers, from and to; got {found!r}")
    if not least <= found[0] <= found[1] < math.inf:
        raise ValueError(f"{argument} must rise, from at least {least}; got {found!r}")
    object.__setattr__(making, argument, tuple(found))


DEFAULTS = Projections()
"""Those of a layer that is told no more than its inner loop."""
