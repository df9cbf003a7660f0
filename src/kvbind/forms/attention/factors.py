"""Factors of a linear attention that only some inner loops have: of tokens inside a chunk, read rates, anchors, heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partial:
    """Factors of each token's own under `visibility="token"`: what the rule does with its chunk's tokens up to it.

    Attributes:
        momentum: `[B, H, T]`, or None.
        retention: `[B, H, T]`, or `[B, H, T, F]` for the rows of the state, or None.
        rescaling: `[B, H, T, Dv]`, or None.
        step: `[B, H, T]`, or None.
        ahead: how many of each update's writes are of the window before its chunk, and seen by all of the chunk.
    """

    momentum: Tensor | None
    retention: Tensor | None
    rescaling: Tensor | None
    step: Tensor | None = None
    ahead: int = 0


@dataclass(frozen=True, eq=False)
class SeenShare:
    """With a read rate: what tokens see, and spans leave, of the updates since their span began.

    Attributes:
        seen: `c_t`, `[B, H, T]`.
        closes: after how many updates each span ends.
        left: what of its updates it leaves, `[B, H, spans]`.
    """

    seen: Tensor
    closes: tuple[int, ...]
    left: Tensor


@dataclass(frozen=True, eq=False)
class Anchored:
    """With an anchor A: `S <- S - p (S - A)` before rescaling, `A <- f A + (1 - f) S` behind it; A is `S_0` at the start.

    Attributes:
        pull: `p_u`, `[B, H, U, F, Dv]`.
        follow: `f_u`, `[B, H, U]`.
        detach: what carries no gradient: A at the "start", or what it is to "follow".
    """

    pull: Tensor
    follow: Tensor
    detach: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class OutputHead:
    """Layer normalization behind the attention: `o = skip + gain LN(o) + shift`.

    Attributes:
        eps: added to the variance.
        gain: `[B, T, H, Dv]`.
        shift: `[B, T, H, Dv]`, or None.
        skip: `[B, T, H, Dv]`, or None.
    """

    eps: float
    gain: Tensor
    shift: Tensor | None
    skip: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The head's output at `x`, `[B, T, H, Dv]`."""
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.gain
        y = y if self.shift is None else y + self.shift
        return y if self.skip is None else self.skip + y
