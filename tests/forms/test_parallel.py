from itertools import accumulate
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind import InnerLoop, Linear, NewtonSchulz, SwiGLU
from kvbind.forms import evaluate
from kvbind.forms.parallel import affine_blocks, blockwise, spanwise
from kvbind.forms.parallel import form as parallel
from kvbind.forms.tokens import Tokens
from strategies import affine_specs, error, leaves, memory, operands, parallel_specs, shaped_specs, small_sizes, span_specs

CAUSAL = ("past", "chunk", "token")
schedules = st.fixed_dictionaries(
    {
        "block": st.sampled_from([4, 16, 64]),
        "short": st.sampled_from([1, 4, 64]),
        "segment": st.sampled_from([1, 1000, 1 << 20]),
    }
)


def scheduled(schedule):
    """Make blocks and the bound between schedules small enough for short sequences to need several."""
    blocks = mock.patch.multiple(affine_blocks, BLOCK=schedule["block"])
    return blocks, mock.patch.multiple(parallel, SHORT_CHUNK=schedule["short"])


def run(spec, o, form, cut=0):
    """Outputs and end state, after a first call over `cut` tokens."""
    head, tail = o.span(0, cut), o.span(cut, o.q.shape[1])
    state = None
    if cut:
        _, state = kvbind.ttt(spec, head.weights, head.q, head.k, head.v, form="recurrent", **head.options)
    return kvbind.ttt(spec, o.weights, tail.q, tail.k, tail.v, form=form, state=state, **tail.options)


@settings(max_examples=300)
@given(parallel_specs(visibilities=CAUSAL), small_sizes(30), st.integers(0, 29), schedules)
def test_parallel_equals_recurrent(spec, size, cut, schedule):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    y, state = run(spec, o, "recurrent", cut)
    blocks, short = scheduled(schedule)
    with blocks, short:
        z, after = run(spec, o, "parallel", cut)
    assert error(z, y) < 1e-10
    assert after.pending_lengths == state.pending_lengths
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name


def gradients(spec, o, form, cut):
    """Gradients of a random projection of outputs and end state with respect to every operand."""
    tensors = leaves(o)
    for x in tensors.values():
        x.requires_grad_()
        x.grad = None
    y, state = run(spec, o, form, cut)
    g = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum()
    for x in (*state.weights.values(), *state.momentum.values()):
        loss = loss + (x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum()
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


@settings(max_examples=100)
@given(parallel_specs(visibilities=CAUSAL), small_sizes(20), st.integers(0, 12), schedules)
def test_parallel_has_the_gradients_of_recurrent(spec, size, cut, schedule):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    expected = gradients(spec, o, "recurrent", cut)
    blocks, short = scheduled(schedule)
    with blocks, short:
        found = gradients(spec, o, "parallel", cut)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 1e-8 * x.norm().clamp(min=1e-3), name


@settings(max_examples=200)
@given(affine_specs(), small_sizes(24), st.integers(0, 20), st.sampled_from([4, 64]), st.integers(0, 1 << 20))
def test_writes_that_add_up_are_parallel_whatever_else_the_inner_loop_has(spec, size, cut, block, seed):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    if spec.writes == 1 and parallel.masks_in_parallel(spec) and seed % 2:
        rand = torch.rand(size["batch"], size["tokens"], generator=torch.Generator().manual_seed(seed))
        o.options["update_tokens"] = rand < 0.5
    y, state = run(spec, o, "recurrent", cut)
    with mock.patch.object(affine_blocks, "BLOCK", block):
        z, after = run(spec, o, "parallel", cut)
    assert (z - y).norm() <= 1e-10 * y.norm().clamp(min=1)
    assert after.pending_lengths == state.pending_lengths
    assert list(after.tensors) == list(state.tensors)
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name


@settings(max_examples=80)
@given(affine_specs(), small_sizes(14), st.integers(0, 12), st.sampled_from([4, 64]))
def test_writes_that_add_up_have_the_gradients_of_recurrent(spec, size, cut, block):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    expected = gradients(spec, o, "recurrent", cut)
    with mock.patch.object(affine_blocks, "BLOCK", block):
        found = gradients(spec, o, "parallel", cut)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 1e-8 * x.norm().clamp(min=1e-3), name


@settings(max_examples=150)
@given(shaped_specs(), small_sizes(20), st.integers(0, 16), schedules)
def test_shaped_writes_are_parallel_with_windows_and_rates(spec, size, cut, schedule):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    y, state = run(spec, o, "recurrent", cut)
    blocks, short = scheduled(schedule)
    with blocks, short, mock.patch.object(parallel, "CPU_SEGMENT_BYTES", schedule["segment"]):
        z, after = run(spec, o, "parallel", cut)
    assert (z - y).norm() <= 1e-9 * y.norm().clamp(min=1)
    assert after.pending_lengths == state.pending_lengths
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-7, atol=1e-9), name


