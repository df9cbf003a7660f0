"""The matrix product of kernels."""

import triton
import triton.language as tl

from kvbind.kernels.common import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, acc, precision: tl.constexpr):
    """`acc + a @ b`, summed in float32.

    Triton's interpreter holds bfloat16 as integers and would multiply those; there operands are widened first, which
    changes nothing, as products of narrow operands are exact in float32.
    """
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=precision)
