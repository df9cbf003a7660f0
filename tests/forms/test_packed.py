"""Packed documents whose boundaries the device reads: what `ttt(cu_seqlens=...)` gives, with nothing read by the host."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind import GLU, MLP, InnerLoop, Linear, NewtonSchulz, NoParallelFormError, Retention, SwiGLU, ttt
from kvbind.forms.packed import MOST_CHUNKS, packed, uncovered
from kvbind.inner.value import unchecked_values
from kvbind.kernels.chunked.span_tables import chunked_layout, packed_layout
from kvbind.sequence.boundaries import LEAST_CAPACITY, Boundaries, capacity_for, with_room
from strategies import error, leaves, operands, specs
from tape import Tape

CPU = torch.device("cpu")
LADDER = {
    "rung0": InnerLoop(network=SwiGLU(), momentum=True, orthogonalize=NewtonSchulz(), normalize=True, chunk=4),
    "rung2": InnerLoop(network=SwiGLU(), update="last", momentum=True, orthogonalize=NewtonSchulz(), chunk=4),
    "rung6": InnerLoop(network=Linear(), update="last", chunk=4),
    "retention": InnerLoop(network=MLP(), momentum=True, retention=True, chunk=3),
}


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def in_one(spec, o, bounds, **options):
    gates = {name: x for name, x in o.options.items() if name != "lr"}
    there = Boundaries(with_room(bounds), o.q.shape[1])
    return packed(spec, o.weights, o.q, o.k, o.v, there, lr=o.options["lr"], **gates, **options)


def gradients(output, o, slope=None):
    given = [x.requires_grad_() for x in leaves(o).values()]
    if slope is None:
        slope = slope_of(output.shape)
    return torch.autograd.grad((output * slope).sum(), given, allow_unused=True, materialize_grads=True)


def slope_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def watched(o):
    for x in leaves(o).values():
        x.requires_grad_()
    return o


@settings(max_examples=30)
@given(
    spec=specs(visibilities=("past",)).filter(lambda spec: spec.chunk > 1),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=10).filter(any),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_are_those_of_boundaries_that_the_host_reads(spec, lengths, seed):
    o = watched(operands(spec, batch=1, tokens=sum(lengths), seed=seed))
    bounds = bounds_of(lengths)
    expected, _ = ttt(spec, o.weights, o.q, o.k, o.v, **o.options, cu_seqlens=bounds)
    found = in_one(spec, o, bounds)
    assert error(found, expected) < 1e-9
    pairs = zip(gradients(found, o), gradients(expected, o), strict=True)
    assert all((x - y).norm() <= 1e-7 * (1 + y.norm()) for x, y in pairs)


@pytest.mark.parametrize("spec", LADDER.values(), ids=LADDER)
def test_what_is_written_down_once_does_for_other_boundaries(spec):
    o = watched(operands(spec, batch=1, tokens=40))
    bounds = with_room(bounds_of([7, 3, 12, 0, 18]))
    names, slope = list(leaves(o)), slope_of(o.v.shape)

    def work():
        gates = {name: x for name, x in o.options.items() if name != "lr"}
        output = packed(spec, o.weights, o.q, o.k, o.v, Boundaries(bounds, 40), lr=o.options["lr"], **gates)
        return output, gradients(output, o, slope)

    tape = Tape()
    with unchecked_values(), tape:
        output, grads = work()
    for lengths in ([7, 3, 12, 0, 18], [40], [1] * 7 + [33], [3, 3, 4, 4, 5, 5, 8, 8], [39, 1]):
        bounds.copy_(torch.cat((new := bounds_of(lengths), new[-1:].expand(len(bounds) - len(new)))))
        tape.replay()
        expected, _ = ttt(spec, o.weights, o.q, o.k, o.v, **o.options, cu_seqlens=new)
        assert error(output, expected) < 1e-9
        for name, x, y in zip(names, grads, gradients(expected, o), strict=True):
            assert (x - y).norm() <= 1e-7 * (1 + y.norm()), name


@pytest.mark.parametrize("spec", LADDER.values(), ids=LADDER)
@pytest.mark.parametrize("at", ["k", "v", "q"])
def test_what_is_not_finite_stays_in_its_document(spec, at):
    o = operands(spec, batch=1, tokens=40)
    bounds = bounds_of([9, 3, 12, 16])
    getattr(o, at)[0, 13] = math.nan
    clean = operands(spec, batch=1, tokens=40)
    found, expected = in_one(spec, watched(o), bounds), in_one(spec, watched(clean), bounds)
    others = torch.tensor([True] * 12 + [False] * 12 + [True] * 16)
    assert torch.equal(found[:, others], expected[:, others])
    assert found.isnan().any()
    marks = torch.zeros_like(found)
    marks[:, others] = 1.0
    slopes = [torch.autograd.grad((y.where(marks > 0, 0.0) ** 2).sum(), [x.q, x.k, x.v]) for y, x in
              ((found, o), (expected, clean))]  # fmt: skip
    for ours, theirs in zip(*slopes, strict=True):
        assert torch.equal(ours[:, others], theirs[:, others])


def test_more_room_changes_nothing():
    spec = LADDER["rung2"]
    o, bounds = operands(spec, batch=1, tokens=30), bounds_of([13, 17])
    few = in_one(spec, o, bounds)
    gates = {"momentum": o.options["momentum"]}
    more = Boundaries(torch.cat((bounds, bounds[-1:].expand(20))), 30)
    assert torch.equal(packed(spec, o.weights, o.q, o.k, o.v, more, lr=o.options["lr"], **gates), few)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=9).filter(any),
    chunk=st.sampled_from([64, 100, 300, 512]),
    programs=st.sampled_from([4, 64, 4096]),
)
def test_tables_hold_the_spans_that_the_host_would_make(lengths, chunk, programs):
    length = sum(lengths)
    made = packed_layout(Boundaries(with_room(bounds_of(lengths)), length).chunks(chunk), programs)
    host = chunked_layout(tuple(lengths), (0,) * len(lengths), tuple(lengths), chunk, False, True, 1 << 20, CPU)

    def full(table):
        return table[table[:, 1] > 0].tolist()

    assert full(made.reads) == host.reads.tolist()
    assert made.sequences[: len(lengths)].tolist() == host.sequences.tolist()
    assert not made.sequences[len(lengths) :, 1:3].any()
    assert made.reads[:, 1].max() <= made.longest_read
    assert made.writes[:, 1].max().item() <= made.longest_write if len(made.writes) else chunk > length
    idle = torch.zeros(length, dtype=torch.bool)
    idle[host.idle if host.idle is not None else []] = True
    assert torch.equal(made.idle, idle)
    for pieces, of, whole in (
        (made.read_pieces, made.row_pieces, host.reads),
        (made.writes, made.chunk_pieces, host.writes),
    ):
        joined = []
        for first, count in of.tolist():
            mine = pieces[first : first + count]
            mine = mine[mine[:, 1] > 0]
            if len(mine):
                assert (mine[1:, 0] == mine[:-1, 0] + mine[:-1, 1]).all()
                joined.append([int(mine[0, 0]), int(mine[:, 1].sum()), *mine[0, 2:].tolist()])
        assert joined == whole.tolist()
    assert made.rows == length // chunk + capacity_for(len(lengths))
    assert sum(made.query_runs[:, 1].tolist()) == length


def test_sizes_come_from_a_capacity_and_values_from_the_device():
    assert [capacity_for(n) for n in (1, 8, 9, 16, 17, 100)] == [LEAST_CAPACITY, 8, 16, 16, 32, 128]
    bounds = with_room(torch.tensor([0, 3, 3, 10], dtype=torch.int32))
    assert bounds.tolist() == [0, 3, 3, *[10] * 6]
    there = Boundaries(bounds, 10)
    assert there.document.tolist() == [0] * 3 + [2] * 7
    assert there.starts.tolist() == [0] * 3 + [3] * 7
    assert there.starts is there.starts
    chunks = there.chunks(3)
    assert chunks is there.chunks(3)
    assert (len(chunks), chunks.first.tolist(), chunks.opens.tolist()) == (3, [0, 3, 6], [True, True, False])
    x = torch.arange(10.0).reshape(1, 1, 10)
    assert torch.equal(chunks.put_back(chunks.take(x), chunks.take_rests(x)), x)
    assert chunks.means(x[0].T).flatten().tolist() == [1.0, 4.0, 7.0]


@pytest.mark.parametrize(
    ("spec", "length", "said"),
    [
        (InnerLoop(network=Linear(), visibility="token", chunk=1), 64, "visibility='token'"),
        (InnerLoop(network=Linear(), chunk=1), 64, "chunks of 1 tokens"),
        (InnerLoop(network=Linear(), chunk=8), 8 * MOST_CHUNKS + 8, "chunks of 8 tokens"),
        (InnerLoop(network=Linear(), chunk=8, retention=Retention(per="key")), 64, "retention"),
    ],
)
def test_what_is_not_covered_says_why(spec, length, said):
    assert said in uncovered(spec, length)
    o = operands(spec, batch=1, tokens=length)
    with pytest.raises(ValueError, match="boundaries that the device reads"):
        in_one(spec, o, bounds_of([length]))


def test_arguments_that_do_not_fit_are_refused():
    spec = LADDER["rung0"]
    o = operands(spec, batch=1, tokens=10)
    with pytest.raises(NoParallelFormError):
        in_one(spec, o, bounds_of([10]), form="parallel")
    with pytest.raises(ValueError, match=r"q must be \[1, T, H, Dk\] with the boundaries' T = 9"):
        packed(spec, o.weights, o.q, o.k, o.v, Boundaries(bounds_of([9]), 9))
    assert uncovered(spec, 10) is None
    assert uncovered(InnerLoop(network=GLU(), chunk=64), 1 << 20) is None
