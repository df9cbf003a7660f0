import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import kvbind
from kvbind import GLU, MLP, InnerLoop, Linear, NewtonSchulz, SwiGLU, systems
from kvbind.forms.explained.costs import Shapes
from kvbind.inner.fields import Window
from published import SYSTEMS as PUBLISHED
from strategies import memory, operands, parallel_specs, specs

LACT = systems.lact_llm()

NAMED = PUBLISHED | {"lact_llm": systems.lact_llm(8), "in_place_ttt": systems.in_place_ttt().replace(chunk=8)}
"""Every causal system, with short chunks and spans."""


@settings(max_examples=100)
@given(specs())
def test_what_explain_calls_parallel_is_what_the_parallel_form_takes(spec):
    o = operands(spec, tokens=6)
    if kvbind.explain(spec).parallel:
        kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="parallel", **o.options)
    else:
        with pytest.raises(kvbind.NoParallelFormError):
            kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="parallel", **o.options)


@settings(max_examples=100)
@given(specs())
def test_the_edits_of_all_obstacles_together_give_a_parallel_relative(spec):
    explanation = kvbind.explain(spec)
    assert kvbind.explain(explanation.nearest).parallel
    assert (explanation.nearest == spec) == explanation.parallel
    assert explanation.linear_attention


@settings(max_examples=30)
@given(parallel_specs())
def test_parallel_systems_say_how(spec):
    assert "parallel: yes, " in str(kvbind.explain(spec))


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (LACT, ["update", "normalize"]),
        (LACT.replace(update="last"), ["normalize"]),
        (LACT.replace(update="last", normalize=False), []),
        (LACT.replace(update="last", normalize=False, steps=2), ["steps"]),
        (LACT.replace(update="last", normalize=False, loss="squared"), ["loss"]),
        (InnerLoop(network=GLU(), update="last", visibility="full", loss="squared"), ["loss"]),
        (systems.delta_net(16).replace(network=MLP()), ["update"]),
        (memory(16).replace(network=Linear()), []),
        (systems.delta_net(), []),
        (memory(16).replace(orthogonalize=NewtonSchulz()), ["update", "loss"]),
        (systems.titans(), ["update"]),
        (systems.elastic_lact(), ["anchor", "chunk", "update", "normalize"]),
        (systems.vittt(), ["update"]),
        (systems.vittt("conv"), []),
    ],
)
def test_obstacles_are_the_fields_that_break_associativity(spec, fields):
    assert [obstacle.field for obstacle in kvbind.explain(spec).obstacles] == fields


def test_the_text_names_the_obstacles_and_the_nearest_rung():
    text = str(kvbind.explain(LACT))
    for part in (
        "linear attention: yes, exactly",
        "parallel: no, because",
        "update='all'",
        "Norm(A + B) is not Norm(A) + Norm(B)",
        "removed by replace(normalize=False)",
        "nearest parallel relative: rung 2 (remove weight normalization), that is, replace(update='last', normalize=False)",
        "MiB of state per sequence",
    ):
        assert part in text


@pytest.mark.parametrize(
    "spec",
    [
        *systems.ladder(systems.lact_llm(chunk=8)).values(),
        systems.vittt(),
        InnerLoop(network=MLP(depth=2), chunk=8, momentum=True),
        InnerLoop(network=MLP(depth=3), visibility="full", update="last"),
        InnerLoop(network=SwiGLU(), visibility="full", steps=3, orthogonalize=NewtonSchulz()),
    ],
)
def test_flops_are_those_that_pytorch_counts_in_the_recurrent_form(spec):
    shapes = Shapes(heads=2, key_width=6, value_width=10, hidden=14, tokens=32)
    o = operands(spec, batch=1, tokens=32, heads=2, key_width=6, value_width=10, hidden=14, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="recurrent", **o.options)
    assert counter.get_total_flops() == pytest.approx(32 * kvbind.explain(spec, shapes).cost.flops_per_token, rel=1e-9)


def counted(spec, shapes, form):
    """Operations of a call as PyTorch counts them, for each token and head; its counter knows no triangular systems."""

    def system(a, b, *args, out_shape=None, **kwargs):
        return math.prod(b[:-2]) * b[-2] ** 2 * b[-1]

    sizes = (1, shapes.tokens, shapes.heads, shapes.key_width, shapes.value_width, shapes.hidden)
    o = operands(spec, *sizes, dtype=torch.float32)
    mapping = {torch.ops.aten.linalg_solve_triangular: system}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form=form, **o.options)
    return counter.get_total_flops() / shapes.tokens / shapes.heads


@pytest.mark.parametrize("name", NAMED)
def test_flops_of_every_system_are_those_that_pytorch_counts_token_by_token(name):
    spec, shapes = NAMED[name], Shapes(heads=2, key_width=10, value_width=10, hidden=14, tokens=32)
    found = kvbind.explain(spec, shapes).cost
    orthogonalize = found.orthogonalize_flops_per_token / 2
    # the loop makes features at keys anew for the gradient of a residual, and what a head normalizes too
    sizes = spec.network.shapes(10, 10, (14,) * spec.network.hidden_layers)
    below, head = sum(math.prod(sizes[name]) for name in spec.network.theta), spec.network.output_head is not None
    again = 2 * (below * (1 + head) + math.prod(sizes["out"]) * head) * spec.window_size * (spec.loss == "squared")
    assert counted(spec, shapes, "recurrent") == pytest.approx(found.flops_per_token / 2 + again, rel=1e-9)
    assert found.flops_per_token / 2 == pytest.approx(found.read + found.write + orthogonalize, rel=1e-9)


