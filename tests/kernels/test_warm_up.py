"""Kernels are compiled before the call that needs them, once for each kind of call, and a warm-up runs nothing."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kvbind.kernels.launching import warm_up
from kvbind.kernels.launching.autotuning import Tuned
from kvbind.kernels.launching.launcher import Launcher
from uninterpreted import printed_by


@pytest.fixture
def log(monkeypatch):
    """What a body was called with, "warm-up" before a call that compiles only; on the CPU as it would be on a GPU."""
    calls = []

    class WarmUp(nullcontext):
        def __enter__(self):
            calls.append("warm-up")

    monkeypatch.setattr(warm_up, "can_warm_up", lambda args: True)
    monkeypatch.setattr(warm_up, "compiling_ahead", WarmUp)
    return calls


def operator(calls):
    @warm_up.warmed_up("gates")
    def body(x: torch.Tensor, gates: torch.Tensor | None, chunk: int) -> torch.Tensor:
        calls.append(len(x))
        return x + chunk

    return body


def test_each_kind_of_call_is_warmed_up_once(log):
    body, x = operator(log), torch.zeros(4, 8)
    assert torch.equal(body(x, None, 3), x + 3)
    assert log == ["warm-up", 4, 4]
    body(x, None, 3)
    assert log[3:] == [4]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"x": torch.zeros(7, 8)}, False),
        ({"gates": torch.zeros(2, 5)}, False),
        ({"x": torch.zeros(4, 16)}, True),
        ({"x": torch.zeros(4, 8, dtype=torch.bfloat16)}, True),
        ({"gates": None}, True),
        ({"chunk": 4}, True),
    ],
    ids=["rows", "gates' length", "width", "dtype", "no gates", "chunk"],
)
def test_lengths_make_no_kind_and_all_else_does(log, change, again):
    body, given = operator(log), {"x": torch.zeros(4, 8), "gates": torch.zeros(2, 3), "chunk": 3}
    body(*given.values())
    body(*(given | change).values())
    assert log.count("warm-up") == 1 + again


def test_kinds_that_keep_changing_are_no_longer_warmed_up(log, monkeypatch):
    monkeypatch.setattr(warm_up, "MOST", 3)
    body = operator(log)
    for chunk in range(6):
        body(torch.zeros(2, 2), None, chunk)
    assert log.count("warm-up") == 3


def test_a_call_on_the_cpu_runs_once():
    calls = []
    operator(calls)(torch.zeros(4, 8), None, 3)
    assert calls == [4]


def test_an_operator_made_of_a_warmed_up_body_has_its_schema(log):
    made = torch.library.custom_op("kvbind_test::warmed_up", operator(log), mutates_args=())
    assert torch.equal(made(torch.ones(2, 2), None, 3), torch.full((2, 2), 4.0))
    schema = str(torch.ops.kvbind_test.warmed_up.default._schema)
    assert schema == "kvbind_test::warmed_up(Tensor x, Tensor? gates, SymInt chunk) -> Tensor"


def test_launches_in_a_warm_up_compile_each_kernel_once_and_run_none(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    warmed = []
    kernel = SimpleNamespace(
        arg_names=("x", "WIDTH"),
        params=(SimpleNamespace(do_not_specialize=False),) * 2,
        warmup=lambda *args, grid, **constants: warmed.append(constants),
    )
    launcher = Launcher(kernel)
    choices = SimpleNamespace(fn=kernel, arg_names=kernel.arg_names, keys=["WIDTH"], warmup=kernel.warmup)
    monkeypatch.setattr(warm_up._here, "noted", set())
    for launch in (launcher.launch, Tuned(choices).launch):
        for width in (8, 8, 16):
            launch((1,), torch.zeros(8), WIDTH=width)
    assert warmed == [{"WIDTH": 8}, {"WIDTH": 16}] * 2
    assert launcher.compiled == {}


def warm_up_for_hopper():
    """Names of what forward and backward calls compile in a warm-up, for a GPU that is not there.

    They are calls of Newton-Schulz and of a plan of equal chunks.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from kvbind.kernels.chunked import prefix_sums
    from kvbind.kernels.equal_chunks import tma_products
    from kvbind.kernels.equal_chunks.call_shapes import CallShapes
    from kvbind.kernels.equal_chunks.operator import LaunchPlan
    from kvbind.kernels.equal_chunks.tma_products import TokenRows
    from kvbind.kernels.newton_schulz import one_program
    from kvbind.kernels.newton_schulz.operator import newton_schulz

    target = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    triton.runtime.driver.set_active(target)
    x = torch.ones(2, 16, 16, requires_grad=True)
    with warm_up.compiling_ahead():
        newton_schulz(x, ((3.0, -3.0, 1.0),)).sum().backward()
        q = torch.zeros(1, 64, 1, 16, dtype=torch.bfloat16)
        rows, start = TokenRows.of(q), torch.zeros(1, 16, 16, requires_grad=True)
        shapes = CallShapes(rows, rows, rows, 64, False, 1.0, None, (0, 256), None, False, False, (), torch.bfloat16)
        LaunchPlan(shapes, q).run(q, q, q, None, None, None, start, ())[0].sum().backward()
        inside = warm_up.warming_up()
    kernels = {
        name: x.kernel for x_of in (one_program, prefix_sums) for name, x in vars(x_of).items() if isinstance(x, Launcher)
    }
    kernels |= {name: x for name, x in vars(tma_products).items() if name.endswith("_kernel")}
    compiled = sorted(name for name, kernel in kernels.items() if kernel.device_caches[0][0])
    return {"compiled": compiled, "inside": inside, "after": warm_up.warming_up()}


def test_a_warm_up_compiles_with_triton_what_launches_need(tmp_path):
    pytest.importorskip("triton")
    found = printed_by(__file__, TRITON_CACHE_DIR=str(tmp_path))
    compiled = {
        "whole_backward",
        "whole_forward",
        "_backward_kernel",
        "_forward_kernel",
        "_product_kernel",
        "_write_kernel",
    }
    assert found == {"compiled": sorted(compiled), "inside": True, "after": False}


if __name__ == "__main__":
    json.dump(warm_up_for_hopper(), sys.stdout)