@settings(max_examples=40)
@given(shaped_specs(), small_sizes(11), st.integers(0, 9))
def test_shaped_writes_have_the_gradients_of_recurrent(spec, size, cut):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    expected, found = (gradients(spec, o, form, cut) for form in ("recurrent", "parallel"))
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 1e-7 * x.norm().clamp(min=1), name


@settings(max_examples=150)
@given(span_specs(), small_sizes(20), st.integers(0, 16), st.sampled_from([4, 64]), st.integers(0, 1 << 20))
def test_spans_run_at_once_where_gradients_read_the_state(spec, size, cut, block, seed):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    if parallel.masks_in_parallel(spec) and seed % 2:
        rand = torch.rand(size["batch"], size["tokens"], generator=torch.Generator().manual_seed(seed))
        o.options["update_tokens"] = rand < 0.5
    y, state = run(spec, o, "recurrent", cut)
    with mock.patch.object(affine_blocks, "BLOCK", block):
        z, after = run(spec, o, "dual", cut)
    assert (z - y).norm() <= 1e-10 * y.norm().clamp(min=1)
    assert after.pending_lengths == state.pending_lengths
    assert list(after.tensors) == list(state.tensors)
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name


@settings(max_examples=60)
@given(span_specs(), small_sizes(11), st.integers(0, 9), st.sampled_from([4, 64]))
def test_spans_at_once_have_the_gradients_of_recurrent(spec, size, cut, block):
    o, cut = operands(spec, **size), min(cut, size["tokens"] - 1)
    expected = gradients(spec, o, "recurrent", cut)
    with mock.patch.object(affine_blocks, "BLOCK", block):
        found = gradients(spec, o, "dual", cut)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 1e-8 * x.norm().clamp(min=1e-3), name


