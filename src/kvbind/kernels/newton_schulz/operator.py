r"""Newton-Schulz orthogonalization of batches of matrices.

Every matrix is held wide, `m` rows by `k >= m` columns. One iteration with coefficients `(a, b, c)`, and its gradient from
`D = dL/dX'`, are

    A = X X^T,   B = b A + c A A,   X' = a X + B X
    E = D X^T + X D^T,   F = b E + c (E A + A E),   dL/dX = a D + B D + F X

X before each iteration is all that is saved for the gradient.

Matrices that fit one program (`fits_one_program`) run all their iterations there. Larger ones are worked on tile by tile,
by `kvbind.kernels.newton_schulz.tiled`. All sums run in a fixed order: results repeat bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.newton_schulz import tiled as products
from kvbind.kernels.newton_schulz.one_program import LOW, fits_one_program, whole_backward, whole_forward, whole_options
from kvbind.kernels.newton_schulz.tiled import pieces


def newton_schulz(
    x: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Map every matrix of a batch towards its nearest semi-orthogonal one (Muon; arXiv 2505.23884 for its use here).

    `X = x / (||x||_F + 1e-7)`, then for each `(a, b, c)`: `A = X X^T`, `X <- a X + (b A + c A A) X`. A matrix with more
    rows than columns is read and written transposed.

    Args:
        x: `[..., M, N]`, float32, bfloat16 or float16, of any strides.
        coefficients: one `(a, b, c)` per iteration.
        dtype: precision of the operands of all products, and to which X is rounded before each of them; sums are in float32.
            In float32, products obey `torch.set_float32_matmul_precision`. The last X is not rounded to it.
        out_dtype: dtype of the result; default that of `x`.

    Returns:
        `[..., M, N]`, contiguous; differentiable once.

    Raises:
        TypeError: a dtype other than bfloat16, float16 and float32.
        ValueError: `x` is no matrix, or `coefficients` are no triples.
    """
    _check(x, coefficients, dtype, out_dtype)
    keep = torch.is_grad_enabled() and x.requires_grad
    return _newton_schulz(x, _flat(coefficients), dtype, out_dtype or x.dtype, keep)[0]


def _wide(x: Tensor) -> tuple[Tensor, bool]:
    """`x` as `[n, m, k]` with `m <= k`, a view wherever one exists, and whether that transposed it."""
    rows, columns = x.shape[-2:]
    x = x.reshape(-1, rows, columns)
    return (x.mT, True) if rows > columns else (x, False)


def _strides(tall: bool, rows: int, columns: int) -> tuple[int, int]:
    """Strides by which a wide matrix is written to contiguous memory, transposed back if it was tall."""
    return (1, rows) if tall else (columns, 1)


