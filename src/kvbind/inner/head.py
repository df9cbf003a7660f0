"""Output heads: what stands behind a fast network's last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from kvbind.inner.value import Value, check_bool, check_choice, check_positive

if TYPE_CHECKING:
    from kvbind.inner.network import Weights


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


def check_head(head: object) -> None:
    """Raise `TypeError` unless `head` is a `LayerNormHead` or None."""
    if head is not None and not isinstance(head, LayerNormHead):
        raise TypeError(f"head must be a LayerNormHead or None; got {head!r}")
