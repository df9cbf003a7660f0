"""Binding losses: what the inner loop minimizes over keys and values."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Loss = Literal["dot", "squared"]


def loss_value(loss: Loss, prediction: Tensor, v: Tensor) -> Tensor:
    """`L(f(k), v)` of each token: `-<f(k), v>` or `1/2 ||f(k) - v||^2`; `[..., D]` to `[...]`."""
    if loss == "dot":
        return -(prediction * v).sum(-1)
    return 0.5 * (prediction - v).square().sum(-1)


def descent_direction(loss: Loss, prediction: Tensor | None, v: Tensor) -> Tensor:
    """`g = -dL/df`: `v` for the dot product, which reads no prediction; `v - f(k)` for the squared error."""
    if loss == "dot":
        return v
    assert prediction is not None
    return v - prediction
