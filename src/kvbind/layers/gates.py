"""The modules that make gates, rates and factors of a layer's input, one for each class of `kvbind.inner.projections`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.inner.projections import (
    Between,
    Bounded,
    Constant,
    Decay,
    Learned,
    Making,
    PerHead,
    Place,
    Projected,
    Sigmoid,
    Softplus,
    Step,
)
from kvbind.layers.operands import wide

BETWEEN: dict[Between, type[nn.Module]] = {"none": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Sizes:
    """What a maker is built for.

    Attributes:
        inputs: width of the layer's input.
        heads: fast heads.
        value_width: of a head.
        channels: what it makes for each head: numbers per key or value channel, one for each write, or None for one alone.
        span: tokens in a span of the inner loop.
        base_lr: of the layer.
        first: the first of the heads, where those before it are on other ranks.
    """

    inputs: int
    heads: int
    value_width: int
    channels: int | None
    span: int
    base_lr: float
    first: int = 0

    @property
    def outputs(self) -> int:
        """All that it makes for a token."""
        return self.heads * (self.channels or 1)


def projection(inputs: int, outputs: int, rank: int | str | None, between: Between, bias: bool, head: int) -> nn.Module:
    """`W x (+ b)`, with W one matrix or a product of two; `head` is the rank where it is "head"."""
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    inner = head if rank == "head" else int(rank)
    first, last = nn.Linear(inputs, inner, bias=False), nn.Linear(inner, outputs, bias=bias)
    return nn.Sequential(first, BETWEEN[between](), last)


def draw(parameter: nn.Parameter, values: Callable[[], Tensor]) -> None:
    """Fill a parameter, unless transformers has loaded it and only asks for what is missing."""
    if not getattr(parameter, "_is_hf_initialized", False):
        with torch.no_grad():
            parameter.copy_(values())


class GateMaker(nn.Module):
    """Makes a rate or a gate from tokens.

    Args:
        making: the parametrization.
        sizes: heads and channels of what is made.

    Attributes:
        log: whether what comes is a logarithm.
    """

    def __init__(self, making: Making, sizes: Sizes) -> None:
        super().__init__()
        self.making, self.sizes, self.log = making, sizes, making.log

    def reset_parameters(self) -> None:
        """Draw the maker's own parameters anew; those of its projections are the model's."""

    def split(self, y: Tensor) -> Tensor:
        """`[B, T, heads * channels]` to `[B, T, heads, channels]`, or to itself where there is one for each head."""
        return y if self.sizes.channels is None else y.unflatten(-1, (self.sizes.heads, self.sizes.channels))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """What is made, `[B, T, heads]` or `[B, T, heads, channels]`, float32 or wider.

        Args:
            x: normalized input `[B, T, d]`.
            places: how many tokens of its sequence come before each, int64 `[B, T]` or `[1, T]`.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return repr(self.making)


class OfProjection(GateMaker):
    """What makes of a projection."""

    def __init__(self, making: Projected, sizes: Sizes) -> None:
        super().__init__(making, sizes)
        self.proj = projection(
            sizes.inputs, sizes.outputs, making.rank, making.between, making.bias, sizes.value_width
        )  # fmt: skip

    @property
    def bias(self) -> nn.Parameter:
        """Of the projection, which is asked for only where there is one."""
        last = self.proj[-1] if isinstance(self.proj, nn.Sequential) else self.proj
        bias = last.bias
        assert isinstance(bias, nn.Parameter)
        return bias

    def logits(self, x: Tensor) -> Tensor:
        """y, `[B, T, heads]` or `[B, T, heads, channels]`."""
        return self.split(wide(self.proj(x)))


class SigmoidMaker(OfProjection):
    """`Sigmoid`; as a logarithm where the layer asks for one (`log`), which scales of 1 alone have."""

    making: Sigmoid

    def reset_parameters(self) -> None:
        if self.making.start is not None:
            nn.init.constant_(self.bias, math.log(self.making.start / (1 - self.making.start)))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        m = self.making
        scale = m.scale / self.sizes.value_width if m.over_width else m.scale
        if self.log:
            return m.power * F.logsigmoid(self.logits(x)) + math.log(scale)
        y = self.logits(x).sigmoid()
        return scale * (y if m.power == 1 else y**m.power)


