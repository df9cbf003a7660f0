import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import kvbind
from strategies import error, operands

SPEC = kvbind.systems.lact_llm(chunk=4).replace(retention=True, orthogonalize=kvbind.NewtonSchulz(dtype=torch.float64))


@pytest.fixture
def run():
    o = operands(SPEC, batch=3, tokens=10)
    y, _ = kvbind.ttt(SPEC, o.weights, o.q, o.k, o.v, **o.options)
    head, tail = o.span(0, 6), o.span(6, 10)
    _, state = kvbind.ttt(SPEC, o.weights, head.q, head.k, head.v, **head.options)
    return state, tail, y[:, 6:]


def resume(state, tail):
    return kvbind.ttt(SPEC, None, tail.q, tail.k, tail.v, state=state, **tail.options)[0]


def test_saved_state_goes_on_where_it_stopped(run, tmp_path):
    state, tail, y = run
    state.save(tmp_path / "state.safetensors")
    loaded = kvbind.State.load(tmp_path / "state.safetensors")
    assert loaded.spec == SPEC
    assert loaded.pending_lengths == (2, 2, 2)
    for name, x in state.tensors.items():
        assert torch.equal(loaded.tensors[name], x)
    assert error(resume(loaded, tail), y) < 1e-10


def test_a_file_without_a_state_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="path must be a file"):
        kvbind.State.load(tmp_path / "other.safetensors")


def test_state_is_a_pytree_of_its_tensors(run):
    state, tail, _ = run
    leaves, treedef = pytree.tree_flatten(state)
    assert all(isinstance(x, torch.Tensor) for x in leaves)
    again = pytree.tree_unflatten([x.clone() for x in leaves], treedef)
    assert error(resume(again, tail), resume(state, tail)) < 1e-10
    doubled = pytree.tree_map(lambda x: 2 * x, state)
    assert torch.equal(doubled.weights["gate"], 2 * state.weights["gate"])


def test_indexing_chooses_sequences_as_beam_search_does(run):
    state, tail, _ = run
    y = resume(state, tail)
    order = [2, 0, 0]
    for index in (order, torch.tensor(order)):
        chosen = state[index]
        assert chosen.batch == 3
        z = kvbind.ttt(
            SPEC,
            None,
            tail.q[order],
            tail.k[order],
            tail.v[order],
            state=chosen,
            lr={name: x[order] for name, x in tail.options["lr"].items()},
            momentum=tail.options["momentum"][order],
            retention=tail.options["retention"][order],
        )[0]
        assert error(z, y[order]) < 1e-10
    assert state[1].batch == 1
    assert state[1:].batch == 2
    assert torch.equal(state[-1].weights["out"][0], state.weights["out"][2])


def test_size_does_not_depend_on_the_number_of_tokens():
    sizes = set()
    for tokens in (1, 3, 4, 9, 40):
        o = operands(SPEC, tokens=tokens)
        _, state = kvbind.ttt(SPEC, o.weights, o.q, o.k, o.v, **o.options)
        sizes.add(sum(x.numel() * x.element_size() for x in state.tensors.values()))
    assert len(sizes) == 1


def test_moving_detaching_copying_and_showing(run):
    state, tail, _ = run
    weights = {name: x.requires_grad_() for name, x in operands(SPEC, batch=3).weights.items()}
    o = operands(SPEC, batch=3, tokens=6)
    _, live = kvbind.ttt(SPEC, weights, o.q, o.k, o.v, **o.options)
    assert live.weights["out"].requires_grad
    assert not live.detach().weights["out"].requires_grad
    assert live.to(torch.float32).weights["out"].dtype == torch.float32
    assert torch.equal(resume(copy.deepcopy(state), tail), resume(state, tail))
    assert "3 sequences" in repr(state)


def test_gradients_flow_through_a_state_into_the_call_before():
    o = operands(SPEC, tokens=10)
    k = o.k.clone().requires_grad_()
    y, _ = kvbind.ttt(SPEC, o.weights, o.q, k, o.v, **o.options)
    (whole,) = torch.autograd.grad(y[:, 6:].sum(), k)
    head, tail = o.span(0, 6), o.span(6, 10)
    _, state = kvbind.ttt(SPEC, o.weights, head.q, k[:, :6], head.v, **head.options)
    z, _ = kvbind.ttt(SPEC, None, tail.q, k[:, 6:], tail.v, state=state, **tail.options)
    (parts,) = torch.autograd.grad(z.sum(), k)
    assert error(parts, whole) < 1e-10


def test_states_of_different_inner_loops_are_not_joined(run):
    state, _, _ = run
    other = kvbind.State(SPEC.replace(direction="ascent"), state.tensors, state.pending_lengths)
    with pytest.raises(ValueError, match="states must be of one inner loop; theirs differ in direction"):
        kvbind.State.cat([state, other])
    with pytest.raises(ValueError, match="at least one state"):
        kvbind.State.cat([])


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"must be a file that State\.save wrote"):
        kvbind.State.load(tmp_path / "state.safetensors")
