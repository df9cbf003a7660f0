import pytest
import torch

import kvbind
from kvbind import systems
from strategies import error, operands

SPECS = {
    "rung0": systems.lact_llm(chunk=4),
    "rung2": systems.ladder(systems.lact_llm(chunk=4))["rung2"],
    "delta_net": systems.delta_net(),
    "vittt_conv": systems.vittt("conv"),
}


@pytest.mark.parametrize("name", SPECS)
def test_ttt_compiles_as_one_graph_forward_and_backward(name):
    spec = SPECS[name]
    o = operands(spec, tokens=9, dtype=torch.float32)
    leaves = [o.q, o.k, o.v, *o.weights.values()]
    for x in leaves:
        x.requires_grad_()

    def run(q, k, v, weights, options):
        y, state = kvbind.ttt(spec, weights, q, k, v, **options)
        return y, state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        y, state = function(o.q, o.k, o.v, o.weights, o.options)
        results.append((y, state, torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True, allow_unused=True)))
    (y, state, grads), (z, after, others) = results
    assert error(z, y) < 1e-5
    assert after.pending_lengths == state.pending_lengths
    assert error(after.weights["out"], state.weights["out"]) < 1e-5
    for a, b in zip(grads, others, strict=True):
        assert (a - b).norm() <= 1e-3 * a.norm().clamp(min=1e-3)