@settings(max_examples=40)
@given(span_specs(), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_packed_sequences_run_in_spans_of_their_own(spec, lengths, seed):
    o = operands(spec, batch=1, tokens=sum(lengths), seed=seed)
    bounds = [0, *accumulate(lengths)]
    outcomes = [
        kvbind.ttt(spec, o.weights, o.q, o.k, o.v, cu_seqlens=bounds, form=form, **o.options)
        for form in ("recurrent", "dual", "auto")
    ]
    (y, state), *others = outcomes
    for z, after in others:
        assert (z - y).norm() <= 1e-10 * y.norm().clamp(min=1)
        for name, x in state.tensors.items():
            assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("system", ["ttt_linear", "ttt_mlp", "titans"])
def test_mini_batches_run_by_the_dual_form(system, monkeypatch):
    spec = getattr(kvbind.systems, system)(4)
    assert kvbind.explain(spec).form == "dual"
    assert "inside spans alone, by the dual form" in str(kvbind.explain(spec))
    assert "attention in blocks of 4 tokens" in str(kvbind.explain(spec))
    o, ran = operands(spec, tokens=11), []

    def noted(*arguments):
        ran.append(1)
        return spanwise.in_spans(*arguments)

    monkeypatch.setattr(evaluate, "in_spans", noted)
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
    assert ran
    z, _ = run(spec, o, "recurrent")
    assert error(y, z) < 1e-12
    with pytest.raises(kvbind.NoParallelFormError):
        run(spec, o, "parallel")


@pytest.mark.parametrize(
    "spec",
    [
        kvbind.systems.ttt_linear(1),
        kvbind.systems.lact_llm(4),
        kvbind.systems.atlas(4),
        InnerLoop(Linear(), loss="squared", chunk=4, visibility="past"),
    ],
)
def test_the_dual_form_is_refused_where_there_is_none(spec):
    o = operands(spec)
    with pytest.raises(ValueError, match=r"form='dual' is of .* explain\(spec\).form is"):
        run(spec, o, "dual")


@pytest.mark.parametrize("chunk", [1, 3])
def test_no_tokens_leave_fast_weights_as_they_are(chunk):
    """As of a rank whose documents have no complete chunk."""
    spec = kvbind.InnerLoop(network=Linear(), loss="squared", chunk=chunk, visibility="token", momentum=True, retention=True)
    o = operands(spec)
    _, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
    rows = {name: x.transpose(1, 2)[:, :, :0] for name, x in (("k", o.k), ("v", o.v))}
    gates = {name: o.options[name].transpose(1, 2)[:, :, :0] for name in spec.gates}
    after = blockwise.advance(spec, Tokens(**rows, rates={"out": 1.0}, gates=gates), state.fast)
    assert torch.equal(after.weights["out"], state.weights["out"])
    assert torch.equal(after.momentum["out"], state.momentum["out"])


GRADCHECKED = {
    "full LaCT": kvbind.systems.lact_llm(chunk=2).replace(orthogonalize=NewtonSchulz(dtype=torch.float64)),
    "rung 2": kvbind.systems.ladder(
        kvbind.systems.lact_llm(chunk=2).replace(orthogonalize=NewtonSchulz(dtype=torch.float64))
    )["rung2"],
    "momentum and retention, one linear layer": memory(2).replace(network=Linear()),
    "an MLP with momentum and retention": memory(2),
    "gated delta rule": kvbind.systems.delta_net().replace(retention=True),
    "ViTTT, GLU": kvbind.systems.vittt(),
    "ViTTT, convolution": kvbind.systems.vittt("conv"),
    # with norms whose gradient counts, as it does in differences
    "LaCT views": kvbind.systems.lact_nvs().replace(
        orthogonalize=NewtonSchulz(dtype=torch.float64), steps=2, detach_norms=False
    ),
    "token, normalized": kvbind.InnerLoop(network=SwiGLU(), chunk=3, visibility="token", normalize=True, momentum=True),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name):
    spec = GRADCHECKED[name]
    o = operands(spec, batch=1, tokens=4 if spec.visibility == "full" else 5, heads=1, key_width=2, value_width=2, hidden=2)
    tensors = leaves(o)

    def output(*values):
        given = dict(zip(tensors, values, strict=True))
        weights = {name: given[f"weights.{name}"] for name in o.weights}
        lr = {name: given[f"lr.{name}"] for name in o.options["lr"]}
        gates = {name: given[name] for name in ("momentum", "retention") if name in given}
        return kvbind.ttt(spec, weights, given["q"], given["k"], given["v"], lr=lr, **gates)[0]

    assert torch.autograd.gradcheck(output, tuple(x.requires_grad_() for x in tensors.values()))


def test_auto_takes_the_parallel_form_where_there_is_one_and_more_than_one_chunk():
    from kvbind.forms.evaluate import chosen_form

    rungs = kvbind.systems.ladder(kvbind.systems.lact_llm(chunk=4))
    assert [chosen_form(spec, "auto", 8) for spec in rungs.values()] == ["recurrent"] * 2 + ["parallel"] * 5
    assert chosen_form(rungs["rung2"], "auto", 4) == "recurrent"
    assert chosen_form(kvbind.systems.vittt(), "auto", 64) == "recurrent"


def test_blocks_of_a_long_sequence_do_not_hold_a_state_per_token():
    """Linear attention with chunks of one token keeps one state per block, not per token."""
    spec = kvbind.systems.linear_attention()
    o = operands(spec, batch=1, tokens=1024, heads=1, key_width=32, value_width=32, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="parallel", **o.options)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 1024 * 32 * 32 * 4 / 4
