"""Activations of fast networks, and their derivatives in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh", "identity"]


def silu_slope(u: Tensor) -> Tensor:
    """The derivative of silu: `sig(u) (1 + u (1 - sig(u)))`."""
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _gelu_slope(u: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(u / math.sqrt(2)))
    return cdf + u * torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(u: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (u + cubic * u**3))
    return 0.5 * (1 + t) + 0.5 * u * (1 - t * t) * scale * (1 + 3 * cubic * u * u)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (lambda u: F.gelu(u, approximate="tanh"), _gelu_tanh_slope),
    "relu": (F.relu, lambda u: (u > 0).to(u.dtype)),
    "silu": (F.silu, silu_slope),
    "tanh": (torch.tanh, lambda u: 1 - torch.tanh(u).square()),
    "identity": (lambda u: u, torch.ones_like),
}


def activation_of(name: Activation) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """An activation and its derivative."""
    return ACTIVATIONS[name]
