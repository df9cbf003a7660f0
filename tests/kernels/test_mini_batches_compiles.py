"""The kernels of mini-batches compile for GPUs that are not there, at the largest sizes taken, each launch within a block.

In a process of its own: whether kernels are compiled or interpreted is settled when they are imported.
"""

import json
import sys

import pytest

from uninterpreted import printed_by

pytest.importorskip("triton")

CASES = {
    # compute capability, dtype, width, hidden, tokens of a mini-batch, momentum, bytes of shared memory a block may have
    "TTT-MLP": (90, "bfloat16", 64, 256, 16, False, 227 << 10),
    "Titans": (90, "bfloat16", 64, 128, 16, True, 227 << 10),
    "wide": (80, "bfloat16", 128, 0, 64, False, 163 << 10),
    "float32": (80, "float32", 64, 64, 16, False, 163 << 10),
}


def shared_memory(name):
    """By kernel, the shared memory of each launch of a forward and a backward call."""
    import torch
    from compiling import compiling

    from kvbind.kernels.mini_batches.operator import mini_batches

    capability, dtype, width, hidden, size, momentum, _ = CASES[name]

    def ones(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    q, k, v = (ones(1, 2 * size, 2, width, dtype=getattr(torch, dtype)) for _ in range(3))
    numbers = width * hidden + (hidden or width) * width + hidden + width
    state, rates = ones(1, 2, numbers * (1 + momentum)), ones(1, 2 * size, 2, 2 if hidden else 1)
    shares, head = ones(1, 2 * size, 2, size + 4 if momentum else 1), ones(1, 2, 2, width)
    options = {"size": size, "hidden": hidden, "activation": "gelu_tanh" if hidden else "identity", "bias": True}
    with compiling(capability) as found:
        y, end = mini_batches(q, k, v, state, rates, shares=shares, head=head, **options)
        (y.sum() + end.sum()).backward()
    return [(kernel.name, kernel.shared) for kernel in found]


@pytest.mark.parametrize("name", CASES)
def test_every_launch_fits_a_block(name):
    found = printed_by(__file__, name)
    kernels = {"states_kernel", "reads_kernel", "read_gradients_kernel", "state_gradients_kernel"}
    assert {kernel for kernel, _ in found} == kernels
    assert max(shared for _, shared in found) <= CASES[name][-1]


if __name__ == "__main__":
    json.dump(shared_memory(sys.argv[1]), sys.stdout)
