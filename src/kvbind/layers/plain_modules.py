"""When a layer's weights may be read past its `forward`: where it is what its class says, and nothing more.

Adapters, quantizers, parametrizations and offloaders replace a module, derive from its class, hook onto it or put another
`forward` in its place. A fused product runs where none of that is so; everywhere else the module is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

WEIGHTS = (nn.Parameter, Tensor)
"""Weights that are what they hold. Parameters become plain tensors under `torch.func` and FSDP; other classes of tensors, of
shards or quantized, are left to the module."""

Kind = TypeVar("Kind", bound=nn.Module)


def is_plain(module: nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling a module is nothing but the `forward` of `kind`.

    It is asked anew at every call, as hooks come and go; that takes the host a microsecond or two.

    Args:
        module: the module that is asked about.
        kind: its class, from which it may not be derived.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not nn.modules.module._has_any_global_hook()


def is_a_product(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer is `x W^T`, plus b where it has one, and no more, with weights that can be read."""
    if not is_plain(layer, nn.Linear):
        return False
    # looked up once, as modules look slowly
    weight, bias = layer.weight, layer.bias
    return type(weight) in WEIGHTS and (bias is None or type(bias) in WEIGHTS)


def input_dtype(layer: nn.Module, other: torch.dtype) -> torch.dtype:
    """The dtype in which a layer takes its input: that of its weight, or `other` where it has none or one of integers."""
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else other


def matrix_of(layer: nn.Module, width: int) -> Tensor:
    """The matrix `[out, in]` by which a linear layer without a bias multiplies, whatever has been put in its place.

    Where that is not its weight, as under an adapter or where it is quantized or not at hand, it is what the layer makes of
    unit vectors, in evaluation mode.

    Args:
        layer: the layer.
        width: how many channels it takes.
    """
    if type(layer) is nn.Linear and type(layer.weight) in WEIGHTS and not layer.weight.is_meta:
        return layer.weight
    trained = [module for module in layer.modules() if module.training]
    like = next((x for x in layer.parameters() if not x.is_meta), torch.empty(0))
    try:
        matrix: Tensor = layer.eval()(torch.eye(width, device=like.device, dtype=input_dtype(layer, torch.float32))).mT
    finally:
        for module in trained:
            module.training = True
    return matrix


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Have a module's own parameters at hand outside its `forward`, also where accelerate keeps them elsewhere."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
