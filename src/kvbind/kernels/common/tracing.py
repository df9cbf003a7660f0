"""What is at work around an operator: tracing, export, transforms of `torch.func`, tensors without values of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)

_ASKED = (
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_are_functorch_transforms_active"),
    (torch.autograd, "_profiler_enabled"),
    (forward_ad, "_current_level"),
    (torch._C, "_get_tracing_state"),
)

# not of PyTorch's public interface: where one is missing, the dispatcher has all calls
_KNOWN = all(hasattr(*place) for place in _ASKED)


def has_tangents() -> bool:
    """Whether forward-mode differentiation is at work."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    # one whose presence cannot be asked for is not taken to be there
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (active is not None and active()) or has_tangents()


def is_mapped(x: Tensor) -> bool:
    """Whether a tensor is many tensors, under `vmap`."""
    while is_transformed() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def has_values(x: Tensor) -> bool:
    """Whether the host may read a tensor's values: not under a compiler, nor of a fake tensor or one that is many."""
    return type(x) in PLAIN and not torch.compiler.is_compiling() and not x.is_meta and not is_mapped(x)


def is_exported() -> bool:
    """Whether `torch.export` is tracing, alone or for ONNX: sizes may then be symbols, on which nothing may branch."""
    return torch.compiler.is_exporting()


def is_for_onnx() -> bool:
    """Whether that is for ONNX, which knows no operators of ours."""
    return is_exported() and torch.onnx.is_in_onnx_export()


def is_eager() -> bool:
    """Whether operators run as they are called: nothing traces, transforms or replaces them."""
    if not _KNOWN or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if is_transformed():
        return False
    return torch._C._get_tracing_state() is None


def is_unwatched(args: tuple[Any, ...]) -> bool:
    """Whether nothing sees an operator of these arguments but, perhaps, autograd."""
    if not is_eager() or torch.autograd._profiler_enabled():
        return False
    # memory of a negated view has numbers of the other sign, which the dispatcher turns
    return all(type(x) in PLAIN and not x.is_neg() for x in args if isinstance(x, Tensor))


def is_differentiated(args: Sequence[Any]) -> bool:
    """Whether autograd has gradients to find of one of these arguments, or of a tensor in a list of them."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad if isinstance(x, Tensor) else type(x) is list and is_differentiated(x) for x in args)
