"""Kernels that no other test compiles, for GPUs that are not there: each launch within a block and within the registers.

They compile in a process of their own: whether kernels are compiled or interpreted is settled when they are imported.
"""

import json
import sys

import pytest

from uninterpreted import printed_by

pytest.importorskip("triton")

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a block may have, by compute capability."""
REGISTERS = 64 << 10
"""Of a multiprocessor, all of which a block may have."""
GIVEN_UP = 32
"""Registers of a thread that `ptxas` gave to some large kernels, of which it then spilled nearly all."""
EMPTY = 8
"""Registers of a kernel that does nothing, which is what comes of sums that overflow tensor memory."""
CASES = {
    "delta rule": (80, {"_prepare_kernel", "_parts_kernel", "_chain_kernel", "_part_gradients_kernel"}),
    "channels": (100, {"_scale_kernel", "_scores_kernel", "_steep_kernel", "_channel_gradients_kernel"}),
    "rung 0": (90, {"_factors_kernel", "_second_kernel", "_outer_kernel", "_rows_kernel", "_apply_kernel"}),
    "segments": (80, {"_write_kernel", "_scan_kernel"}),
    "around": (80, {"_norm_backward", "_cross_entropy", "_split", "_join", "_operands_backward", "_backward_kernel"}),
}
"""Compute capability, and some of the kernels."""


def zeros(*shape, dtype=None, gradient=True):
    import torch

    return torch.zeros(shape, dtype=dtype, requires_grad=gradient)


def delta(gate=None, chunk=64):
    import torch

    from kvbind.kernels.affine.operator import affine_chunks

    q, k, v = (zeros(1, 1024, 4, 128, dtype=torch.bfloat16) for _ in range(3))
    return affine_chunks(q, k, v, rate=zeros(1, 1024, 4), gate=gate, chunk=chunk)


def recurrent():
    import torch

    from kvbind.kernels.recurrent.operator import recurrent_swiglu

    q, k, v = (zeros(1, 512, 3, 384, dtype=torch.bfloat16) for _ in range(3))
    matrices, rates = [zeros(1, 3, 384, 384) for _ in range(3)], [zeros(1, 512, 3) for _ in range(3)]
    gates = [zeros(1, 3, 2) for _ in range(2)]
    options = {"chunk": 256, "update_all": True, "normalize": True, "coefficients": None, "sign": 1.0, "own_chunk": False}
    return recurrent_swiglu(q, k, v, *matrices, *rates, *gates, None, None, **options)[0]


def segments():
    import torch

    from kvbind.kernels.causal.segment_states import segment_states
    from kvbind.kernels.causal.segments import Segments

    k, v = (zeros(1, 512, 1, 64, dtype=torch.bfloat16) for _ in range(2))
    segment_states(Segments(256, 2, 2, 1, None, None), k, v, None, rates=None, gates=zeros(1, 512, 1), sign=1)
    return zeros(1)


def around():
    import torch

    from kvbind.kernels.elementwise import add_norm, decode_attention, depthwise, layer_operands, silu_unit
    from kvbind.kernels.elementwise.cross_entropy import _cross_entropy

    low = torch.bfloat16
    x, turns = zeros(1, 256, 1536, dtype=low), (zeros(1, 256, 48, gradient=False) for _ in range(2))
    _cross_entropy(zeros(4, 32000, dtype=low, gradient=False), torch.zeros(4, dtype=torch.int64), -100, True)
    kept = zeros(2, 4, 500, 256, dtype=low, gradient=False)
    one = torch.ones(2, dtype=torch.int32)
    decode_attention.decode_attention(kept[:, :, 0], kept, kept, one, one)
    return (
        *add_norm.add_norm(zeros(1, 256, 1536), x, zeros(1536), 1e-5, low),
        *layer_operands.layer_operands(x, x, zeros(1536, 2), zeros(1536, 2), *turns, 16, 4, 1e-5, True, True),
        *silu_unit.silu_unit(x, 2, 1e-5),
        depthwise.token_conv(x, zeros(1536, 1, 3, 3), zeros(1536), (16, 16), add=True),
    )


def compile_case(name):
    """What the launches of a call, and mostly of its gradient, compile to, and what they use."""
    import torch
    from compiling import compiling

    from kvbind.kernels.affine import operator

    capability, _ = CASES[name]
    # tensors here are on no GPU that could be asked
    operator.by_warpgroups = lambda x: capability == 90
    calls = {
        # chunks of 64 take the compiler longer than all else here
        "delta rule": delta, "channels": lambda: delta(zeros(1, 1024, 4, 128), 16), "rung 0": recurrent,
        "segments": segments, "around": around,
    }  # fmt: skip
    with compiling(capability) as found:
        results = calls[name]()
        sum(x.float().sum() for x in ([results] if isinstance(results, torch.Tensor) else results)).backward()
    return [(x.name, x.options.get("num_warps", 4), x.registers, x.stack, x.shared) for x in found]


@pytest.fixture(scope="module")
def compiled():
    """By case, the launches."""
    return printed_by(__file__)


@pytest.mark.parametrize("name", CASES)
def test_every_launch_fits(compiled, name):
    capability, some = CASES[name]
    assert some <= {kernel for kernel, *_ in compiled[name]}
    for kernel, warps, registers, stack, shared in compiled[name]:
        assert shared <= SHARED[capability], kernel
        assert registers * 32 * warps <= REGISTERS, kernel
        assert registers > GIVEN_UP or stack == 0, kernel
        assert registers > EMPTY, kernel


if __name__ == "__main__":
    json.dump({name: compile_case(name) for name in CASES}, sys.stdout)
