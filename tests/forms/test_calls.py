"""Sequences cut into calls, packed into rows, moved between devices and dtypes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from strategies import DepthwiseConv, error, operands, parallel_specs, small_sizes, specs


def in_calls(spec, o, cuts, form="auto"):
    """Outputs and end state of the sequence cut at `cuts`."""
    state, outputs = None, []
    for start, stop in zip([0, *cuts], [*cuts, o.q.shape[1]], strict=True):
        part = o.span(start, stop)
        y, state = kvbind.ttt(spec, part.weights, part.q, part.k, part.v, state=state, form=form, **part.options)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@settings(max_examples=150)
@given(
    st.one_of(specs(visibilities=("past", "token")), parallel_specs(visibilities=("past", "token"))),
    small_sizes(20),
    st.data(),
)
def test_any_split_into_calls_equals_one_call(spec, size, data):
    o = operands(spec, **size)
    cuts = sorted(data.draw(st.lists(st.integers(0, size["tokens"]), max_size=5)))
    y, state = in_calls(spec, o, [])
    z, after = in_calls(spec, o, cuts)
    assert error(z, y) < 1e-10
    assert after.pending_lengths == state.pending_lengths
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name


@settings(max_examples=40)
@given(st.one_of(specs(visibilities=("past", "token")), parallel_specs(visibilities=("past", "token"))), small_sizes(11))
def test_single_tokens_equal_one_call(spec, size):
    o = operands(spec, **size)
    y, _ = in_calls(spec, o, [])
    z, _ = in_calls(spec, o, list(range(1, size["tokens"])))
    assert error(z, y) < 1e-10


@settings(max_examples=40)
@given(specs(visibilities=("chunk",)), small_sizes(20), st.data())
def test_chunk_visibility_may_be_split_between_chunks_and_its_state_anywhere(spec, size, data):
    o = operands(spec, **size)
    cut = data.draw(st.integers(0, size["tokens"]))
    y, state = in_calls(spec, o, [])
    z, after = in_calls(spec, o, [cut])
    assert torch.allclose(after.weights["out"], state.weights["out"], rtol=1e-9, atol=1e-11)
    if cut % spec.chunk == 0:
        assert error(z, y) < 1e-10


@settings(max_examples=80)
@given(st.one_of(specs(), parallel_specs()), small_sizes(24), st.data())
def test_packed_sequences_equal_each_alone(spec, size, data):
    o = operands(spec, **(size | {"batch": 1}))
    inside = sorted(data.draw(st.lists(st.integers(0, size["tokens"]), max_size=4)))
    bounds = [0, *inside, size["tokens"]]
    y, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, cu_seqlens=torch.tensor(bounds), **o.options)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        part = o.span(start, stop)
        if start == stop:
            assert torch.equal(state[i].weights["out"][0], kvbind.State.weights.fget(state[[i]])["out"][0])
            continue
        alone, end = kvbind.ttt(spec, part.weights, part.q, part.k, part.v, **part.options)
        assert error(y[:, start:stop], alone) < 1e-10
        assert state[i].pending_lengths == end.pending_lengths
        assert torch.allclose(state[i].weights["out"], end.weights["out"], rtol=1e-9, atol=1e-11)


@settings(max_examples=30)
@given(specs(visibilities=("past", "token")), st.integers(0, 2**20))
def test_packed_sequences_go_on_from_their_states(spec, seed):
    """Two rounds of packed documents equal each document's two parts alone; their pending lengths differ."""
    o = operands(spec, batch=1, tokens=18, seed=seed)
    first, second = [0, 5, 6, 11], [0, 2, 6, 7]
    a, b = o.span(0, 11), o.span(11, 18)
    ya, state = kvbind.ttt(spec, a.weights, a.q, a.k, a.v, cu_seqlens=first, **a.options)
    yb, _ = kvbind.ttt(spec, None, b.q, b.k, b.v, cu_seqlens=second, state=state, **b.options)
    for i in range(3):
        pa, pb = a.span(first[i], first[i + 1]), b.span(second[i], second[i + 1])
        za, mid = kvbind.ttt(spec, o.weights, pa.q, pa.k, pa.v, **pa.options)
        zb, _ = kvbind.ttt(spec, o.weights, pb.q, pb.k, pb.v, state=mid, **pb.options)
        assert error(ya[:, first[i] : first[i + 1]], za) < 1e-10
        assert error(yb[:, second[i] : second[i + 1]], zb) < 1e-10


@settings(max_examples=30)
@given(specs(visibilities=("past", "token")), st.integers(0, 2**20))
def test_rows_that_stopped_at_different_places_go_on_together(spec, seed):
    """A batch whose rows have different numbers of pending tokens: prompts of different lengths, then decoding."""
    o = operands(spec, batch=2, tokens=16, seed=seed)
    states, expected = [], []
    for row, length in enumerate((4, 7)):
        alone = operands(spec, batch=2, tokens=16, seed=seed).span(0, length)
        _, state = kvbind.ttt(spec, alone.weights, alone.q, alone.k, alone.v, **alone.options)
        rest = o.span(8, 16)
        y, _ = kvbind.ttt(spec, o.weights, rest.q, rest.k, rest.v, state=state, **rest.options)
        states.append(state[row])
        expected.append(y[row])
    rest = o.span(8, 16)
    y, after = kvbind.ttt(spec, o.weights, rest.q, rest.k, rest.v, state=kvbind.State.cat(states), **rest.options)
    assert error(y, torch.stack(expected)) < 1e-10
    assert after.batch == 2


