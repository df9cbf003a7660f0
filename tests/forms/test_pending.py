"""Tokens that wait beside a state: what `ttt` says of them, without its copies."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind import systems
from kvbind.forms.pending import MOST, PendingState, alike, read, read_rounded, rounded
from kvbind.forms.tokens import Tokens
from strategies import error, memory, operands

LADDER = systems.ladder(systems.lact_llm(chunk=16))
SPECS = {
    "rung0": LADDER["rung0"],
    "rung2": LADDER["rung2"],
    "rung6": LADDER["rung6"],
    "memory": memory(16),
    "read": LADDER["rung1"].replace(normalize="read"),
    "key": LADDER["rung1"].replace(query="key"),
}


class Writer:
    """Makes writers of their tensors by name."""

    tokens = staticmethod(Tokens.of)

    def same_as(self, other):
        return other is self


WRITER = Writer()


def made(o):
    """What the writers of a call are made of: their tensors by name."""
    rates = {f"rates.{name}": x for name, x in o.options["lr"].items()}
    gates = {name: o.options[name] for name in ("momentum", "retention") if name in o.options}
    return {"k": o.k, "v": o.v, **rates, **gates}


def started(spec, lengths, o):
    """The states of sequences that have had so many tokens each."""
    states = []
    for i, length in enumerate(lengths):
        part = o.span(0, length)
        weights = {name: x if x.dim() == 3 else x[i : i + 1] for name, x in part.weights.items()}
        options = {
            name: {key: y[i : i + 1] for key, y in x.items()} if isinstance(x, dict) else x[i : i + 1]
            for name, x in part.options.items()
        }
        states.append(kvbind.ttt(spec, weights, *(x[i : i + 1] for x in (part.q, part.k, part.v)), **options)[1])
    return kvbind.State.cat(states)


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_tokens_read_and_left_waiting_are_those_of_ttt(name, data):
    spec = SPECS[name]
    o = operands(spec, tokens=40)
    lengths = [data.draw(st.integers(1, 27)) for _ in range(o.q.shape[0])]
    room = 15 - max(n % 16 for n in lengths)
    sizes = data.draw(st.lists(st.integers(1, 3), max_size=room // 3 + 1).filter(lambda found: sum(found) <= room))
    before = started(spec, lengths, o)
    held, at, outputs = PendingState.of(before), 28, []
    for size in sizes:
        part = o.span(at, at + size)
        found = held.read(spec, part.q, made(part), WRITER)
        assert found is not None
        outputs.append(found[0])
        held, at = found[1], at + size
    part = o.span(28, at)
    expected, after = kvbind.ttt(spec, None, part.q, part.k, part.v, state=before, **part.options)
    settled = held.settled()
    assert settled.pending_lengths == after.pending_lengths
    assert list(settled.tensors) == list(after.tensors)
    for key, x in after.tensors.items():
        assert torch.equal(settled.tensors[key], x), key
    if sizes:
        assert error(torch.cat(outputs, 1), expected) < 1e-12


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=6, deadline=None)
@given(others=st.lists(st.integers(1, 27), max_size=2), waits=st.integers(0, 2))
def test_a_token_that_completes_chunks_leaves_what_ttt_leaves(name, others, waits):
    spec = SPECS[name]
    o = operands(spec, tokens=40)
    lengths = [15, *others, 15, 15][: o.q.shape[0]]
    before = started(spec, [max(1, n - waits) for n in lengths], o).map(lambda x: x.detach().requires_grad_())
    held = PendingState.of(before)
    for at in range(28, 28 + waits):
        part = o.span(at, at + 1)
        found = held.read(spec, part.q, made(part), WRITER)
        # a row may be due while tokens are put in wait
        held = found[1] if found is not None else held
    part = o.span(30, 31)
    output, after = held.complete(spec, part.q, made(part), WRITER)
    expected, state = kvbind.ttt(spec, None, part.q, part.k, part.v, state=held.settled(), **part.options)
    settled = after.settled()
    assert error(output, expected) < 1e-12
    assert settled.pending_lengths == state.pending_lengths
    assert list(settled.tensors) == list(state.tensors)
    gradients = []
    for y, of in ((output, settled), (expected, state)):
        total = y.square().sum()
        for key, x in of.tensors.items():
            assert error(x, state.tensors[key]) < 1e-12, key
            total = total + x.square().sum()
        gradients.append(
            torch.autograd.grad(total, list(before.tensors.values()), allow_unused=True, materialize_grads=True)
        )
    for key, mine, other in zip(before.tensors, *gradients, strict=True):
        assert error(mine, other) < 1e-9, key


def test_what_complete_cannot_do_is_left_to_ttt():
    spec = LADDER["rung1"].replace(chunk=4)
    o = operands(spec, tokens=8)
    held = PendingState.of(started(spec, [3] * o.q.shape[0], o))
    one, two = o.span(3, 4), o.span(3, 5)
    assert held.complete(spec, one.q, made(one), WRITER)[1].settled().pending_lengths == (0,) * o.q.shape[0]
    assert held.complete(spec, two.q, made(two), WRITER) is None
    assert held.complete(spec.replace(direction="ascent"), one.q, made(one), WRITER) is None
    assert held.complete(spec, one.q[:1], made(one), WRITER) is None
    windowed = spec.replace(window=2)
    assert PendingState.of(replace(held.state, spec=windowed)).complete(windowed, one.q, made(one), WRITER) is None


def test_what_completes_a_chunk_or_sees_more_than_the_last_update_is_left_to_ttt():
    spec = LADDER["rung0"]
    o = operands(spec, tokens=40)
    held = PendingState.of(started(spec, [14] * o.q.shape[0], o))
    none, one, two = (o.span(30, 30 + n) for n in range(3))
    assert held.read(spec, two.q, made(two), WRITER) is None
    assert held.read(spec, none.q, made(none), WRITER) is None
    found = held.read(spec, one.q, made(one), WRITER)
    assert found is not None
    assert found[1].read(spec, one.q, made(one), WRITER) is None
    assert held.read(spec.replace(direction="ascent"), one.q, made(one), WRITER) is None
    shown = spec.replace(visibility="chunk")
    other = PendingState.of(replace(held.state, spec=shown))
    assert other.read(shown, one.q, made(one), WRITER) is None
    _, fresh = kvbind.ttt(spec, o.weights, *(x[:, :0] for x in (o.q, o.k, o.v)), **o.span(0, 0).options)
    bare = kvbind.State(spec, {n: x for n, x in fresh.tensors.items() if "pending" not in n}, fresh.pending_lengths)
    assert PendingState.of(bare).read(spec, one.q, made(one), WRITER) is None


def test_no_more_than_some_tokens_wait_and_a_state_may_be_read_on_twice():
    spec = LADDER["rung6"].replace(chunk=4 * MOST)
    o = operands(spec, tokens=2 * MOST + 1)
    start = PendingState.of(started(spec, [1] * o.q.shape[0], o))
    held = start
    for at in range(1, 2 * MOST + 1):
        part = o.span(at, at + 1)
        held = held.read(spec, part.q, made(part), WRITER)[1]
        assert held.count == sum(each["k"].shape[1] for each in held.later) < MOST
    assert held.settled().pending_lengths == (2 * MOST + 1,) * o.q.shape[0]
    assert start.settled().pending_lengths == (1,) * o.q.shape[0]
    assert not start.settled().tensors["pending.k"][:, :, 1:].any()


def test_tokens_of_another_maker_go_to_their_places_before_others_are_read():
    spec = SPECS["rung2"]
    o = operands(spec, tokens=20)
    held = PendingState.of(started(spec, [2] * o.q.shape[0], o))
    first, second = o.span(2, 3), o.span(3, 4)
    held = held.read(spec, first.q, made(first), WRITER)[1]
    expected = PendingState.of(held.settled()).read(spec, second.q, made(second), WRITER)
    found = held.read(spec, second.q, made(second), Writer())
    assert torch.equal(found[0], expected[0])
    assert (found[1].count, len(found[1].later)) == (1, 1)
    assert found[1].settled().pending_lengths == (4,) * o.q.shape[0]


ERROR = 2**-7
"""Of a head's output, relative, where weights of width 64 or more are read in bfloat16; half of it of a last layer alone."""