def _check(x: Tensor, coefficients: Sequence[Sequence[float]], dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must be a matrix or a batch of them, [..., M, N]; got shape {tuple(x.shape)}")
    for name, value in (
        ("x's dtype", x.dtype),
        ("dtype", dtype),
        ("out_dtype", x.dtype if out_dtype is None else out_dtype),
    ):
        if value not in LOW:
            raise TypeError(f"{name} must be torch.bfloat16, torch.float16 or torch.float32; got {value}")
    if not coefficients or any(not isinstance(row, Sequence) or len(row) != 3 for row in coefficients):
        raise ValueError(f"coefficients must be a non-empty sequence of (a, b, c) triples; got {coefficients!r}")


def newton_schulz_forward(
    x: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype,
    keep: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Orthogonalize without autograd, for use inside other operators.

    Args:
        x: `[..., M, N]`, float32, bfloat16 or float16, of any strides.
        coefficients: one `(a, b, c)` per iteration.
        dtype: precision of the products' operands; sums are in float32.
        keep: whether `newton_schulz_backward` will be called.
        out_dtype: dtype of the result; default that of `x`.

    Returns:
        The result `[..., M, N]`, contiguous, and what the gradient needs: the wide matrix before each iteration
        `[iterations, n, min(M, N), max(M, N)]` in `dtype`, and sums of squares `[n, pieces]` in float32. Both are new
        tensors, with no elements unless `keep`.
    """
    wide, tall = _wide(x)
    n, m, k = wide.shape
    out = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    saved = torch.empty(_saved_shape(wide.shape, len(coefficients), keep), dtype=dtype, device=x.device)
    squares = torch.empty(_squares_shape(wide.shape, dtype, keep), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, (saved, squares)
    row, column = _strides(tall, m, k)
    with on_device_of(x):
        if fits_one_program(m, k, dtype):
            whole_forward[(n,)](
                wide, out, saved if keep else None, squares if keep else None, n, *wide.stride(),
                COEFFICIENTS=_flat(coefficients), M=m, N=k, OUT_ROW=row, OUT_COLUMN=column, **whole_options(m, k, dtype),
            )  # fmt: skip
            return out, (saved, squares)
        sums = squares if keep else squares.new_empty(n, pieces(m, k))
        states = saved if keep else saved.new_empty(min(2, len(coefficients)), n, m, k)
        products.forward(wide, out, (row, column), states, sums, _flat(coefficients))
    return out, (saved, squares)


def newton_schulz_backward(
    saved: Sequence[Tensor],
    grad: Tensor,
    coefficients: Sequence[Sequence[float]],
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of `newton_schulz_forward` with respect to `x`.

    At `x = 0` the norm counts as constant, as in the reference implementation: the result is then the finite gradient of `x
    / 1e-7`.

    Args:
        saved: the second value that `newton_schulz_forward` returned with `keep=True`.
        grad: gradient of the result, `[..., M, N]`, of any floating-point dtype of 32 bits or fewer and any strides.
        coefficients: as in the forward call.
        dtype: as in the forward call.
        out_dtype: dtype of the gradient returned; default that of `grad`.

    Returns:
        `[..., M, N]`, contiguous.
    """
    states, squares = saved
    wide, tall = _wide(grad)
    n, m, k = wide.shape
    out = torch.empty(grad.shape, dtype=out_dtype or grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out
    row, column = _strides(tall, m, k)
    with on_device_of(grad):
        if fits_one_program(m, k, dtype):
            whole_backward[(n,)](
                states, squares, wide, out, n, *wide.stride(), COEFFICIENTS=_flat(coefficients), M=m, N=k, OUT_ROW=row,
                OUT_COLUMN=column, **whole_options(m, k, dtype),
            )  # fmt: skip
            return out
        products.backward(wide, out, (row, column), states, squares, _flat(coefficients))
    return out


class BoundNewtonSchulz:
    """`newton_schulz_forward` and its gradient of contiguous matrices `[n, M, N]` of one shape, launched at little cost.

    Args:
        shape: n, M, N; none of them 0.
        coefficients: one `(a, b, c)` per iteration.
        dtype: precision of the products' operands.
        keep: whether there is a gradient.
        processors: multiprocessors of the device.
    """

    def __init__(
        self, shape: Sequence[int], coefficients: Sequence[Sequence[float]], dtype: torch.dtype, keep: bool, processors: int
    ) -> None:
        n, rows, columns = self.shape = tuple(shape)
        self.dtype, flat, tall = dtype, _flat(coefficients), rows > columns
        m, k = sorted((rows, columns))
        row, column = _strides(tall, m, k)
        self.whole = fits_one_program(m, k, dtype)
        self.squares = n, 1 if self.whole else pieces(m, k)
        self.saved = len(coefficients) if keep else min(2, len(coefficients)), n, m, k
        self.keep = keep
        strides = rows * columns, row, column
        if self.whole:
            constants = {"COEFFICIENTS": flat, "M": m, "N": k, "OUT_ROW": row, "OUT_COLUMN": column}
            constants |= whole_options(m, k, dtype)
            self.whole_forward = whole_forward.bound(4, (n,), (n, *strides), **constants)
            self.whole_backward = whole_backward.bound(4, (n,), (n, *strides), **constants)
        else:
            calls = products.TiledCalls((n, m, k), strides, (row, column), flat, dtype, processors)
            self.tiled_forward = products.TiledForward(calls, self.saved[0], bound=True)
            self.tiled_backward = products.TiledBackward(calls, bound=True)

    def forward(self, stream: int, x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """What `newton_schulz_forward` returns, on a stream of the current device; what is not kept may be None."""
        out = x.new_empty(self.shape, dtype=out_dtype)
        saved = squares = None
        if self.keep or not self.whole:
            saved = x.new_empty(self.saved, dtype=self.dtype)
            squares = x.new_empty(self.squares, dtype=torch.float32)
        if self.whole:
            self.whole_forward(stream, x, out, saved, squares)
            return out, (saved, squares)
        assert saved is not None
        assert squares is not None
        self.tiled_forward(stream, x, out, saved, squares)
        return out, (saved, squares) if self.keep else (None, None)

    def backward(self, stream: int, saved: Sequence[Tensor], grad: Tensor, out_dtype: torch.dtype) -> Tensor:
        """What `newton_schulz_backward` returns, of a contiguous gradient."""
        out = grad.new_empty(self.shape, dtype=out_dtype)
        states, squares = saved
        if self.whole:
            self.whole_backward(stream, states, squares, grad, out)
        else:
            self.tiled_backward(stream, grad, out, states, squares)
        return out


def _flat(coefficients: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(float(value) for row in coefficients for value in row)


def _triples(values: Sequence[float]) -> list[tuple[float, ...]]:
    return [tuple(values[i : i + 3]) for i in range(0, len(values), 3)]


def _saved_shape(wide: Sequence[int], iterations: int, keep: bool) -> tuple[int, ...]:
    return (iterations, *wide) if keep else (0,)


def _squares_shape(wide: Sequence[int], dtype: torch.dtype, keep: bool) -> tuple[int, ...]:
    if not keep:
        return (0,)
    # widths are compiled into the kernels: where a trace has them as symbols, it takes their values
    m, k = int(wide[1]), int(wide[2])
    return (wide[0], 1 if fits_one_program(m, k, dtype) else pieces(m, k))


def saved_shapes(
    shape: Sequence[int], iterations: int, dtype: torch.dtype, keep: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of what `newton_schulz_forward` keeps of matrices `[..., M, N]`."""
    rows, columns = sorted(shape[-2:])
    wide = (math.prod(shape[:-2]), rows, columns)
    return _saved_shape(wide, iterations, keep), _squares_shape(wide, dtype, keep)


@torch.library.custom_op("kvbind::newton_schulz", mutates_args=())
def _newton_schulz(
    x: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    out, saved = newton_schulz_forward(x, _triples(coefficients), dtype, keep, out_dtype)
    return out, *saved


@_newton_schulz.register_fake
def _(
    x: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, _ = _wide(x)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(_saved_shape(wide.shape, len(coefficients) // 3, keep), dtype=dtype),
        x.new_empty(_squares_shape(wide.shape, dtype, keep), dtype=torch.float32),
    )


@torch.library.custom_op("kvbind::newton_schulz_backward", mutates_args=())
def _newton_schulz_backward(
    states: Tensor, squares: Tensor, grad: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    return newton_schulz_backward((states, squares), grad, _triples(coefficients), dtype, out_dtype)


@_newton_schulz_backward.register_fake
def _(
    states: Tensor, squares: Tensor, grad: Tensor, coefficients: Sequence[float], dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(grad.shape, dtype=out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.coefficients, ctx.dtype, _, ctx.keep = inputs
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    if not ctx.keep:
        raise RuntimeError("kvbind::newton_schulz was called with keep=False, so that it has no gradient")
    states, squares = ctx.saved_tensors
    return _newton_schulz_backward(states, squares, grad, ctx.coefficients, ctx.dtype, ctx.x_dtype), None, None, None, None


_newton_schulz.register_autograd(_backward, setup_context=_setup_context)