@settings(max_examples=30)
@given(specs(visibilities=("full",), momentum=False), st.integers(0, 2**20))
def test_full_visibility_renders_from_a_kept_state_what_one_call_reads(spec, seed):
    o = operands(spec, tokens=10, seed=seed)
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, update_tokens=slice(0, 6), **o.options)
    _, scene = kvbind.ttt(spec, o.weights, *(x[:, :6] for x in (o.q, o.k, o.v)), **o.span(0, 6).options)
    rest = o.span(6, 10)
    z, same = kvbind.ttt(spec, None, rest.q, rest.k, rest.v, state=scene, update_tokens=slice(0, 0), **rest.options)
    assert error(z, y[:, 6:]) < 1e-10
    assert torch.equal(same.weights["out"], scene.weights["out"])
    nothing = torch.zeros(4, dtype=torch.bool)
    w, _ = kvbind.ttt(spec, None, rest.q, rest.k, rest.v, state=scene, update_tokens=nothing, **rest.options)
    assert error(w, y[:, 6:]) < 1e-10


def test_a_convolution_reads_neighbours_of_tokens_that_do_not_write():
    spec = kvbind.systems.vittt("conv", grid=(2, 3))
    assert isinstance(spec.network, DepthwiseConv)
    o = operands(spec, tokens=6)
    mask = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool)
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, update_tokens=slice(0, 2), **o.options)
    z, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, update_tokens=mask, **o.options)
    assert torch.equal(y, z)
    changed = o.k.clone()
    changed[:, 3] += 1
    w, _ = kvbind.ttt(spec, o.weights, o.q, changed, o.v, update_tokens=mask, **o.options)
    assert not torch.allclose(w, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_q_and_state_is_float32_or_wider(dtype):
    spec = kvbind.systems.lact_llm(chunk=4)
    o = operands(spec, tokens=9, dtype=dtype)
    y, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
    assert y.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(x.dtype == wide for x in (*state.weights.values(), *state.momentum.values(), *state.norms.values()))


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_autocast_does_not_lower_the_precision_inside(form):
    spec = kvbind.systems.ladder(kvbind.systems.lact_llm(chunk=4))["rung5"]
    o = operands(spec, tokens=9, dtype=torch.float32)
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form=form, **o.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form=form, **o.options)
    assert torch.equal(y, z)


def test_a_call_without_tokens_returns_its_state_unchanged():
    spec = kvbind.systems.lact_llm(chunk=4)
    o = operands(spec, tokens=6)
    _, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, **o.options)
    none = o.span(0, 0)
    y, after = kvbind.ttt(spec, None, none.q, none.k, none.v, state=state, **none.options)
    assert y.shape == (2, 0, 2, 4)
    assert all(torch.equal(x, after.tensors[name]) for name, x in state.tensors.items())


def test_a_float_rate_is_the_same_rate_for_every_token():
    spec = kvbind.systems.lact_llm(chunk=4)
    o = operands(spec, tokens=10)
    m = o.options["momentum"]
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, lr=0.5, momentum=m)
    tensor, by_matrix = torch.full((2, 10, 2), 0.5, dtype=torch.float64), dict.fromkeys(spec.updated, 0.5)
    for lr in (tensor, by_matrix, torch.tensor(0.5, dtype=torch.float64)):
        assert torch.equal(kvbind.ttt(spec, o.weights, o.q, o.k, o.v, lr=lr, momentum=m)[0], y)
    head, state = kvbind.ttt(spec, o.weights, o.q[:, :3], o.k[:, :3], o.v[:, :3], lr=0.5, momentum=m[:, :3])
    tail, _ = kvbind.ttt(spec, None, o.q[:, 3:], o.k[:, 3:], o.v[:, 3:], lr=tensor[:, 3:], momentum=m[:, 3:], state=state)
    assert error(torch.cat((head, tail), 1), y) < 1e-12


def test_every_sequence_may_have_starting_weights_of_its_own():
    spec = kvbind.systems.lact_llm(chunk=4)
    o = operands(spec, tokens=6)
    own = {name: torch.stack((x, 2 * x)) for name, x in o.weights.items()}
    y, _ = kvbind.ttt(spec, own, o.q, o.k, o.v, **o.options)
    for row in range(2):
        z, _ = kvbind.ttt(spec, {name: x[row] for name, x in own.items()}, o.q, o.k, o.v, **o.options)
        assert error(y[row], z[row]) < 1e-12


@pytest.mark.parametrize("what", range(3))
def test_tokens_one_by_one_without_gradients_see_what_is_not_finite_as_a_row_does(what):
    spec = kvbind.InnerLoop(network=kvbind.Linear(), chunk=4, update="last")
    operands = [torch.randn(1, 9, 2, 8) for _ in range(3)]
    operands[what][0, 6, 0, 3] = float("inf")
    weights, state, parts = spec.network.initial(2, 8, 8), None, []
    with torch.no_grad():
        whole, end = kvbind.ttt(spec, weights, *operands, lr=0.1)
        for t in range(9):
            part, state = kvbind.ttt(spec, weights, *(x[:, t : t + 1] for x in operands), lr=0.1, state=state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, equal_nan=True)
    torch.testing.assert_close(state.weights["out"], end.weights["out"], equal_nan=True)