def drawn_weights(spec, batch, width):
    """Fast weights of some rows, of which those that no update changes are one for all, and queries `[B, T, H, D]`."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(batch, 2, width, width, generator=generator) / width**0.5 for n in spec.network.matrices}
    weights |= {n: weights[n][:1].expand_as(weights[n]) for n in alike(spec)}
    return weights, torch.randn(batch, 48, 2, width, generator=generator)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("name", ["rung0", "rung2", "rung6"])
def test_reads_in_bfloat16_are_as_near_to_the_definition_as_is_said(name, width, batch):
    spec = SPECS[name]
    weights, q = drawn_weights(spec, batch, width)
    held = rounded(spec, weights)
    assert {x.dtype for x in held.values()} == {torch.bfloat16}
    assert {n: len(x) for n, x in held.items()} == {n: 1 if n in alike(spec) else batch for n in weights}
    assert bool(alike(spec)) == (name == "rung2")
    exact = read(spec, {n: x.double() for n, x in weights.items()}, q.double(), q.double())
    for dtype in (torch.float32, torch.bfloat16):
        found = read_rounded(spec, held, q.to(dtype), q.to(dtype))
        assert found.dtype == dtype
        wrong = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert wrong.mean() < (ERROR if spec.network.hidden_layers else ERROR / 2)
        assert wrong.max() < 2 * ERROR
        # and no nearer than rounding lets it be
        assert wrong.mean() > ERROR / 8


@pytest.mark.parametrize("name", ["rung0", "rung2", "rung6", "key"])
def test_only_single_tokens_without_gradients_are_read_in_bfloat16_and_states_stay_as_they_are(name):
    spec = SPECS[name]
    o = operands(spec, tokens=40, dtype=torch.float32)
    start = PendingState.of(started(spec, [13] * o.q.shape[0], o))
    caches, before = {False: start, True: start}, None
    with torch.no_grad():
        for at in range(13, 18):
            part, found = o.span(at, at + 1), {}
            for rounds, held in caches.items():
                step = held.read(spec, part.q, made(part), WRITER, rounds) or held.complete(
                    spec, part.q, made(part), WRITER, rounds
                )
                found[rounds], caches[rounds] = step
            assert not torch.equal(found[True], found[False])
            assert error(found[True], found[False]) < 0.03
            settled = [held.settled() for held in caches.values()]
            assert all(torch.equal(x, settled[1].tensors[n]) for n, x in settled[0].tensors.items())
            # rounded once for each chunk
            if at in (14, 17):
                assert caches[True].rounded is before
            before = caches[True].rounded
            assert (before is None) == (at == 15)
        two = o.span(18, 20)
        pair = [start.read(spec, two.q, made(two), WRITER, rounds)[0] for rounds in (True, False)]
        assert torch.equal(*pair)
    one = o.span(18, 19)
    pair = [start.read(spec, one.q, made(one), WRITER, rounds)[0] for rounds in (True, False)]
    assert torch.equal(*pair)
