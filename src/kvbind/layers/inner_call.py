"""The call of `kvbind.ttt` that a layer makes: its arguments as a value, and its rows as a layout says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvbind.forms.api import ttt
from kvbind.forms.attention.linear_attention import LinearAttention
from kvbind.forms.attention.linearize import linearize
from kvbind.forms.evaluate import Form
from kvbind.forms.packed import packed
from kvbind.forms.state import State
from kvbind.forms.validation import LearningRate
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.tracing import is_eager
from kvbind.layers.layout import Layout
from kvbind.sequence.boundaries import Boundaries


class InnerCall(NamedTuple):
    """The arguments with which a layer calls `kvbind.ttt`, to run or to analyse.

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


def check_input(x: Tensor, width: int) -> None:
    """Refuse what no layer mixes.

    Args:
        x: a layer's input.
        width: of its tokens.

    Raises:
        ValueError: anything but `[B, T, width]` with at least one sequence.
    """
    if x.dim() != 3 or x.shape[2] != width or not x.shape[0]:
        raise ValueError(f"x must be [B, T, {width}] with at least one sequence; got shape {list(x.shape)}")


class LayerState(Protocol):
    """Where sequences stopped in a layer."""

    @property
    def seen(self) -> tuple[int, ...]:
        """How many tokens each sequence has had."""


def check_state(
    x: Tensor, layout: Layout | None, state: LayerState | None, kind: type, return_state: bool
) -> tuple[int, ...]:
    """Refuse a state that does not go with what a causal layer is given.

    Args:
        x: the layer's input `[B, T, d]`.
        layout: where its tokens sit; None for rows of equal length.
        state: where earlier tokens left off.
        kind: the class of the layer's states.
        return_state: a state is wanted.

    Returns:
        How many tokens each row has had; empty without a state.

    Raises:
        TypeError: a state of another kind of layer.
        ValueError: a state of another batch, or one given or wanted of packed rows or of a slice of rows.
    """
    if state is not None and not isinstance(state, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"state must be {article} {kind.__name__}, as this layer returns it; got {type(state).__name__}")
    seen = () if state is None else state.seen
    if state is not None and len(seen) != len(x):
        raise ValueError(f"state must be of {len(x)} sequences, as x has; got {len(seen)}")
    if layout is not None and (state is not None or return_state):
        if layout.cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None where a state is given or wanted: a packed row has no one state")
        if layout.sequence is not None:
            raise ValueError("a row that is cut over ranks has no state to go on from or to return")
    return seen


def run_rows(
    inner: InnerLoop,
    weights: dict[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: LearningRate,
    gates: Mapping[str, Tensor],
    layout: Layout,
    *,
    form: Form,
    state: State | None,
    return_state: bool,
) -> tuple[Tensor, State | None]:
    """Run an inner loop over rows, packed rows, slices of rows, or rows with padding behind their tokens.

    Args:
        inner: the inner loop.
        weights: starting fast weights; None where there is a state.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T n, H, Dk]`, the n writes of a token side by side.
        v: values, likewise.
        lr: rates, as `kvbind.ttt` takes them.
        gates: what else it takes of tokens, by name.
        layout: where the tokens sit.
        form: as `kvbind.ttt` takes it.
        state: where earlier tokens left off.
        return_state: a state is wanted.

    Returns:
        Outputs `[B, T, H, Dv]`, and the state or None.
    """
    if isinstance(layout.cu_seqlens, Boundaries):
        assert weights is not None
        return packed(inner, weights, q, k, v, layout.cu_seqlens, lr=lr, form=form, **gates), None
    if layout.lengths is None or not return_state:
        # padding sits behind a row's tokens, which do not see it; only what they leave behind would
        shard = layout.sequence
        documents = layout.cu_seqlens if shard is None else None
        output, after = ttt(
            inner, weights, q, k, v, lr=lr, **gates, state=state, cu_seqlens=documents, form=form, sequence=shard
        )
        return output, _kept(after, q.shape[1]) if return_state else None
    real = torch.arange(q.shape[1], device=q.device) < torch.tensor(layout.lengths, device=q.device)[:, None]
    bounds = [0]
    for length in layout.lengths:
        bounds.append(bounds[-1] + length)

    def chosen(x: Tensor) -> Tensor:
        each = x.shape[1] // q.shape[1]
        return x[real if each == 1 else real.repeat_interleave(each, dim=1)][None]

    def chosen_rate(rate: Tensor | float) -> Tensor | float:
        return chosen(rate) if isinstance(rate, Tensor) else rate

    rates = {name: chosen_rate(rate) for name, rate in lr.items()} if isinstance(lr, Mapping) else chosen_rate(lr)
    joined, after = ttt(
        inner, weights, chosen(q), chosen(k), chosen(v), lr=rates,
        **{name: chosen(gate) for name, gate in gates.items()}, state=state, cu_seqlens=bounds, form=form, sequence=None,
    )  # fmt: skip
    output = joined.new_zeros(*q.shape[:2], *joined.shape[2:])
    output[real] = joined[0]
    return output, _kept(after, q.shape[1])


def _kept(after: State, tokens: int) -> State:
    """A state that may be kept for long; of single tokens none has more memory than it needs."""
    return after.in_own_memory() if tokens > 1 and is_eager() else after
