"""How many tokens per second an inner loop trains at: forward and backward of `kvbind.ttt` alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvbind.forms.api import Form, ttt
from kvbind.inner import InnerLoop


@dataclass(frozen=True)
class Shape:
    """The operands of one call.

    Attributes:
        batch: sequences.
        tokens: per sequence.
        heads: fast heads.
        width: channels of keys, values and the hidden layer, per head.
    """

    batch: int
    tokens: int
    heads: int
    width: int


def training_pass(inner: InnerLoop, shape: Shape, form: Form, device: torch.device) -> Callable[[], None]:
    """One forward and backward pass of an inner loop, to be called again and again.

    Operands are float32 on a CPU and bfloat16 elsewhere; gradients are taken of every one of them and of the starting
    weights, as a layer's training does.

    Args:
        inner: the inner loop.
        shape: of its operands.
        form: "recurrent" or "parallel".
        device: where to run.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = (shape.batch, shape.tokens, shape.heads)

    def leaf(x: torch.Tensor, to: torch.dtype = torch.float32) -> torch.Tensor:
        return x.to(device, to).requires_grad_()

    q, k, v = (torch.randn(*size, shape.width, generator=generator) for _ in range(3))
    operands = [leaf(F.normalize(q, dim=-1), dtype), leaf(F.normalize(k, dim=-1), dtype), leaf(v, dtype)]
    start = inner.network.initial(shape.heads, shape.width, shape.width, generator=generator)
    weights = {name: leaf(x) for name, x in start.items()}
    rates = {name: leaf(torch.full(size, 1e-2)) for name in inner.updated} if inner.token_lr else 1.0
    momentum = leaf(torch.rand(*size, generator=generator)) if inner.momentum else None
    retention = leaf(0.9 + 0.1 * torch.rand(*size, generator=generator)) if inner.retention else None
    leaves = [x for x in (*operands, *weights.values(), momentum, retention) if x is not None]
    leaves += list(rates.values()) if isinstance(rates, dict) else []

    def once() -> None:
        output, _ = ttt(inner, weights, *operands, lr=rates, momentum=momentum, retention=retention, form=form)
        torch.autograd.grad(output.float().square().sum(), leaves, allow_unused=True)

    return once


def tokens_per_second(
    cases: Sequence[tuple[InnerLoop, Form]], shape: Shape, device: torch.device, *, rounds: int = 9
) -> list[float]:
    """Tokens per second of each inner loop in its form: the median over rounds in which each has one pass.

    In turn, so that whatever else the machine does at one time slows all of them alike.

    Args:
        cases: inner loops and forms.
        shape: of the operands.
        device: where to run.
        rounds: passes of each.
    """
    passes = [training_pass(inner, shape, form, device) for inner, form in cases]
    for once in passes:
        once()  # kernels are chosen, and on GPUs compiled, in the first pass
    times: list[list[float]] = [[] for _ in passes]
    for _ in range(rounds):
        for once, taken in zip(passes, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            once()
            synchronize(device)
            taken.append(time.perf_counter() - start)
    return [shape.batch * shape.tokens / statistics.median(taken) for taken in times]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
