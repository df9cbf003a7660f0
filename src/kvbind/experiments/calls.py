"""The calls of `kvbind.ttt` that a model's layers make: real operands, whatever the layer around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvbind.forms.api import ttt
from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.layers.fast_weights import FastWeightLayer
from kvbind.layers.full import InnerCall
from kvbind.layers.lact import LactLayer
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.layout import Layout
from kvbind.layers.rotary import Tables
from kvbind.layers.vittt import VitttLayer

LAYERS = (LactLayer, FastWeightLayer, LactNvsLayer, VitttLayer)
"""Those that call `ttt`."""


@dataclass(frozen=True)
class Call:
    """A call of `ttt`.

    Attributes:
        spec: the inner loop.
        weights: starting fast weights by matrix name.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        options: the keyword arguments that are not None.
    """

    spec: InnerLoop
    weights: dict[str, Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def output(self) -> Tensor:
        """What it gives, `[B, T, H, Dv]`."""
        return ttt(self.spec, self.weights, self.q, self.k, self.v, **self.options)[0]


@contextmanager
def seen_calls(model: nn.Module, see: Callable[[Call], None]) -> Iterator[None]:
    """Show every call that a model's layers make, in their order, to `see`; what they compute stays the same.

    Raises:
        ValueError: in the model's forward pass, a layer that goes on from a state.
    """

    def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for call in calls_of(layer, *arguments, **named):
            see(call)

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def calls_of(layer: nn.Module, *arguments: Any, **named: Any) -> list[Call]:
    """The calls that a layer makes, given what its `forward` is given."""
    if isinstance(layer, LactLayer | FastWeightLayer):
        return [of_text(layer, *arguments, **named)]
    if isinstance(layer, LactNvsLayer):
        return [of_views(layer, *arguments, **named)]
    return [as_call(call) for call in layer.calls(*arguments, **named)]  # type: ignore[operator]


def of_text(
    layer: LactLayer | FastWeightLayer,
    x: Tensor,
    layout: Layout | None = None,
    tables: Tables | None = None,
    state: Any = None,
    return_state: bool = False,
) -> Call:
    """The call of a language model's layer."""
    check_from_start(state)
    return as_call(layer.call(x, layout, tables))


def of_views(
    layer: LactNvsLayer, x: Tensor, update_tokens: slice | Tensor | None = None, state: State | None = None
) -> Call:
    """The call of a view synthesis model's layer."""
    check_from_start(state)
    return as_call(layer.call(x), update_tokens)


def as_call(call: InnerCall, update_tokens: slice | Tensor | None = None) -> Call:
    """A layer's call with its options by name."""
    options = {"lr": call.lr, **call.gates, "cu_seqlens": call.cu_seqlens, "update_tokens": update_tokens}
    given = {name: x for name, x in options.items() if x is not None}
    return Call(call.inner, call.weights, call.q, call.k, call.v, given)


def check_from_start(state: Any) -> None:
    """Refuse a layer that goes on from a state.

    Raises:
        ValueError: it does.
    """
    if state is not None:
        raise ValueError("state must be None: a call that goes on from one cannot be looked at from its start")
