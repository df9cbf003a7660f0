"""What a repeated call of `ttt` costs the host, its launches left out; needs no GPU.

    python tests/kernels/host_time.py rung6 rung2 linear_attention

Operands are small tensors on the CPU and every launch stops before Triton's function in C, so that Python, autograd and room
for results remain: what differs between two states of the library, not what a GPU's host takes in all. Each number is the
least of many short rounds, in the thread's own time. `kvbind bench peers --only host` measures whole calls on a GPU.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

# the switch is for interpreted kernels, which these are not: nothing runs
os.environ |= {"KVBIND_KERNELS": "force", "KVBIND_FLA": "0", "TRITON_INTERPRET": "0"}

import torch
from triton.runtime.jit import JITFunction

from kvbind.bench.harness.named_operands import draw_leaves, in_precision, laid_out, run
from kvbind.bench.harness.operands import Size
from kvbind.bench.kernels.measure import passes
from kvbind.forms.on_kernels import delta, dispatch, planned
from kvbind.inner.systems import lact_llm, ladder, named
from kvbind.kernels.equal_chunks import operator, tma_products
from kvbind.kernels.launching import bound_kernel, launcher

CASES = ("rung6", "rung5", "rung4", "rung3", "rung2", "linear_attention", "simple_gla")


class Made:
    """Stands for a function that Triton made in C; takes anything."""

    __module__ = "__triton_launcher"
    __call__ = staticmethod("".format)


def wrapped(launcher: Any, tensordesc_meta: Any) -> Callable[..., None]:
    """As Triton 3.6 wraps it for kernels that take descriptors."""
    return lambda *args: launcher(*args, tensordesc_meta)


class Run:
    """Stands for Triton's launcher of a compiled kernel."""

    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, descriptors: int) -> None:
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1], "fp4_padded": False}
        self.launch = wrapped(Made(), (meta,) * descriptors) if descriptors else Made()


def compiled(self: Any, *args: Any, **_: Any) -> SimpleNamespace:
    """In place of compilation and the first launch."""
    return SimpleNamespace(run=Run(sum(hasattr(x, "block_shape") for x in args)), function=0, packed_metadata=())


def without_launches() -> None:
    """From now on calls are planned as on a GPU, and no launch arrives."""
    JITFunction.run = compiled
    bound_kernel.BuiltinFunctionType = Made
    bound_kernel._descriptors = lambda: (lambda address, *about: address, dict.fromkeys(range(16), 0))
    for module in (bound_kernel, launcher, operator):
        module.stream_of = lambda device: 0
    for module in (planned, dispatch, delta):
        module.runs_on = lambda device: True
    tma_products.interpreted = lambda: True
    planned.straight = lambda q: True


def works(case: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward call without gradients, and one with all of them."""
    if case.startswith("rung"):
        spec, size, layout = ladder(lact_llm(64))[case], Size(batch=3, tokens=128, heads=2, width=64), "heads"
    else:
        spec, size, layout = named(case), Size(batch=1, tokens=128, heads=2, width=64), "tokens"
    drawn = draw_leaves(spec, size, torch.device("cpu"))
    leaves = laid_out(in_precision(drawn, torch.bfloat16, torch.float32), layout)
    return passes(lambda x: run(spec, x, "auto")[0], leaves)


def microseconds(work: Callable[[], object], rounds: int = 200, calls: int = 20) -> float:
    """The least mean over some calls."""
    for _ in range(4):
        work()
    gc.disable()
    found = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            work()
        found.append((time.thread_time() - begin) / calls)
    gc.enable()
    return 1e6 * min(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_launches()
    for case in sys.argv[1:] or CASES:
        forward, training = works(case)
        print(f"{case:20s} forward {microseconds(forward):7.1f} us, with gradients {microseconds(training):7.1f} us")