class DecayMaker(OfProjection):
    """A decay made of tokens, `Decay`."""

    making: Decay

    def __init__(self, making: Decay, sizes: Sizes) -> None:
        super().__init__(making, sizes)
        self.log_rate = nn.Parameter(torch.empty(sizes.heads))
        self.step_bias = nn.Parameter(torch.empty(sizes.outputs))

    def reset_parameters(self) -> None:
        low, high = self.making.rate
        # a head whose A is 0 would never learn to forget
        draw(self.log_rate, lambda: torch.empty_like(self.log_rate).uniform_(low, high).clamp(min=1e-4).log())
        least, most = (math.log(x) for x in self.making.step)

        def steps() -> Tensor:
            step = torch.empty_like(self.step_bias).uniform_(least, most).exp()
            return step + (-torch.expm1(-step)).log()

        draw(self.step_bias, steps)

    def step(self, x: Tensor) -> Tensor:
        """`softplus(y + dt)`."""
        return F.softplus(self.logits(x) + self.split(self.step_bias))

    def decay(self, step: Tensor) -> Tensor:
        """The logarithm of the gate."""
        rate = self.log_rate.exp()
        return -step * (rate if self.sizes.channels is None else rate[:, None])

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.decay(self.step(x))


class BoundedMaker(OfProjection):
    """A gate between two bounds, `Bounded`."""

    making: Bounded

    def reset_parameters(self) -> None:
        if self.making.bias:
            low, high = self.making.start
            draw(self.bias, lambda: torch.linspace(low, high, self.sizes.outputs))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return -self.making.most * self.logits(x).sigmoid()


class SoftplusMaker(OfProjection):
    """A positive rate, `Softplus`."""

    making: Softplus

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        start = self.making.start or self.sizes.base_lr
        return F.softplus(self.logits(x) + start + math.log(-math.expm1(-start)))


class ConstantMaker(GateMaker):
    """A number for all tokens, `Constant`."""

    making: Constant

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.split(wide(x.new_empty(0)).new_full((*x.shape[:2], self.sizes.outputs), self.making.value))


class PerHeadMaker(GateMaker):
    """A fixed number for each head, `PerHead`."""

    making: PerHead

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        heads = torch.arange(self.sizes.heads, device=x.device, dtype=wide(x.new_empty(0)).dtype)
        gates = (-torch.exp2(-self.making.first - self.sizes.first - heads)).log1p()
        if self.sizes.channels is not None:
            gates = gates[:, None].expand(-1, self.sizes.channels)
        return gates.expand(*x.shape[:2], *gates.shape)


class LearnedMaker(GateMaker):
    """A learned number for each head, `Learned`."""

    making: Learned

    def __init__(self, making: Learned, sizes: Sizes) -> None:
        super().__init__(making, sizes)
        self.logit = nn.Parameter(torch.empty(sizes.heads))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit, self.making.start)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        share = wide(self.logit).sigmoid()
        if self.sizes.channels is not None:
            share = share[:, None].expand(-1, self.sizes.channels)
        return share.expand(*x.shape[:2], *share.shape)


class PlaceMaker(GateMaker):
    """`Place`: one for all heads."""

    def __init__(self, making: Place, sizes: Sizes) -> None:
        super().__init__(making, sizes)
        self.theta = nn.Parameter(torch.empty(sizes.span))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.theta)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        theta = wide(self.theta)
        share = 1 / torch.arange(1, self.sizes.span + 1, device=x.device, dtype=theta.dtype)
        each = (share + theta).clamp(min=0)[places.remainder(self.sizes.span)]
        return each[..., None].expand(*x.shape[:2], self.sizes.heads)


MAKERS: dict[type[Making], Callable[..., GateMaker]] = {
    Sigmoid: SigmoidMaker,
    Decay: DecayMaker,
    Bounded: BoundedMaker,
    Softplus: SoftplusMaker,
    Constant: ConstantMaker,
    PerHead: PerHeadMaker,
    Learned: LearnedMaker,
    Place: PlaceMaker,
}
"""What makes each; a `Step` is made by the `DecayMaker` of the weights."""


def maker_of(making: Making, sizes: Sizes) -> GateMaker:
    """The module for a making."""
    if isinstance(making, Step):
        raise ValueError("a Step is made by the decay that it is the step of")
    return MAKERS[type(making)](making, sizes)
