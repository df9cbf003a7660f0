"""Kernels bound by memory compile for GPUs that are not there, at LaCT's widths: 16 bytes at a time, and without spilling.

They do so in a process of its own: whether kernels are compiled or interpreted is settled when they are imported.
"""

import json
import re
import sys

import pytest

from uninterpreted import printed_by

pytest.importorskip("triton")

HEADS, HEAD_WIDTH, HIDDEN_WIDTH = 4, 384, 4096
CAPABILITIES = (90, 80)
TENSORS = {"gated_output": ((2, 1), (2, 1)), "swiglu": ((2, 1), (3, 2))}
"""How many tensors of the model's width each kernel reads and writes, forward and backward."""


def compile_for(capability, name, length):
    """What a forward and a backward launch compile to, for rows of this length that lie apart."""
    import compiling
    import torch

    from kvbind.kernels.elementwise import gated_output_kernels, swiglu_kernels

    found = []

    def compile_and_note(*args, **kwargs):
        kernel = triton_compile(*args, **kwargs)
        moved = re.findall(r"\b(ld|st)\.global\S*\.v4\.b32", kernel.asm["ptx"])
        found.append({"hash": kernel.hash, "loads": moved.count("ld"), "stores": moved.count("st")})
        return kernel

    def zeros(*shape):
        return torch.zeros(2, length + 1, *shape, dtype=torch.bfloat16)[:, :length]

    triton_compile, compiling.triton.compile = compiling.triton.compile, compile_and_note
    try:
        with compiling.compiling(capability) as compiled:
            if name == "swiglu":
                gate, up, dy, *results = (zeros(HIDDEN_WIDTH) for _ in range(5))
                swiglu_kernels.forward(gate, up, results[0])
                swiglu_kernels.backward(dy, gate, up, *results)
            else:
                fast, gate, mixed = zeros(HEADS, HEAD_WIDTH), zeros(HEADS), zeros(HEADS * HEAD_WIDTH)
                weight = torch.zeros(HEAD_WIDTH)
                gated_output_kernels.forward(fast, weight, gate, mixed, mixed, 1e-5)
                gated_output_kernels.backward(mixed, fast, weight, gate, fast, gate, 1e-5)
    finally:
        compiling.triton.compile = triton_compile
    return [x | {"options": kernel.options, "stack": kernel.stack} for x, kernel in zip(found, compiled, strict=True)]


@pytest.fixture(scope="module")
def compiled():
    """By operator, capability and length, its forward and its backward kernel."""
    return {tuple(key): kernels for key, kernels in printed_by(__file__)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", TENSORS)
def test_every_element_moves_in_vectors_of_16_bytes_and_none_is_spilled(compiled, name, capability):
    for kernel, (reads, writes) in zip(compiled[name, capability, 5], TENSORS[name], strict=True):
        assert kernel["stack"] == 0
        tile = kernel["options"]
        elements = tile["BR"] * (tile["BC"] if name == "swiglu" else tile["D"])
        at_once = 8 * 32 * tile["num_warps"]
        assert kernel["loads"] * at_once == reads * elements
        assert kernel["stores"] * at_once == writes * elements


@pytest.mark.parametrize("name", TENSORS)
def test_another_length_compiles_nothing(compiled, name):
    hashes = [[kernel["hash"] for kernel in compiled[name, CAPABILITIES[0], length]] for length in (5, 1)]
    assert hashes[0] == hashes[1]


if __name__ == "__main__":
    cases = [(name, n, 5) for name in TENSORS for n in CAPABILITIES] + [(name, CAPABILITIES[0], 1) for name in TENSORS]
    json.dump([(case, compile_for(case[1], case[0], case[2])) for case in cases], sys.stdout)
