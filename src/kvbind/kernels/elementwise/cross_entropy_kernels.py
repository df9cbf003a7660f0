"""The kernel of `cross_entropy`: a program per row, block by block of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import power_of_2
from kvbind.kernels.launching.launcher import Launcher

BLOCK = 4096
"""Logits at a time: with eight warps, two vectors of 16 bytes per thread of narrow ones."""

LOWEST = tl.constexpr(-3.0e38)
"""Where a running maximum starts: below all logits, and so that differences are finite."""


@Launcher
@triton.jit
def _cross_entropy(logits, labels, losses, V: tl.constexpr, IGNORED: tl.constexpr, GRADIENT: tl.constexpr, B: tl.constexpr):
    """The loss of one row of logits, and its gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    counted = label != IGNORED
    known = (label >= 0) & (label < V)
    here = tl.arange(0, B)
    most = tl.full((B,), LOWEST, tl.float32)
    total = tl.zeros((B,), tl.float32)
    # each place of a block has a maximum and a sum of its own, so that programs wait for a reduction once
    for start in range(0, V, B):
        there = start + here < V
        x = tl.load(logits + start + here, mask=there, other=LOWEST).to(tl.float32)
        higher = tl.maximum(most, x)
        total = total * tl.exp(most - higher) + tl.where(there, tl.exp(x - higher), 0.0)
        most = higher
    highest = tl.max(most, axis=0)
    total = tl.sum(total * tl.exp(most - highest), axis=0)
    own = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(counted, highest - own + tl.log(total), 0.0))
    if GRADIENT:
        # the label's logit must have been read by all before any is overwritten
        tl.debug_barrier()
        scale = 1.0 / total
        for start in range(0, V, B):
            there = start + here < V
            x = tl.load(logits + start + here, mask=there, other=LOWEST).to(tl.float32)
            slope = tl.exp(x - highest) * scale - tl.where(start + here == label, 1.0, 0.0)
            # chosen, not multiplied: rows of no loss may hold infinities
            slope = tl.where(counted, slope, 0.0)
            tl.store(logits + start + here, slope.to(logits.dtype.element_ty), mask=there)


def launch(logits: Tensor, labels: Tensor, losses: Tensor, ignored: int, gradient: bool) -> None:
    """Write the losses of rows with elements, and their gradients into `logits` where they are wanted."""
    rows, vocabulary = logits.shape
    block = min(BLOCK, power_of_2(vocabulary))
    with on_device_of(logits):
        _cross_entropy[rows,](
            logits,
            labels,
            losses,
            V=vocabulary,
            IGNORED=ignored,
            GRADIENT=gradient,
            B=block,
            num_warps=8 if block > 1024 else 4,
        )
