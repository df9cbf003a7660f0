"""How a row is cut over ranks, and what of a batch each rank is given."""

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import kvbind
from kvbind import NoParallelFormError, SequenceShard, explain, sequence_parallel, shard_batch, ttt
from kvbind.forms.explained.analysis import sequence_schedule
from kvbind.models.lact.loss import IGNORE
from kvbind.sequence import current_shard
from kvbind.sequence.exchanges import HaloPlan


class Group:
    """What stands for a process group where nothing is sent."""

    def __init__(self, size, rank=0):
        self.size, self.rank = size, rank
        self.group_name = "none"


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: group.size)
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)


@st.composite
def cuts(draw):
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum))
    total = sum(lengths)
    inside = draw(st.lists(st.integers(0, total), max_size=5))
    return lengths, [0, *sorted(inside), total]


@given(cuts())
def test_slices_say_where_documents_begin_and_end(cut):
    lengths, bounds = cut
    owner = [rank for rank, n in enumerate(lengths) for _ in range(n)]
    document = [i for i, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(b - a)]
    for rank, place in enumerate(SequenceShard(Group(len(lengths)), lengths, bounds).slices):
        start, stop = place.start, place.start + place.length
        assert (place.length, owner[start:stop]) == (lengths[rank], [rank] * lengths[rank])
        if not place.length:
            assert place.bounds == (0, 0)
            continue
        assert [b - a for a, b in itertools.pairwise(place.bounds)] == [
            len(list(same)) for _, same in itertools.groupby(document[start:stop])
        ]
        first, last = ([r for d, r in zip(document, owner, strict=True) if d == document[at]] for at in (start, stop - 1))
        assert place.before == sum(r < rank for r in first)
        assert (place.first, place.last) == (first[0], last[-1])


@given(cuts(), st.data())
def test_every_rank_gets_the_tokens_before_its_own_that_it_wants(cut, data):
    lengths, bounds = cut
    size, total = len(lengths), sum(lengths)
    shard = SequenceShard(Group(size), lengths, bounds)
    wanted = shard.reaching(data.draw(st.integers(0, 9)))
    plans = [HaloPlan(SequenceShard(Group(size, rank), lengths, bounds), wanted) for rank in range(size)]
    row = torch.arange(total)
    for target, place in enumerate(shard.slices):
        parts = []
        for source, plan in enumerate(plans):
            own = row[shard.slices[source].start :][: lengths[source]]
            low, high = plan.sending[target]
            part = own[lengths[source] - plan.tail :][low:high]
            assert len(part) == plans[target].receiving[source]
            parts.append(part)
        assert torch.equal(torch.cat(parts), row[place.start - wanted[target] : place.start])


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 9))
def test_even_slices_start_at_multiples_and_differ_by_one_of_them(tokens, size, multiple):
    shard = SequenceShard.even(tokens, Group(size), multiple=multiple)
    assert sum(shard.lengths) == tokens
    assert all(place.start % multiple == 0 or place.start == tokens for place in shard.slices)
    units = [-(-n // multiple) for n in shard.lengths]
    assert max(units) - min(units) <= 1


@given(cuts(), st.integers(1, 2))
def test_shifted_labels_of_all_slices_are_those_of_the_row(cut, rows):
    lengths, bounds = cut
    if rows > 1:
        bounds = None
    ids = torch.arange(rows * sum(lengths)).reshape(rows, -1)
    parts = [
        shard_batch({"input_ids": ids, "labels": ids}, SequenceShard(Group(len(lengths), rank), lengths, bounds))
        for rank in range(len(lengths))
    ]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), ids)
    targets = torch.cat([part["shift_labels"] for part in parts], 1)
    ends = set(bounds or [0, ids.shape[1]])
    for t in range(ids.shape[1]):
        wanted = torch.full((rows,), IGNORE) if t + 1 in ends else ids[:, t + 1 if t + 1 < ids.shape[1] else t]
        assert torch.equal(targets[:, t], wanted)
    assert {int(part["num_items_in_batch"]) for part in parts} == {max(int((targets != IGNORE).sum()), 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [1, 2, 3]}, "lengths must have one entry for each of 2 ranks; got 3"),
        ({"lengths": [4, -1]}, "lengths must not be negative"),
        ({"lengths": [4, 4], "cu_seqlens": [0, 7]}, "cu_seqlens must go from 0 to the row's 8 tokens"),
        ({"lengths": [4, 4], "cu_seqlens": [0, 5, 3, 8]}, "cu_seqlens must never fall"),
        ({"lengths": [4, 4], "schedule": "tree"}, "schedule"),
    ],
)
def test_cuts_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SequenceShard(Group(2), **arguments)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"input_ids": torch.zeros(1, 7)}, ValueError, "x must have the row's 8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 3, 8])}, ValueError, "cu_seqlens must be the shard's"),
        ({"attention_mask": torch.tensor([[1, 0]])}, ValueError, "attention_mask must have no padding"),
        ({"position_ids": torch.zeros(1, 8)}, TypeError, "knows no entry 'position_ids'"),
    ],
)
def test_batches_that_do_not_fit_are_refused(entries, error, message):
    with pytest.raises(error, match=message):
        shard_batch(entries, SequenceShard(Group(2), [4, 4]))


