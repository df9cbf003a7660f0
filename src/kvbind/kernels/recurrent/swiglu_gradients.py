r"""What a chunk of tokens writes to a SwiGLU network, `f(x) = (silu(x W_gate) * (x W_up)) W_down`, and its gradient.

With `u = k W_gate`, `p = k W_up`, `s = silu(u)`, `s' = silu'(u)`, `h = s p`, `X = v W_down^T` and rates `r` of each matrix,
the gradient of the binding loss (specification, section 1) is a product over the chunk's tokens,

    G_gate = k^T A_gate    A_gate = r_gate X p s'
    G_up   = k^T A_up      A_up   = r_up X s
    G_down = h_r^T v       h_r    = r_down h

`factors` computes A_gate, A_up and h_r: three products that share one pass over k and v. With q and the outputs' gradient
in place of k and v, and without rates, the same three are what the gradient of a read `o = h W_down` needs: the gradients
of u and of p, and h.

The gradient of a write, from those of the three G (the `second_factors`), with `Y_gate = k dG_gate`, `Y_up = k dG_up`,
`Z = v dG_down^T` and `s'' = silu''(u)`:

    E  = dL/dX = r_up Y_up s + r_gate Y_gate p s'
    du = r_up Y_up X s' + r_gate Y_gate X p s'' + r_down Z p s'
    dp = r_gate Y_gate X s' + r_down Z s
    dr_gate = <Y_gate, X p s'>    dr_up = <Y_up, X s>    dr_down = <Z, h>       token by token

    dk = A_gate dG_gate^T + A_up dG_up^T + du W_gate^T + dp W_up^T
    dv = h_r dG_down + E W_down
    dW_gate += k^T du    dW_up += k^T dp    dW_down += E^T v

Where W_gate and W_up stay as they are, only Z counts: `du = r_down Z p s'`, `dp = r_down Z s` and h_r are `factors` again,
with dG_down in place of W_down and one rate for all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv, dot_precision
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.recurrent.chunk_matmul import Tile

FACTORS = Tile(128, 64, 32, 8, 3)
SECOND = Tile(64, 64, 64, 8, 2)
FULL_PRECISION = Tile(32, 32, 32, 4, 2)


@triton.jit
def _silu(u):
    sig = tl.sigmoid(u)
    slope = sig * (1 + u * (1 - sig))
    return u * sig, slope, sig * (1 - sig) * (2 + u * (1 - 2 * sig))


@triton.jit
def _rate(rates, which, rate_r, rows, inside):
    return tl.load(rates + which * rate_r + rows, mask=inside, other=0.0)[:, None]


@triton.jit
def _where(tiles_n, chunk, heads, BM: tl.constexpr):
    """Column tile, first token, tokens left, batch and head of this program; column tiles side by side."""
    n, index = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    tiles = tl.cdiv(chunk, BM)
    c, m = (index // tiles).to(tl.int64), index % tiles
    z = tl.program_id(1).to(tl.int64)
    return n, c, c * chunk + m * BM, chunk - m * BM, z, z // heads, z % heads


@Launcher
@triton.jit(do_not_specialize=["heads", "chunk", "rate_r", "rate_b", "rate_t", "rate_h", "sum_n", "sum_z"])
def _factors_kernel(
    x, y, theta, last, rates, out, sums, heads, chunk,
    x_b, x_t, x_h, y_b, y_t, y_h, theta_c, theta_z, last_c, last_z, rate_r, rate_b, rate_t, rate_h,
    out_j, out_z, sum_n, sum_z,
    KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr,
    PULL: tl.constexpr, RATED: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = max(KEY, VALUE) if PULL else KEY
    even: tl.constexpr = KEY % BK == 0 and (not PULL or KEY == VALUE)
    out_j = out_j.to(tl.int64)
    n, c, first, left, z, b, head = _where(tl.cdiv(HIDDEN, BN), chunk, heads, BM)
    rows, inner, j = tl.arange(0, BM), tl.arange(0, BK), n * BN + tl.arange(0, BN)
    inside = rows < left
    column = j % HIDDEN
    xs = x + b * x_b + head * x_h + first * x_t + rows[:, None] * x_t + inner[None, :]
    ys = y + b * y_b + head * y_h + first * y_t + rows[:, None] * y_t + inner[None, :]
    gates = theta + c * theta_c + z * theta_z + inner[:, None] * HIDDEN + column[None, :]
    lasts = last + c * last_c + z * last_z + column[None, :] * VALUE + inner[:, None]
    u, p, d = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k in range(0, width, BK):
        if even:
            a = tl.load(xs + k, mask=inside[:, None], other=0.0)
            w_gate = tl.load(gates + k * HIDDEN)
            w_up = tl.load(gates + (KEY + k) * HIDDEN)
        else:
            within = inner < KEY - k
            a = tl.load(xs + k, mask=inside[:, None] & within[None, :], other=0.0)
            w_gate = tl.load(gates + k * HIDDEN, mask=within[:, None], other=0.0)
            w_up = tl.load(gates + (KEY + k) * HIDDEN, mask=within[:, None], other=0.0)
        u = tl.dot(a, w_gate, u, input_precision=PRECISION)
        p = tl.dot(a, w_up, p, input_precision=PRECISION)
        if PULL:
            if even:
                g = tl.load(ys + k, mask=inside[:, None], other=0.0)
                w_last = tl.load(lasts + k)
            else:
                within = inner < VALUE - k
                g = tl.load(ys + k, mask=inside[:, None] & within[None, :], other=0.0)
                w_last = tl.load(lasts + k, mask=within[:, None], other=0.0)
            d = tl.dot(g, w_last, d, input_precision=PRECISION)
    s, slope, _ = _silu(u)
    h = s * p
    stored = inside[:, None] & (j < HIDDEN)[None, :]
    place = out + z * out_z + (first + rows)[:, None] * HIDDEN + j[None, :]
    if SUMS:
        dots = tl.sum(tl.where(stored, h * d, 0.0), 1)
        tl.store(sums + n * sum_n + z * sum_z + first + rows, dots, mask=inside)
    tokens = b * rate_b + head * rate_h + (first + rows) * rate_t
    if PULL:
        a_gate, a_up = d * p * slope, d * s
        if RATED:
            a_gate *= _rate(rates, 0, rate_r, tokens, inside)
            a_up *= _rate(rates, 1, rate_r, tokens, inside)
        tl.store(place, a_gate.to(out.dtype.element_ty), mask=stored)
        tl.store(place + out_j, a_up.to(out.dtype.element_ty), mask=stored)
        place += 2 * out_j
    if RATED:
        h *= _rate(rates, 2 if PULL else 0, rate_r, tokens, inside)
    tl.store(place, h.to(out.dtype.element_ty), mask=stored)


def factors(
    x: Tensor,
    theta: Tensor,
    out: Tensor,
    chunk: int,
    *,
    y: Tensor | None = None,
    last: Tensor | None = None,
    rates: Tensor | None = None,
    sums: bool = False,
) -> Tensor | None:
    """The factors of a write, or of a read's gradient; or without `y` the features h alone.

    Args:
        x: `[B, T, H, Dk]`.
        theta: W_gate and W_up of each chunk, `[chunks, B*H, 2 * Dk * Dh]` in x's dtype; chunks may have stride 0.
        out: where to write A_gate, A_up and h_r, `[3, B*H, T, Dh]`, contiguous; without `y` the last alone,
            `[1, B*H, T, Dh]`.
        chunk: tokens in a chunk.
        y: `[B, T, H, Dv]`, what is pulled back through the last layer.
        last: the last layer, `[chunks, B*H, Dh * Dv]`.
        rates: float32 `[3, B, T, H]` (`[1, B, T, H]` without `y`), of any strides.
        sums: return `<h, y last^T>` of each token, before rates.

    Returns:
        Those, float32 `[B*H, T]`, or None.
    """
    batch, tokens, heads, key = x.shape
    z, hidden, chunks = batch * heads, out.shape[-1], tokens // chunk
    tile = FULL_PRECISION if x.dtype == torch.float32 else FACTORS
    across = cdiv(hidden, tile.columns)
    partial = torch.empty(across, z, tokens, dtype=torch.float32, device=x.device) if sums else None
    pulled, through, rate, summed = (
        fallback if t is None else t
        for t, fallback in ((y, x), (last, theta), (rates, x.unsqueeze(0)), (partial, x.flatten(2)))
    )
    with on_device_of(x):
        _factors_kernel[(across * cdiv(chunk, tile.rows) * chunks, z)](
            x, pulled, theta, through, rate, out, summed, heads, chunk,
            *x.stride()[:3], *pulled.stride()[:3], *theta.stride()[:2], *through.stride()[:2], *rate.stride()[:4],
            *out.stride()[:2], *summed.stride()[:2],
            KEY=key, HIDDEN=hidden, VALUE=pulled.shape[-1], PULL=y is not None, RATED=rates is not None, SUMS=sums,
            PRECISION=dot_precision(x.dtype), BM=tile.rows, BN=tile.columns, BK=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return None if partial is None else partial.sum(0)


@Launcher
@triton.jit(do_not_specialize=["heads", "chunk", "rate_r", "rate_b", "rate_t", "rate_h", "sum_r", "sum_n", "sum_z"])
def _second_kernel(
    k, v, theta, last, d_theta, d_last, rates, out, sums, heads, chunk,
    k_b, k_t, k_h, v_b, v_t, v_h, bank_z, rate_r, rate_b, rate_t, rate_h, out_j, out_z, sum_r, sum_n, sum_z,
    KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    even: tl.constexpr = KEY % BK == 0 and KEY == VALUE
    out_j = out_j.to(tl.int64)
    n, _, first, left, z, b, head = _where(tl.cdiv(HIDDEN, BN), chunk, heads, BM)
    rows, inner, j = tl.arange(0, BM), tl.arange(0, BK), n * BN + tl.arange(0, BN)
    inside = rows < left
    column = j % HIDDEN
    ks = k + b * k_b + head * k_h + first * k_t + rows[:, None] * k_t + inner[None, :]
    vs = v + b * v_b + head * v_h + first * v_t + rows[:, None] * v_t + inner[None, :]
    across = z * bank_z + inner[:, None] * HIDDEN + column[None, :]
    along = z * bank_z + column[None, :] * VALUE + inner[:, None]
    u, p, x = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    y_gate, y_up, zz = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for i in range(0, max(KEY, VALUE), BK):
        up = (KEY + i) * HIDDEN
        if even:
            a = tl.load(ks + i, mask=inside[:, None], other=0.0)
            g = tl.load(vs + i, mask=inside[:, None], other=0.0)
            w_gate, w_up = tl.load(theta + across + i * HIDDEN), tl.load(theta + across + up)
            g_gate, g_up = tl.load(d_theta + across + i * HIDDEN), tl.load(d_theta + across + up)
            w_last, g_last = tl.load(last + along + i), tl.load(d_last + along + i)
        else:
            keys, values = inner < KEY - i, inner < VALUE - i
            a = tl.load(ks + i, mask=inside[:, None] & keys[None, :], other=0.0)
            g = tl.load(vs + i, mask=inside[:, None] & values[None, :], other=0.0)
            w_gate = tl.load(theta + across + i * HIDDEN, mask=keys[:, None], other=0.0)
            w_up = tl.load(theta + across + up, mask=keys[:, None], other=0.0)
            g_gate = tl.load(d_theta + across + i * HIDDEN, mask=keys[:, None], other=0.0)
            g_up = tl.load(d_theta + across + up, mask=keys[:, None], other=0.0)
            w_last = tl.load(last + along + i, mask=values[:, None], other=0.0)
            g_last = tl.load(d_last + along + i, mask=values[:, None], other=0.0)
        u = tl.dot(a, w_gate, u, input_precision=PRECISION)
        p = tl.dot(a, w_up, p, input_precision=PRECISION)
        y_gate = tl.dot(a, g_gate, y_gate, input_precision=PRECISION)
        y_up = tl.dot(a, g_up, y_up, input_precision=PRECISION)
        x = tl.dot(g, w_last, x, input_precision=PRECISION)
        zz = tl.dot(g, g_last, zz, input_precision=PRECISION)

    tokens = b * rate_b + head * rate_h + (first + rows) * rate_t
    r_gate = _rate(rates, 0, rate_r, tokens, inside)
    r_up = _rate(rates, 1, rate_r, tokens, inside)
    r_down = _rate(rates, 2, rate_r, tokens, inside)
    s, slope, curve = _silu(u)
    stored = inside[:, None] & (j < HIDDEN)[None, :]
    place = out + z * out_z + (first + rows)[:, None] * HIDDEN + j[None, :]
    low = out.dtype.element_ty
    total = sums + n * sum_n + z * sum_z + first + rows

    h = s * p
    tl.store(place + 4 * out_j, (r_down * h).to(low), mask=stored)
    tl.store(total + 2 * sum_r, tl.sum(tl.where(stored, zz * h, 0.0), 1), mask=inside)
    zz *= r_down
    a_gate, a_up = x * p * slope, x * s
    tl.store(place, (r_gate * a_gate).to(low), mask=stored)
    tl.store(place + out_j, (r_up * a_up).to(low), mask=stored)
    tl.store(total, tl.sum(tl.where(stored, y_gate * a_gate, 0.0), 1), mask=inside)
    tl.store(total + sum_r, tl.sum(tl.where(stored, y_up * a_up, 0.0), 1), mask=inside)
    y_gate *= r_gate
    y_up *= r_up
    tl.store(place + 5 * out_j, (y_up * s + y_gate * p * slope).to(low), mask=stored)
    tl.store(place + 2 * out_j, (y_up * x * slope + y_gate * x * p * curve + zz * p * slope).to(low), mask=stored)
    tl.store(place + 3 * out_j, (y_gate * x * slope + zz * s).to(low), mask=stored)


def second_factors(
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    rates: Tensor,
    out: Tensor,
) -> Tensor:
    """The six factors of a write's gradient, for one chunk.

    Args:
        k: `[B, C, H, Dk]`.
        v: `[B, C, H, Dv]`.
        weights: W_gate with W_up, `[B*H, 2 * Dk * Dh]`, and W_down, `[B*H, Dh * Dv]`: two slices of one packing, in k's
            dtype.
        grads: the gradients of the write, laid out as the weights.
        rates: float32 `[3, B, C, H]`, of any strides.
        out: where to write A_gate, A_up, du, dp, h_r and E, `[6, B*H, C, Dh]`, contiguous.

    Returns:
        The gradients of the rates, float32 `[3, B*H, C]`.
    """
    batch, chunk, heads, key = k.shape
    z, hidden, value = batch * heads, out.shape[-1], v.shape[-1]
    tile = FULL_PRECISION if k.dtype == torch.float32 else SECOND
    across = cdiv(hidden, tile.columns)
    sums = torch.empty(3, across, z, chunk, dtype=torch.float32, device=k.device)
    with on_device_of(k):
        _second_kernel[(across * cdiv(chunk, tile.rows), z)](
            k, v, *weights, *grads, rates, out, sums, heads, chunk,
            *k.stride()[:3], *v.stride()[:3], weights[0].stride(0), *rates.stride(), *out.stride()[:2], *sums.stride()[:3],
            KEY=key, HIDDEN=hidden, VALUE=value, PRECISION=dot_precision(k.dtype),
            BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return sums.sum(1)
