"""Pieces of many sequences in one pool of states say what one call on each whole sequence says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind.forms.tokens import Tokens
from kvbind.inner.systems import SYSTEMS
from kvbind.layers.lact import check_fits_lact_layer
from kvbind.models.lact.model import LactBlock
from kvbind.serving.states import Pages, Pool, StateLayout
from kvbind.serving.steps import Decoding, Plan, Preparation, Step, advance
from models.lact_small import LADDER, exact, small_config

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


CASES = {
    **{name: rung.replace(chunk=CHUNK) for name, rung in LADDER.items()},
    "prenorm": LADDER["rung0"].replace(chunk=CHUNK, normalize="read"),
    "read with keys": LADDER["rung1"].replace(chunk=CHUNK, query="key"),
    **{name: shortened(inner) for name, inner in NAMED.items()},
}


class Engine:
    """A paged engine in few lines: slots and pages are handed out, taken back and handed out again with what was in them."""

    def __init__(self, inner, ranks=1):
        torch.manual_seed(0)
        self.layer = LactBlock(small_config(inner)).attn.double()
        with torch.device("meta"):
            self.layout = StateLayout.of(LactBlock(small_config(inner)).attn, ranks)
        self.start = {name: x.detach() for name, x in self.layer.start_weights().items()}
        # what is left in a slot or on a page must not matter
        rows = torch.full((4, self.layout.size), torch.nan, dtype=torch.float64)
        self.pool = Pool(self.layout, rows, self.start)
        width = sum(self.layout.widths)
        self.cells = torch.full((64, self.layout.heads, PAGE, width), torch.nan, dtype=torch.float64)
        self.free, self.held = list(range(64)), {}

    def drawn(self, length, seed):
        """A sequence's queries and writers, and its outputs from one call."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, length, self.layer.hidden_size, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            call = self.layer.call(x)
            rates = call.lr if isinstance(call.lr, dict) else dict.fromkeys(call.inner.updated, call.lr)
            return call.q, Tokens(call.k, call.v, rates, call.gates), call.run()[0]

    def step(self, pieces):
        """Run pieces (sequence, queries, writers) behind those that each sequence has had; returns their outputs."""
        bounds, at, seen, states = [0], [], [], []
        for sequence, q, _ in pieces:
            slot, pages, done = self.held.setdefault(sequence, [len(self.held), [], 0])
            end = done + q.shape[1]
            while len(pages) * PAGE < end:
                pages.append(self.free.pop(0))
            at += [pages[x // PAGE] * PAGE + x % PAGE for x in range(done, end)]
            bounds.append(bounds[-1] + q.shape[1])
            seen.append(done)
            states.append(slot)
            self.held[sequence][2] = end
        tables = torch.zeros(len(pieces), self.cells.shape[0], dtype=torch.int32)
        for row, (sequence, *_) in enumerate(pieces):
            used = self.held[sequence][1]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        pages = Pages(self.cells, tables, torch.tensor(at)) if self.layout.places else None
        cpu = torch.device("cpu")
        q = torch.cat([q for _, q, _ in pieces], dim=1)
        heads_first = [writers.map(lambda x: x.transpose(1, 2)) for *_, writers in pieces]
        tokens = Tokens.cat(heads_first).map(lambda x: x.transpose(1, 2))
        slots, single = torch.tensor(states), q.shape[1] == len(pieces)
        with torch.no_grad():
            if single and Decoding.is_for(self.layout):
                Preparation.of(self.layout, seen, cpu).run(slots, pages, self.pool)
                places = torch.tensor(seen) % (self.layout.places or 1)
                found = Decoding(slots, places).advance(pages, self.pool, q, tokens)
            else:
                plan = Plan.of(self.layout, bounds, seen, cpu)
                found = advance(Step(plan, slots, pages), self.pool, q, tokens)
        for sequence, *_ in pieces:
            self.forget_pages(sequence)
        return [found[:, a:b] for a, b in pairwise(bounds)]

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


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=6)
def test_pieces_of_any_sizes_say_what_one_call_says(name, data):
    engine = Engine(CASES[name])
    lengths = data.draw(st.lists(st.integers(1, 4 * CHUNK), min_size=1, max_size=3))
    drawn = [engine.drawn(length, seed) for seed, length in enumerate(lengths)]
    got, done = [[] for _ in lengths], [0] * len(lengths)
    while done != lengths:
        waiting = [i for i, length in enumerate(lengths) if done[i] < length]
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        pieces, single = [], data.draw(st.booleans())
        for i in chosen:
            stop = done[i] + 1 if single else data.draw(st.integers(done[i] + 1, lengths[i]))
            q, writers, _ = drawn[i]
            pieces.append((i, q[:, done[i] : stop], writers.map(lambda x, a=done[i], b=stop: x[:, a:b])))
            done[i] = stop
        for i, found in zip(chosen, engine.step(pieces), strict=True):
            got[i].append(found)
    for i, (_, _, expected) in enumerate(drawn):
        torch.testing.assert_close(torch.cat(got[i], dim=1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["rung0", "rung6", "titans", "ttt_linear", "delta_net"])
def test_a_slot_and_pages_of_an_earlier_sequence_leave_no_trace(name):
    engine = Engine(CASES[name])
    for seed in range(3):
        q, writers, expected = engine.drawn(2 * CHUNK + 2, seed)
        pieces = [0, 3, CHUNK, 2 * CHUNK, 2 * CHUNK + 2]
        got = [engine.step([(seed, q[:, a:b], writers.map(lambda x, a=a, b=b: x[:, a:b]))])[0] for a, b in pairwise(pieces)]
        torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=0, atol=1e-9)
        assert engine.end(seed) == 0


def test_a_layout_of_one_rank_of_two_has_half_of_the_numbers():
    with torch.device("meta"):
        layer = LactBlock(small_config(CASES["rung0"])).attn
    one, half = StateLayout.of(layer), StateLayout.of(layer, ranks=2)
    assert (half.heads, half.size) == (1, one.size // 2)
    matrices = 3 * 16 * 16
    # weights, momentum, norms; momentum gates and three rates of each token of a chunk
    assert half.size == 2 * matrices + 3 * 16 + CHUNK * 4


def test_matrices_that_are_not_updated_take_no_room():
    with torch.device("meta"):
        layout = StateLayout.of(LactBlock(small_config(CASES["rung2"])).attn)
    assert list(layout.fixed) == ["weights.out", "momentum.out"]


def test_a_chunk_that_a_step_ends_is_settled_by_the_next():
    with torch.device("meta"):
        layout = StateLayout.of(LactBlock(small_config(CASES["rung0"])).attn)
    plan = Plan.of(layout, [0, 1, 3], [CHUNK - 1, CHUNK], torch.device("cpu"))
    assert plan.fresh is None
    assert plan.later is None
    assert [(length, part.rows.tolist()) for length, part in plan.reads] == [(1, [0]), (2, [1])]
    assert plan.due is not None
    assert plan.due.rows.tolist() == [1]
    assert plan.due.pending == (CHUNK - 1,)
