import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import kvbind
from kvbind import GLU, MLP, InnerLoop, Linear, NewtonSchulz, SwiGLU, systems
from kvbind.forms.analysis import Shapes
from strategies import memory, operands, parallel_specs, specs

LACT = systems.lact_llm()


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
