"""Values of `InnerLoop`'s fields that are more than a word: retention, windows, anchors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvbind.inner.value import Value, check_choice, check_positive_int


@dataclass(frozen=True, repr=False)
class Retention(Value):
    """Decay of the weights before each update enters them.

    Attributes:
        per: one gate for each "head", `[B, T, H]`, or for each "key" channel, the rows of the matrices, `[B, T, H, Dk]`.
        order: gradients are taken at the weights as they were, and the decay comes "after"; or at the decayed weights, with
            the decay "before" (gated DeltaNet, KDA).
    """

    per: Literal["head", "key"] = "head"
    order: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        check_choice("retention's per", self.per, ("head", "key"))
        check_choice("retention's order", self.order, ("after", "before"))


@dataclass(frozen=True, repr=False)
class Window(Value):
    """Sliding windows over writes (Atlas).

    Attributes:
        n: writes in a window, 1 or more.
        on: a write's "gradient" is that of the tokens of the last n writes, all at the weights that its own is taken at; or
            its "update", after momentum, is the sum of the last n.
    """

    n: int = 1
    on: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        check_positive_int("window's n", self.n)
        check_choice("window's on", self.on, ("gradient", "update"))


@dataclass(frozen=True, repr=False)
class Anchor(Value):
    """Weights are drawn back to a slower copy of themselves, the anchor A, as far as they have been important (Elastic TTT).

    Beside each updated weight M stand its anchor A, at the start M itself, and its importance F. After line 5, elementwise:

        F <- decay F + (1 - decay) imp(U, M, A)
        M <- M - strength w(F) (M - A)

    and after line 6 `A <- follow A + (1 - follow) M`. U is the update that entered M, without its sign.

    Attributes:
        importance: imp, `|U|` ("absolute"), `U^2` ("square"), or `|U (M - A)|` ("drift").
        weight: w(F), F itself ("importance"), or `1 - F / (max F + 1e-8)` ("rest").
        decay: of the importance, from 0 to 1.
        strength: of the pull, 0 or more.
        follow: what an anchor keeps of itself, from 0 (it is the last weights) to 1 (it stays).
        start: the importance at the start, 0 or more.
        peak: where the maximum of "rest" is taken: in each "head", or over the whole "batch", heads included, as the public
            code does; then what a sequence gives depends on the others in its batch, and none may be packed.
        detach: what carries no gradient: "importance" (F is computed without), "start" (A at the start), "follow" (the
            weights that an anchor follows).
    """

    importance: Literal["absolute", "square", "drift"] = "drift"
    weight: Literal["importance", "rest"] = "importance"
    decay: float = 0.5
    strength: float = 0.5
    follow: float = 0.5
    start: float = 0.0
    peak: Literal["head", "batch"] = "head"
    detach: tuple[Literal["importance", "start", "follow"], ...] = ()

    def __post_init__(self) -> None:
        check_choice("anchor's importance", self.importance, ("absolute", "square", "drift"))
        check_choice("anchor's weight", self.weight, ("importance", "rest"))
        check_choice("anchor's peak", self.peak, ("head", "batch"))
        for name in ("decay", "strength", "follow", "start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"anchor's {name} must be a number; got {value!r} ({type(value).__name__})")
            most = float("inf") if name in ("strength", "start") else 1.0
            if not 0 <= value <= most or value == float("inf"):
                what = "0 or more and finite" if most > 1 else "from 0 to 1"
                raise ValueError(f"anchor's {name} must be {what}; got {value}")
        if not isinstance(self.detach, tuple | list):
            raise TypeError(f"anchor's detach must be a tuple of names; got {self.detach!r}")
        for name in self.detach:
            check_choice("anchor's detach", name, ("importance", "start", "follow"))
        # an order of their own, as values are compared
        object.__setattr__(self, "detach", tuple(sorted(set(self.detach))))
