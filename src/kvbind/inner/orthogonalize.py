"""Newton-Schulz orthogonalization of an update (Muon), line 3 of the update rule."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbind.files import shortened
from kvbind.inner.value import Value

Coefficients = tuple[tuple[float, float, float], ...]

LANGUAGE_COEFFICIENTS: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""(a, b, c) of each iteration in the released LaCT language model (arXiv 2505.23884)."""

VIEWS_COEFFICIENTS: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5
"""(a, b, c) of each iteration in the released LaCT view-synthesis model (arXiv 2505.23884)."""


@dataclass(frozen=True, repr=False)
class NewtonSchulz(Value):
    """Newton-Schulz iteration that maps a matrix towards its nearest semi-orthogonal one.

    `X = G / (||G||_F + 1e-7)`, then for each `(a, b, c)`: `A = X X^T`, `X <- a X + (b A + c A A) X`.
    A matrix with more rows than columns is transposed first and back at the end, which only saves work.

    Attributes:
        coefficients: one `(a, b, c)` per iteration; default `LANGUAGE_COEFFICIENTS`.
        dtype: the precision of the iteration. `torch.bfloat16` (default, as released) and `torch.float16` are
            taken literally; `torch.float32` and `torch.float64` mean full precision, that is, at least this and
            never below the state's own dtype.
    """

    coefficients: Coefficients = LANGUAGE_COEFFICIENTS
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        rows = self.coefficients
        if not isinstance(rows, tuple | list) or not rows or not all(_is_triple(row) for row in rows):
            raise ValueError(
                f"coefficients must be a non-empty sequence of (a, b, c) triples of finite numbers; got {shortened(rows)}"
            )
        object.__setattr__(self, "coefficients", tuple(tuple(float(x) for x in row) for row in rows))
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", getattr(torch, self.dtype, self.dtype))
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"dtype must be bfloat16, float16, float32 or float64 of torch; got {self.dtype!r}")

    def __call__(self, matrix: Tensor) -> Tensor:
        """Orthogonalize `matrix` `[..., rows, columns]`; the result has its shape and dtype."""
        low = self.dtype.itemsize < 4
        x = matrix.to(self.dtype if low else torch.promote_types(self.dtype, matrix.dtype))
        x = x.reshape(-1, *matrix.shape[-2:])
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = x.mT
        # vector_norm's gradient at zero is zero where that of a root of a sum of squares is NaN
        x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
        for a, b, c in self.coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        if tall:
            x = x.mT
        return x.reshape(matrix.shape).to(matrix.dtype)


def _is_triple(row: Any) -> bool:
    return (
        isinstance(row, tuple | list)
        and len(row) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max for x in row)
    )
