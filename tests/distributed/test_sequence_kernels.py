"""A row cut over ranks, on kernels: what the parallel form on one process gives in float64."""

import pytest
import torch
from jobs import check, over_ranks
from ranks import started

from kvbind import GLU, MLP, InnerLoop, Linear, NewtonSchulz, SwiGLU
from kvbind.kernels.common.devices import has_triton, interpreted

pytestmark = pytest.mark.skipif(not has_triton() or not interpreted(), reason="needs Triton's interpreter")
FULL = NewtonSchulz(coefficients=((3.4445, -4.7750, 2.0315),), dtype=torch.float32)


@pytest.fixture(scope="module")
def ranks():
    with started(KVBIND_KERNELS="force") as pool:
        yield pool


LOOPS = {
    "orthogonalized momentum": InnerLoop(
        network=SwiGLU(), update="last", momentum=True, orthogonalize=FULL, retention=True, chunk=64
    ),
    "momentum": InnerLoop(network=MLP(), update="last", momentum=True, retention=True, chunk=64, direction="ascent"),
    "sum": InnerLoop(network=Linear(), chunk=64),
    "decay": InnerLoop(network=GLU(), update="last", retention=True, chunk=64, query="key", direction="ascent"),
    "orthogonalized": InnerLoop(network=Linear(), orthogonalize=FULL, chunk=64),
}
CUTS = {
    "one document": ([64, 96, 40], None),
    "incomplete chunks": ([30, 20, 100], None),
    "packed": ([100, 70, 0, 60], [0, 20, 90, 230]),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", LOOPS)
def test_kernels_over_ranks(ranks, name, cut):
    lengths, bounds = CUTS[cut]
    sizes = {
        "batch": 1, "tokens": sum(lengths), "heads": 1, "key_width": 16, "value_width": 16, "hidden": 16, "seed": 3,
        "dtype": torch.float32,
    }  # fmt: skip
    check(ranks, LOOPS[name], sizes, bounds, lengths, 1e-5)


def operators(group):
    """Hold the operators to what they say of themselves, with arguments from a call over ranks."""
    from kvbind.kernels.chunked import operator as chunked

    calls, names = {}, ("_chunked", "_chunked_backward")
    real = {name: getattr(chunked, name) for name in names}
    for name in names:
        setattr(chunked, name, lambda *given, name=name: calls.setdefault(name, given) and real[name](*given))
    sizes = {
        "batch": 1, "tokens": 150, "heads": 1, "key_width": 16, "value_width": 16, "hidden": 16, "seed": 3,
        "dtype": torch.float32,
    }  # fmt: skip
    spec = LOOPS["momentum"]
    try:
        over_ranks(group, spec, sizes, None, [70, 80], "scan", {})
    finally:
        for name in names:
            setattr(chunked, name, real[name])
    assert sorted(calls) == sorted(names)
    for name, given in calls.items():
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
        torch.library.opcheck(real[name], tuple(detached), test_utils=("test_schema", "test_faketensor"))


def test_operators_over_ranks_are_what_they_say(ranks):
    ranks.run(operators, 2)
