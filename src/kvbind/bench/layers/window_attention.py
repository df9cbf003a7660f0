"""`kvbind bench attention`: window attention in training, compiled for its length or for any, with keys ahead and without.

Keys ahead are what a rank gets from the one before it where a sequence is cut (`kvbind.sequence_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvbind.bench.harness.timing import median_seconds, now
from kvbind.layers.attention import window_attention as module
from kvbind.layers.attention.window_attention import halo_of, window_attention

OWN, SHARED, BLOCKS = "own", "any length", "blocks"
"""What runs: a kernel compiled for the length alone, one for any length, or attention in blocks."""


def bench_attention(
    tokens: int, heads: int, width: int, window: int, device: torch.device, *, seconds: float = 1.0
) -> Iterator[dict[str, Any]]:
    """Time one row of tokens in every way; batch 1, bfloat16 on a GPU and float32 on a CPU.

    FlexAttention is for GPUs: on a CPU there is one way, in blocks.

    Args:
        tokens: in the row.
        heads: of queries, keys and values alike.
        width: channels of a head.
        window: tokens that a token sees.
        device: where to run.
        seconds: how long to time each.

    Yields:
        Rows: `kernel`, `ahead` in tokens, `first_seconds` of a forward and backward pass that compiles, and, compiled,
        `forward_seconds` and, forward and backward, `training_seconds`.
    """
    for kernel in (OWN, SHARED) if device.type == "cuda" else (BLOCKS,):
        for ahead in (0, halo_of(window)):
            with patch.multiple(module, OWN_KERNELS=module.OWN_KERNELS * (kernel == OWN), _OWN=set()):
                if kernel == SHARED:  # which takes any length from the second that it meets
                    _training(_operands(max(tokens // 2, window + 1), 0, heads, width, device), window, 0)
                operands = _operands(tokens, ahead, heads, width, device)
                training = partial(_training, operands, window, ahead)
                begin = now(device)
                training()
                first = now(device) - begin
                forward = partial(window_attention, *operands, window=window, ahead=ahead)
                read, both = median_seconds([forward, training], device, seconds=seconds)
            yield {
                "kernel": kernel, "ahead": ahead, "first_seconds": first, "forward_seconds": read, "training_seconds": both,
            }  # fmt: skip


def _operands(tokens: int, ahead: int, heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(length: int) -> Tensor:
        return torch.randn(1, length, heads, width, generator=generator, device=device, dtype=dtype, requires_grad=True)

    return normal(tokens), normal(ahead + tokens), normal(ahead + tokens)


def _training(operands: tuple[Tensor, Tensor, Tensor], window: int, ahead: int) -> None:
    output = window_attention(*operands, window, ahead=ahead)
    torch.autograd.grad(output, operands, torch.ones_like(output))
