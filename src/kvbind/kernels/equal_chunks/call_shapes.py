"""What the launches of one call depend on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbind.kernels.equal_chunks.tma_products import Theta, TokenRows


@dataclass(frozen=True)
class CallShapes:
    """What one call's launches depend on; its tensors come later.

    Attributes:
        q: queries.
        k: keys, of as many tokens.
        v: values.
        chunk: tokens in a chunk, a multiple of `DEPTH`. The last chunk may be incomplete, unless `own`; it does not write.
        own: queries see their own chunk's write.
        sign: 1 for descent, -1 for ascent.
        theta: the matrices before the last, or None for features that are the keys themselves.
        start: strides of sequence and head of the state to start from, `[B, H, F, Dv]`.
        rates: strides of the rates, float32 `[B, T, H]`; None for 1.
        momentum: there are momentum gates; the buffer starts from zeros.
        decay: there are decay gates.
        coefficients: Newton-Schulz's; empty for no orthogonalization.
        precision: of its products.
    """

    q: TokenRows
    k: TokenRows
    v: TokenRows
    chunk: int
    own: bool
    sign: float
    theta: Theta | None
    start: tuple[int, int]
    rates: tuple[int, ...] | None
    momentum: bool
    decay: bool
    coefficients: tuple[tuple[float, float, float], ...]
    precision: torch.dtype
