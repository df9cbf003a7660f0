"""The calls of `kvbind.ttt` that a model's layers make: real operands, whatever the layer around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.forms.api import ttt
from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.inner_call import InnerCall
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.layout import Layout
from kvbind.layers.rotary import Tables
from kvbind.models.carry import LAYERS
from kvbind.train.graphs import to_device
from kvbind.train.step import precision


@dataclass(frozen=True)
class LayerCall:
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
def seen_calls(model: nn.Module, see: Callable[[LayerCall], None]) -> Iterator[None]:
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


@contextmanager
def changed(model: nn.Module, conv: bool = True, **fields: Any) -> Iterator[None]:
    """In here the inner loop of every layer has other fields; its weights stay.

    Args:
        model: any with such layers.
        conv: also of ViTTT's convolution, beside its heads.
        **fields: of `InnerLoop`.

    Raises:
        ValueError, TypeError: an inner loop that there is not, or that the layers cannot run.
    """
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    places = [(layer, name) for layer in layers for name in ("inner", "inner_conv")[: 1 + conv] if hasattr(layer, name)]
    before = [getattr(layer, name) for layer, name in places]
    try:
        for (layer, name), inner in zip(places, before, strict=True):
            setattr(layer, name, inner.replace(**fields))
        yield
    finally:
        for (layer, name), inner in zip(places, before, strict=True):
            setattr(layer, name, inner)


def first_calls(task: str, model: Any, opened: Any, config: Any, device: torch.device) -> list[list[LayerCall]]:
    """The calls of each layer on the first held-out batch; ViTTT's layers make two, of their heads and of the convolution.

    Args:
        task: its name.
        model: on the device; left in evaluation mode.
        opened: the task.
        config: of the run.
        device: where the model is.
    """
    calls: list[LayerCall] = []
    model.eval()
    with torch.no_grad(), precision(config.train, device), seen_calls(model, calls.append):
        FIRST[task](model, opened, config, device)
    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    each = len(calls) // len(layers)
    return [calls[i : i + each] for i in range(0, len(calls), each)]


def _language(model: Any, opened: Any, config: Any, device: torch.device) -> None:
    batch = to_device({name: x for name, x in opened.evaluation[0].items() if name != "labels"}, device)
    model(**batch, use_cache=False)


def _images(model: Any, opened: Any, config: Any, device: torch.device) -> None:
    from kvbind.tasks.images.augment import normalized

    count = min(len(opened.splits["held_out"].labels), config.data.evaluation_batch or config.data.batch, IMAGES)
    pixels = torch.stack([opened.held_out_image(i)[0] for i in range(count)])
    model(normalized(pixels.to(device), config.data.mean, config.data.std))


def _views(model: Any, opened: Any, config: Any, device: torch.device) -> None:
    from kvbind.tasks.views.drawing import evaluation_batches
    from kvbind.tasks.views.task import predict

    batch = to_device(next(iter(evaluation_batches(opened.held_out, config.data))), device)
    predict(model, opened.held_out.pixels(batch["image"], device), batch)


IMAGES = 32
"""Held-out images in a first batch at most."""

FIRST = {"language": _language, "images": _images, "views": _views}
"""By task, a model on the first held-out batch."""


def calls_of(layer: nn.Module, *arguments: Any, **named: Any) -> list[LayerCall]:
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
) -> LayerCall:
    """The call of a language model's layer."""
    check_from_start(state)
    return as_call(layer.call(x, layout, tables))


def of_views(
    layer: LactNvsLayer, x: Tensor, update_tokens: slice | Tensor | None = None, state: State | None = None
) -> LayerCall:
    """The call of a view synthesis model's layer."""
    check_from_start(state)
    return as_call(layer.call(x), update_tokens)


def as_call(call: InnerCall, update_tokens: slice | Tensor | None = None) -> LayerCall:
    """A layer's call with its options by name."""
    options = {"lr": call.lr, **call.gates, "cu_seqlens": call.cu_seqlens, "update_tokens": update_tokens}
    given = {name: x for name, x in options.items() if x is not None}
    return LayerCall(call.inner, call.weights, call.q, call.k, call.v, given)


def check_from_start(state: Any) -> None:
    """Refuse a layer that goes on from a state.

    Raises:
        ValueError: it does.
    """
    if state is not None:
        raise ValueError("state must be None: a call that goes on from one cannot be looked at from its start")
