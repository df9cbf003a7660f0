"""The kernels of token-causal attention compile for GPUs that are not there, each launch within a block's shared memory.

In a process of its own: whether kernels are compiled or interpreted is settled when they are imported.
"""

import json
import sys

import pytest

from uninterpreted import printed_by

pytest.importorskip("triton")

SHARED = {"bfloat16": (90, 384, 227 << 10), "float32": (80, 32, 163 << 10)}
"""For operands of a dtype: compute capability, width of a head, and the bytes of shared memory that a block may have."""


def shared_memory(dtype):
    """By kernel, the shared memory of each launch of a forward and a backward call."""
    import torch
    from compiling import compiling

    from kvbind.kernels.causal.operator import causal_linear_attention

    capability, width, _ = SHARED[dtype]
    q, k, v = (torch.zeros(1, 128, 8, width, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3))
    rates, gates = (torch.ones(1, 128, 8, requires_grad=True) for _ in range(2))
    with compiling(capability) as found:
        y, state = causal_linear_attention(q, k, v, rates, gates)
        (y.sum() + state.sum()).backward()
    return [(kernel.name, kernel.shared) for kernel in found]


@pytest.mark.parametrize("dtype", SHARED)
def test_every_launch_fits_a_block(dtype):
    found = printed_by(__file__, dtype)
    assert {name for name, _ in found} == {"_pass_kernel", "_gate_gradient_kernel"}
    assert max(shared for _, shared in found) <= SHARED[dtype][2]


if __name__ == "__main__":
    json.dump(shared_memory(sys.argv[1]), sys.stdout)
