"""Activations of fast networks and their derivatives, inside kernels."""

import triton
import triton.language as tl


@triton.jit
def activate(u, kind: tl.constexpr):
    """The activation `kind` of `u`, float32."""
    if kind == "silu":
        y = u * tl.sigmoid(u)
    elif kind == "gelu":
        y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif kind == "gelu_tanh":
        # 0.5 (1 + tanh(x)) is sigmoid(2 x)
        y = u * tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif kind == "relu":
        # not a maximum, which on GPUs makes 0 of NaN
        y = tl.where(u <= 0.0, 0.0, u)
    elif kind == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * u) - 1.0
    else:
        tl.static_assert(kind == "identity")
        y = u
    return y


@triton.jit
def slope(u, kind: tl.constexpr):
    """The derivative of the activation `kind` at `u`, float32."""
    if kind == "silu":
        s = tl.sigmoid(u)
        y = s * (1.0 + u * (1.0 - s))
    elif kind == "gelu":
        y = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif kind == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        y = s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    elif kind == "relu":
        y = tl.where(u > 0.0, 1.0, 0.0)
    elif kind == "tanh":
        t = 2.0 * tl.sigmoid(2.0 * u) - 1.0
        y = 1.0 - t * t
    else:
        tl.static_assert(kind == "identity")
        y = u * 0.0 + 1.0
    return y


@triton.jit
def curvature(u, kind: tl.constexpr):
    """The second derivative of the activation `kind` at `u`, float32."""
    if kind == "silu":
        s = tl.sigmoid(u)
        y = s * (1.0 - s) * (2.0 + u * (1.0 - 2.0 * s))
    elif kind == "gelu":
        y = (2.0 - u * u) * tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif kind == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * u * u)
        first = s * (1.0 - s) * inner
        second = first * (1.0 - 2.0 * s) * inner + s * (1.0 - s) * 1.5957691216057308 * 0.26829 * u
        y = 2.0 * first + u * second
    elif kind == "tanh":
        t = 2.0 * tl.sigmoid(2.0 * u) - 1.0
        y = -2.0 * t * (1.0 - t * t)
    else:
        tl.static_assert(kind == "relu" or kind == "identity")
        y = u * 0.0
    return y
