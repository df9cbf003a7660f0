"""Every field of an inner loop, alone and together, against the reference that is written for the tests."""

import tempfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
import reference
from kvbind import State
from strategies import error, general_specs, leaves, operands, small_sizes

LIMIT = 1e-8


def run(spec, o, **options):
    return kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="recurrent", **o.options, **options)


def stopped(state, final):
    """The state's weights and the reference's, side by side."""
    for b, heads in enumerate(final):
        for h, w in enumerate(heads):
            for name, x in w.items():
                held = state.weights[name][b, h]
                yield held[0] if reference.is_vector(name) else held, x


@given(general_specs(), small_sizes(9))
@settings(max_examples=120)
def test_outputs_and_states_are_the_references(spec, sizes):
    o = operands(spec, **sizes)
    y, state = run(spec, o)
    expected, final = reference.run(spec, o.weights, o.q, o.k, o.v, **o.options)
    assert y.shape == expected.shape
    assert error(y, expected) < LIMIT
    for held, x in stopped(state, final):
        assert torch.allclose(held, x, rtol=LIMIT, atol=LIMIT)
    state.check()


@given(general_specs(), small_sizes(6))
@settings(max_examples=50)
def test_gradients_are_the_references(spec, sizes):
    o = operands(spec, **sizes)
    named = {name: x.requires_grad_() for name, x in leaves(o).items()}
    slope = torch.randn(*o.q.shape[:3], o.v.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((y * slope).sum(), list(named.values()), allow_unused=True, materialize_grads=True)
        for y in (run(spec, o)[0], reference.run(spec, o.weights, o.q, o.k, o.v, **o.options)[0])
    )
    for name, x, y in zip(named, found, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-7 * max(1.0, float(y.abs().max()))), name


@given(general_specs(visibilities=("past", "token")), small_sizes(11), st.data())
@settings(max_examples=80)
def test_any_split_into_calls_is_one_call(spec, sizes, data):
    if spec.refresh == "call":
        spec = spec.replace(refresh=None)
    o = operands(spec, **sizes)
    whole, end = run(spec, o)
    length = sizes["tokens"]
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
    state, outputs = None, []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        y, state = run(spec, o.span(start, stop), state=state)
        outputs.append(y)
        state = state.detach()[list(range(state.batch))]
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            state.save(file.name)
            state = State.load(file.name)
    assert error(torch.cat(outputs, dim=1), whole) < LIMIT
    assert state.pending_lengths == end.pending_lengths
    for name, x in end.tensors.items():
        assert torch.allclose(state.tensors[name], x, rtol=LIMIT, atol=LIMIT), name


@given(general_specs(), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 99))
@settings(max_examples=50)
def test_packed_sequences_are_sequences_of_their_own(spec, lengths, seed):
    if spec.anchor is not None and spec.anchor.peak == "batch":
        spec = spec.replace(anchor=None)
    o = operands(spec, batch=1, tokens=sum(lengths), seed=seed)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    y, state = run(spec, o, cu_seqlens=bounds)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        alone, after = run(spec, o.span(start, stop))
        assert torch.allclose(y[:, start:stop], alone, rtol=LIMIT, atol=LIMIT)
        for name, x in after.tensors.items():
            assert torch.allclose(state[i].tensors[name], x, rtol=LIMIT, atol=LIMIT), name


@given(general_specs(), small_sizes(9), st.data())
@settings(max_examples=80)
def test_tokens_that_do_not_write(spec, sizes, data):
    o = operands(spec, **sizes)
    batch, length = sizes["batch"], sizes["tokens"]
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)))
    mask = mask.reshape(batch, length)
    y, state = run(spec, o, update_tokens=mask)
    expected, final = reference.run(spec, o.weights, o.q, o.k, o.v, update_tokens=mask, **o.options)
    assert error(y, expected) < LIMIT
    for held, x in stopped(state, final):
        assert torch.allclose(held, x, rtol=LIMIT, atol=LIMIT)
    if spec.visibility in ("past", "token") and spec.refresh != "call":
        cut = data.draw(st.integers(0, length))
        first, middle = run(spec, o.span(0, cut), update_tokens=mask[:, :cut])
        middle.check()
        second, end = run(spec, o.span(cut, None), update_tokens=mask[:, cut:], state=middle)
        assert error(torch.cat((first, second), dim=1), expected) < LIMIT
        assert end.pending_lengths == state.pending_lengths


@pytest.mark.parametrize("start", [0, 2, 3])
def test_a_slice_of_writers_is_a_mask_of_them(start):
    spec = kvbind.InnerLoop(kvbind.SwiGLU(), visibility="full", chunk=2, normalize=True)
    o = operands(spec, tokens=7)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[start:6] = True
    sliced, masked = (run(spec, o, update_tokens=which)[0] for which in (slice(start, 6), mask))
    assert error(sliced, masked) < 1e-12


@given(general_specs(), small_sizes(9), st.data())
@settings(max_examples=120)
def test_linear_attention_is_the_inner_loop(spec, sizes, data):
    o = operands(spec, **sizes)
    options = dict(o.options)
    if spec.window_size == 1 and data.draw(st.booleans()):
        count = sizes["batch"] * sizes["tokens"]
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        options["update_tokens"] = mask.reshape(sizes["batch"], -1)
    attention = kvbind.linearize(spec, o.weights, o.q, o.k, o.v, **options)
    expected, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="recurrent", **options)
    assert error(attention.output(), expected) < LIMIT
    # what weights say, and what no token wrote
    parts = [attention.weights(d)[..., None] for d in range(o.v.shape[-1])]
    mixed = torch.cat([(w * attention.v.transpose(1, 2)[:, :, None, :, d, None]).sum(3) for d, w in enumerate(parts)], -1)
    before = mixed.transpose(1, 2) + attention.initial_output()
    assert error(before if attention.head is None else attention.head(before), expected) < 1e-6


@given(general_specs(), small_sizes(7))
@settings(max_examples=40)
def test_every_inner_loop_is_explained_and_reads_back(spec, sizes):
    found = kvbind.explain(spec)
    text = str(found)
    assert all(obstacle.field in text for obstacle in found.obstacles)
    assert kvbind.explain(found.nearest).parallel
    assert found.parallel == (not found.obstacles)
    assert kvbind.InnerLoop.from_yaml(spec.to_yaml()) == spec
    o = operands(spec, **sizes)
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
    assert error(y, run(spec, o)[0]) < LIMIT
    losses = kvbind.inner_loss(spec, o.weights, o.k, o.v, **o.options)
    assert losses.shape[:2] == o.q.shape[::2][:2]
    assert losses.isfinite().all()
