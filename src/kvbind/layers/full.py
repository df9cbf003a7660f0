"""What layers share: the arguments with which they call `kvbind.ttt`, and checks of their inner loops.

The checks of visibility are of the layers whose tokens all see everything that was written, those of ViTTT and of LaCT
view synthesis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from kvbind.forms.api import ttt
from kvbind.forms.linear_attention import LinearAttention
from kvbind.forms.linearize import linearize
from kvbind.forms.state import State
from kvbind.forms.validation import LearningRate
from kvbind.inner.spec import InnerLoop


class InnerCall(NamedTuple):
    """The arguments with which a layer calls `kvbind.ttt`, to run or to look at.

    Attributes:
        inner: the inner loop.
        weights: starting fast weights by matrix name, as `ttt` takes them.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        lr: learning rates, as `ttt` takes them.
        gates: what else `ttt` takes of tokens, by name, `[B, T, H]` each.
        cu_seqlens: boundaries of packed sequences; None for rows.
    """

    inner: InnerLoop
    weights: dict[str, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    lr: LearningRate
    gates: Mapping[str, Any] = MappingProxyType({})
    cu_seqlens: Sequence[int] | None = None

    def run(self, update_tokens: slice | Tensor | None = None, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs `[B, T, H, Dv]` in q's dtype, and the state; arguments as `kvbind.ttt` takes them."""
        weights = self.weights if state is None else None
        return ttt(
            self.inner, weights, self.q, self.k, self.v, lr=self.lr, **self.gates, state=state,
            cu_seqlens=self.cu_seqlens, update_tokens=update_tokens,
        )  # fmt: skip

    def linearize(self, update_tokens: slice | Tensor | None = None) -> LinearAttention:
        """The linear attention that this call is, as `kvbind.linearize` returns it.

        Raises:
            ValueError: packed sequences, each of which is a linear attention of its own.
        """
        if self.cu_seqlens is not None:
            raise ValueError(f"cu_seqlens must be None for one linear attention; got {len(self.cu_seqlens) - 1} sequences")
        return linearize(
            self.inner, self.weights, self.q, self.k, self.v, lr=self.lr, **self.gates, update_tokens=update_tokens,
        )  # fmt: skip


def check_sees_everything(argument: str, inner: InnerLoop) -> None:
    """Refuse an inner loop that such a layer cannot run.

    Args:
        argument: the name by which messages call the inner loop.
        inner: the inner loop.

    Raises:
        TypeError: no InnerLoop.
        ValueError: a visibility other than "full", or gates, which these layers do not make.
    """
    if not isinstance(inner, InnerLoop):
        raise TypeError(f"{argument} must be a kvbind.InnerLoop; got {type(inner).__name__}")
    if inner.visibility != "full":
        raise ValueError(
            f"{argument}'s visibility must be 'full', as all tokens see what was written; got {inner.visibility!r}"
        )
    for gate in inner.gates:
        raise ValueError(f"{argument} must have {gate}=False: this layer has no {gate} gate")
    if inner.network.vectors:
        raise ValueError(f"{argument}'s network must have neither bias nor head in this layer; got {inner.network!r}")


def check_built(
    argument: str, inner: InnerLoop, needed: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse an inner loop whose network needs fast matrices that a layer was built without.

    Args:
        argument: the name by which messages call the inner loop.
        inner: the inner loop.
        needed: shapes of its matrices by name, without heads.
        built: shapes of the layer's.

    Raises:
        ValueError: a matrix that is missing or of another shape.
    """
    kind = type(inner.network).__name__
    for name, shape in needed.items():
        has = built.get(name)
        if has != shape:
            what = "has none of that name" if has is None else f"has it as {list(has)}"
            raise ValueError(
                f"{argument}'s network {kind} needs a fast matrix {name!r} of shape {list(shape)}; this layer {what} "
                f"(built: {', '.join(built)})"
            )
