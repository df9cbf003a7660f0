"""Pieces of many sequences in one pool of states say what one call on each whole sequence says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import published
from kvbind.forms.halves import split
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import given_gates
from kvbind.inner.projections import Projections
from kvbind.inner.systems import SYSTEMS
from kvbind.layers.lact.layer import check_fits_lact_layer
from kvbind.layers.layout import Layout
from kvbind.models.lact.blocks import LactBlock
from kvbind.serving.states import Pages, Pool, StateLayout
from kvbind.serving.steps import Decoding, Pieces, PieceTails, Preparation, ServedStep, StepPlan, advance
from models.lact_small import LADDER, exact, small_config
from strategies import error

CHUNK, PAGE = 5, 4


def causal(inner):
    try:
        check_fits_lact_layer(inner)
    except ValueError:
        return False
    return True


NAMED = {name: exact(make()) for name, make in SYSTEMS.items() if causal(make())}


# each at its own chunk where that is one token, else at a chunk that pages do not divide
def shortened(inner):
    """With as few tokens in a chunk, or in a span of them."""
    if isinstance(inner.refresh, int):
        return inner.replace(refresh=CHUNK * (inner.chunk or 1))
    return inner if inner.chunk == 1 else inner.replace(chunk=CHUNK)


ATTENDING = {
    **{name: rung.replace(chunk=CHUNK) for name, rung in LADDER.items()},
    "prenorm": LADDER["rung0"].replace(chunk=CHUNK, normalize="read"),
    "read with keys": LADDER["rung1"].replace(chunk=CHUNK, query="key"),
    **{name: shortened(inner) for name, inner in NAMED.items()},
}
ALONE = {f"{name} alone": (inner, name) for name, inner in published.SYSTEMS.items()}
ALONE |= {
    # a chunk's update is left to the next step, of a slot that has all of it
    "rung0 alone": (ATTENDING["rung0"], Projections(rotary="sequence")),
    "mamba2 in chunks alone": (published.SYSTEMS["mamba2"].replace(chunk=CHUNK, visibility="past"), "mamba2"),
}
CASES = {name: (inner, None) for name, inner in ATTENDING.items()} | ALONE
"""Inner loops, each with projections, which are None beside attention."""


def layer_of(name):
    inner, projections = CASES[name]
    return LactBlock(small_config(inner, projections=projections)).attn


class Engine:
    """A paged engine in few lines: slots and pages are handed out, taken back and handed out again with what was in them."""

    def __init__(self, name, dtype=torch.float64, rounds=False):
        torch.manual_seed(0)
        self.layer, self.dtype = layer_of(name).to(dtype), dtype
        with torch.device("meta"):
            self.layout = StateLayout.of(layer_of(name))
        self.start = {name: x.detach() for name, x in self.layer.start_weights().items()}
        # what is left in a slot or on a page must not matter
        rows = torch.full((4, self.layout.size), torch.nan, dtype=dtype)
        rounded = {n: split(x)[0] for n, x in self.start.items()} if rounds else None
        self.pool = Pool(self.layout, rows, self.start, rounded_start=rounded)
        width = sum(self.layout.widths)
        self.cells = torch.full((64, self.layout.heads, PAGE, width), torch.nan, dtype=dtype)
        self.free, self.held = list(range(64)), {}

    def drawn(self, length, seed):
        """A sequence's input to the inner loop, and what comes out of it in one call."""
        x = self.input(length, seed)
        with torch.no_grad():
            call = self.layer.call(x)
            rates = call.lr if isinstance(call.lr, dict) else dict.fromkeys(call.inner.updated, call.lr)
            return (call.q, Tokens(call.k, call.v, rates, call.gates)), call.run()[0]

    def input(self, length, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, length, self.layer.hidden_size, generator=generator, dtype=torch.float64).to(self.dtype)

    def cut(self, made, start, stop):
        """Some of a sequence's tokens."""
        q, tokens = made
        return q[:, start:stop], tokens.map(lambda x: x[:, start:stop])

    def made(self, given, pieces, seen, slots):
        """Queries and writers of what is given to a step."""
        heads_first = [writers.map(lambda x: x.transpose(1, 2)) for _, writers in given]
        return torch.cat([q for q, _ in given], dim=1), Tokens.cat(heads_first).map(lambda x: x.transpose(1, 2))

    def finished(self, found):
        """The output of what the inner loop says."""
        return found

    def step(self, given):
        """Run pieces behind those that each sequence has had, by sequence; returns their outputs."""
        bounds, at, seen, states = [0], [], [], []
        for sequence, piece in given.items():
            slot, pages, done = self.held.setdefault(sequence, [len(self.held), [], 0])
            end = done + self.length(piece)
            while len(pages) * PAGE < end:
                pages.append(self.free.pop(0))
            at += [pages[x // PAGE] * PAGE + x % PAGE for x in range(done, end)]
            bounds.append(bounds[-1] + end - done)
            seen.append(done)
            states.append(slot)
            self.held[sequence][2] = end
        tables = torch.zeros(len(given), self.cells.shape[0], dtype=torch.int32)
        for row, sequence in enumerate(given):
            used = self.held[sequence][1]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        paged = self.layout.places and self.layout.paged
        pages = Pages(self.cells, tables, torch.tensor(at)) if paged else None
        cpu, slots = torch.device("cpu"), torch.tensor(states)
        single = bounds[-1] == len(given) and Decoding.is_for(self.layout)
        with torch.no_grad():
            if single:
                Preparation.of(self.layout, seen, cpu).run(slots, pages, self.pool)
                pieces = Pieces(torch.arange(len(given) + 1), torch.arange(len(given)), None)
            else:
                pieces = Pieces.of(bounds, seen, cpu)
            q, tokens = self.made(list(given.values()), pieces, seen, slots)
            if single:
                places = torch.tensor(seen) % (self.layout.places or 1)
                found = Decoding(slots, places).advance(pages, self.pool, q, tokens)
            else:
                plan = StepPlan.of(self.layout, bounds, seen, cpu)
                found = advance(ServedStep(plan, slots, pages), self.pool, q, tokens)
            found = self.finished(found)
        for sequence in given:
            self.forget_pages(sequence)
        return [found[:, a:b] for a, b in pairwise(bounds)]

    def length(self, piece):
        return piece[0].shape[1]

    def forget_pages(self, sequence):
        """Take back pages that the layout says are not read any more."""
        _, pages, done = self.held[sequence]
        for i, page in enumerate(pages):
            if (i + 1) * PAGE <= done - self.layout.reach:
                self.cells[page] = torch.nan

    def end(self, sequence):
        """Hand a sequence's slot to the next one, as it is."""
        slot, pages, _ = self.held.pop(sequence)
        self.free = pages + [page for page in self.free if page not in pages]
        return slot


class Alone(Engine):
    """Of layers without attention all is run, as what their convolutions read is in the slots too."""

    def drawn(self, length, seed):
        x = self.input(length, seed)
        with torch.no_grad():
            return x, self.layer(x)[0]

    def cut(self, made, start, stop):
        return made[:, start:stop]

    def length(self, piece):
        return piece.shape[1]

    def made(self, given, pieces, seen, slots):
        positions = torch.cat([torch.arange(x.shape[1]) + done for x, done in zip(given, seen, strict=True)])[None]
        tails = PieceTails(pieces, slots, self.pool)
        made = self.kept = self.layer._make(torch.cat(given, dim=1), Layout(positions), positions, tails)
        rates = dict.fromkeys(self.layer.inner.updated, made.lr)
        return made.q, Tokens(made.k, made.v, rates, given_gates(**made.gates))

    def finished(self, found):
        return self.layer.o_proj(self.layer._join(found, self.kept))


def engine_of(name):
    return (Alone if name in ALONE else Engine)(name)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=6)
def test_pieces_of_any_sizes_say_what_one_call_says(name, data):
    engine = engine_of(name)
    lengths = data.draw(st.lists(st.integers(1, 4 * CHUNK), min_size=1, max_size=3))
    drawn = [engine.drawn(length, seed) for seed, length in enumerate(lengths)]
    got, done = [[] for _ in lengths], [0] * len(lengths)
    while done != lengths:
        waiting = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        pieces, single = {}, data.draw(st.booleans())
        for i in chosen:
            stop = done[i] + 1 if single else data.draw(st.integers(done[i] + 1, lengths[i]))
            pieces[i] = engine.cut(drawn[i][0], done[i], stop)
            done[i] = stop
        for i, found in zip(chosen, engine.step(pieces), strict=True):
            got[i].append(found)
    for i, (_, expected) in enumerate(drawn):
        torch.testing.assert_close(torch.cat(got[i], dim=1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["rung0", "rung6", "titans", "ttt_linear", "delta_net", "rung0 alone", "titans alone", "rwkv7 alone", "kda alone"],
)
def test_a_slot_and_pages_of_an_earlier_sequence_leave_no_trace(name):
    engine = engine_of(name)
    for seed in range(4):
        made, expected = engine.drawn(2 * CHUNK + 2, seed)
        # the last begins with a step of one token
        pieces = [0, 1 if seed == 3 else 3, CHUNK, 2 * CHUNK, 2 * CHUNK + 2]
        got = [engine.step({seed: engine.cut(made, a, b)})[0] for a, b in pairwise(pieces)]
        torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-9)
        assert engine.end(seed) == 0


@pytest.mark.parametrize("name", ["rung0", "rung2", "rung6", "prenorm"])
def test_single_tokens_may_be_read_in_bfloat16_of_states_that_stay_as_they_are(name):
    engines = [Engine(name, torch.float32, rounds) for rounds in (False, True)]
    lengths = (3 * CHUNK + 2, CHUNK, 2 * CHUNK + 1)
    found = []
    for engine in engines:
        drawn = [engine.drawn(length, seed)[0] for seed, length in enumerate(lengths)]
        # some tokens at once, and then one by one
        outputs = engine.step({i: engine.cut(made, 0, 3) for i, made in enumerate(drawn)})
        for at in range(3, max(lengths)):
            now = {i: engine.cut(made, at, at + 1) for i, made in enumerate(drawn) if at < lengths[i]}
            outputs += engine.step(now)
        found.append(outputs)
    assert all(map(torch.equal, found[0][:3], found[1][:3]))
    for as_it_is, rounded in zip(found[0][3:], found[1][3:], strict=True):
        assert not torch.equal(as_it_is, rounded)
        assert error(rounded, as_it_is) < 0.03
    plain, halved = (engine.pool for engine in engines)
    assert not torch.equal(plain.rows[:3], halved.rows[:3])
    torch.testing.assert_close(halved.whole(halved.rows[:3]), plain.rows[:3], rtol=0, atol=0, equal_nan=True)


def test_a_layout_of_one_rank_of_two_has_half_of_the_numbers():
    with torch.device("meta"):
        layer = layer_of("rung0")
    one, half = StateLayout.of(layer), StateLayout.of(layer, ranks=2)
    assert (half.heads, half.size) == (1, one.size // 2)
    matrices = 3 * 16 * 16
    # weights, momentum, norms; momentum gates and three rates of each token of a chunk
    assert half.size == 2 * matrices + 3 * 16 + CHUNK * 4


def test_matrices_that_are_not_updated_take_no_room():
    with torch.device("meta"):
        layout = StateLayout.of(layer_of("rung2"))
    assert list(layout.fixed) == ["weights.out", "momentum.out"]


def test_a_chunk_that_a_step_ends_is_settled_by_the_next():
    with torch.device("meta"):
        layout = StateLayout.of(layer_of("rung0"))
    plan = StepPlan.of(layout, [0, 1, 3], [CHUNK - 1, CHUNK], torch.device("cpu"))
    assert plan.fresh is None
    assert plan.later is None
    assert [(length, part.rows.tolist()) for length, part in plan.reads] == [(1, [0]), (2, [1])]
    assert plan.due is not None
    assert plan.due.rows.tolist() == [1]
    assert plan.due.pending == (CHUNK - 1,)