BLOCKS = {name: spec for name, spec in NAMED.items() if kvbind.explain(spec).parallel and spec.visibility == "token"}
BLOCKS |= {
    "titans, linear": NAMED["titans"].replace(network=Linear()),
    "titans, linear, long spans": NAMED["titans"].replace(network=Linear(), refresh=128),
    "momentum": NAMED["simple_gla"].replace(momentum=True),
    "momentum and gates per channel": NAMED["gla"].replace(momentum=True),
    "window over gradients": NAMED["delta_net"].replace(window=4),
    "window over updates": NAMED["delta_net"].replace(window=Window(4, on="update")),
    "spans of tokens": systems.delta_net(16),
    "short chunks": systems.delta_net(8).replace(visibility="past"),
    "a bias": NAMED["delta_net"].replace(network=Linear(bias=True)),
    "a read rate": NAMED["delta_net"].replace(refresh=16, read_rate=True),
    "features": systems.delta_net(16).replace(network=MLP(), update="last"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_flops_of_blocks_are_those_that_pytorch_counts(name):
    spec, shapes = BLOCKS[name], Shapes(heads=2, key_width=24, value_width=16, hidden=20, tokens=1024)
    blocks = kvbind.explain(spec, shapes).cost.blocks
    assert blocks.total == sum(asdict(blocks)[part] for part in ("features", "states", "scores", "system", "gates"))
    # what heads share, products of gates that are none, is counted there and not here
    assert counted(spec, shapes, "parallel") == pytest.approx(blocks.total, rel=0.04)


def test_the_delta_rule_in_blocks_is_its_states_pairs_and_one_system():
    width, block = 128, 64
    found = kvbind.explain(NAMED["kda"], Shapes(12, width, width, width))
    assert (found.cost.read, found.cost.write) == (2 * width**2, 4 * width**2)
    assert found.cost.blocks.states == 6 * width**2
    assert found.cost.blocks.system == block * 2 * width
    # half of the scores of queries and of residuals, whose channels decay apart, and what is read
    assert found.cost.blocks.scores == 2 * block * (width + width)
    assert "triangular systems 16.4" in str(found)


def test_one_more_token_moves_its_operands_and_the_state():
    heads, width = 12, 128
    found = kvbind.explain(NAMED["delta_net"], Shapes(heads, width, width, width)).cost
    # read and written in float32; q, k, v and output in bfloat16, a rate
    assert found.decode_bytes_per_token == heads * (8 * width**2 + 8 * width + 4)
    moving = kvbind.explain(NAMED["simple_gla"].replace(momentum=True), Shapes(1, 8, 8, 8)).cost
    assert moving.decode_bytes_per_token == 16 * 8**2 + 8 * 8 + 2 * 4
    chunk, width = 2048, 384
    lact = kvbind.explain(systems.lact_llm(chunk), Shapes(1, width, width, width)).cost
    matrices, operands_, waiting = 3 * width**2, 8 * width + 4 * 4, 2 * (4 * width + 4 * 4)
    assert lact.decode_bytes_per_token == pytest.approx(4 * matrices * (1 + 3 / chunk) + operands_ + waiting, rel=1e-12)


def test_the_text_says_what_runs_on_gpus():
    assert kvbind.explain(NAMED["delta_net"]).kernels.startswith("kvbind.kernels.")
    assert "on GPUs: kvbind.kernels.chunked" in str(kvbind.explain(systems.ladder(LACT)["rung2"]))
    assert "on GPUs: kvbind.kernels.recurrent" in str(kvbind.explain(LACT))
    several = kvbind.explain(LACT.replace(steps=2))
    assert several.kernels == ""
    assert "on GPUs: PyTorch" in str(several)


def test_costs_of_the_paper_model_are_those_of_hand_counts():
    shapes = Shapes()
    rung2 = kvbind.explain(systems.ladder(LACT)["rung2"], shapes).cost
    width, heads = 384, 4
    assert rung2.flops_per_token == heads * (12 * width**2 + 30 * width**3 / 2048)
    rung6 = kvbind.explain(systems.ladder(LACT)["rung6"], shapes).cost
    assert rung6.flops_per_token == heads * 4 * width**2
    assert rung6.bytes_per_token == 12288


def test_state_bytes_are_those_of_a_state():
    shapes = Shapes(heads=2, key_width=3, value_width=4, hidden=5, tokens=9, dtype=torch.float32)
    for spec in (LACT.replace(chunk=4), systems.titans(chunk=3), systems.delta_net(), systems.vittt()):
        o = operands(spec, batch=1, tokens=9, dtype=torch.float32)
        _, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
        assert kvbind.explain(spec, shapes).cost.state_bytes == sum(x.numel() * 4 for x in state.tensors.values())


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="spec must be a kvbind"):
        kvbind.explain("lact_llm")
    with pytest.raises(ValueError, match="heads must be an int of at least 1; got 0"):
        Shapes(heads=0)


def test_a_dtype_by_name_is_refused():
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype; got 'bf16'"):
        Shapes(dtype="bf16")