LACT = kvbind.systems.lact_llm(chunk=4)
RUNG2 = LACT.replace(update="last", normalize=False)


def test_explain_and_the_schedule_agree():
    assert explain(RUNG2).sequence_schedule == sequence_schedule(RUNG2) == "scan"
    assert explain(LACT).sequence_schedule == sequence_schedule(LACT) == "ring"
    assert sequence_schedule(RUNG2, "ring") == sequence_schedule(RUNG2, form="recurrent") == "ring"
    assert "over ranks: all at once" in str(explain(RUNG2))
    assert "over ranks: one after another" in str(explain(LACT))
    everything = RUNG2.replace(visibility="full", chunk=None)
    assert explain(everything).sequence_schedule is None
    assert "over ranks: no" in str(explain(everything))


def test_a_scan_that_is_not_there_is_refused_with_the_analysis():
    with pytest.raises(NoParallelFormError, match=r"schedule='scan' needs .* parallel form") as caught:
        sequence_schedule(LACT, "scan")
    assert caught.value.explanation.obstacles
    with pytest.raises(ValueError, match="form='recurrent'"):
        sequence_schedule(RUNG2, "scan", "recurrent")
    with pytest.raises(ValueError, match="causal"):
        sequence_schedule(RUNG2.replace(visibility="full", chunk=None))


def test_calls_that_do_not_fit_a_slice_are_refused():
    shard = SequenceShard(Group(2), [5, 3])
    x = torch.randn(1, 5, 1, 4)
    weights = RUNG2.network.initial(1, 4, 4, 4)
    gates = {"momentum": torch.rand(1, 5, 1)}
    for changed, error, message in (
        ({"sequence": 3}, TypeError, "sequence must be a kvbind.SequenceShard"),
        ({"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens must be None beside sequence"),
        ({"sequence": SequenceShard(Group(2), [4, 4])}, ValueError, "must have the 4 tokens of rank 0's slice; got 5"),
    ):
        with pytest.raises(error, match=message):
            ttt(RUNG2, weights, x, x, x, **gates, **({"sequence": shard} | changed))
    with pytest.raises(ValueError, match="slices must end between chunks"):
        ttt(RUNG2.replace(visibility="chunk"), weights, x, x, x, **gates, sequence=shard)


def test_the_context_nests_and_none_changes_nothing():
    outer, inner = (SequenceShard(Group(1), [n]) for n in (3, 4))
    with sequence_parallel(outer):
        with sequence_parallel(inner):
            assert current_shard() is inner
        with sequence_parallel(None):
            assert current_shard() is outer
    assert current_shard() is None
