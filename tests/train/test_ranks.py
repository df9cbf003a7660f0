import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kvbind.train import ranks
from kvbind.train.config import ParallelConfig
from kvbind.train.parallel import MeshLayout
from kvbind.train.ranks import Share, agreed_word, united


def words(store, count):
    """What each of `count` processes takes for the word of an attempt."""
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: agreed_word(store, i, count)}), daemon=True)
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(count)]


def test_every_attempt_has_a_word_of_its_own_whatever_earlier_ones_left_in_the_store():
    store = dist.HashStore()
    attempts = [words(store, 3) for _ in range(4)]
    assert all(len(set(attempt)) == 1 for attempt in attempts)
    assert len({attempt[0] for attempt in attempts}) == 4


def test_a_process_that_never_starts_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 0.05)
    with pytest.raises(TimeoutError, match=r"processes \[1, 2\] of 3 did not start"):
        agreed_word(dist.HashStore(), 0, 3)


@given(count=st.integers(1, 24), batch=st.integers(1, 12), accumulate=st.integers(1, 12))
def test_shares_divide_the_rows_of_a_step_evenly_and_leave_none_out(count, batch, accumulate):
    if batch * accumulate % count:
        with pytest.raises(ValueError, match=r"train\.accumulate must be a multiple of"):
            Share.of(0, count, batch, accumulate)
        return
    shares = [Share.of(i, count, batch, accumulate) for i in range(count)]
    assert [(share.index, share.count) for share in shares] == [(i, count) for i in range(count)]
    rows = [[(k, row) for k in range(share.turn, accumulate, share.turns) for row in share.rows(batch)] for share in shares]
    assert {len(own) for own in rows} == {batch * accumulate // count}
    assert sorted(x for own in rows for x in own) == [(k, row) for k in range(accumulate) for row in range(batch)]


@given(items=st.lists(st.integers(), min_size=1, max_size=20), count=st.integers(1, 8))
def test_ranks_go_through_items_equally_often_and_count_each_once(items, count):
    found = [list(Share(turn=i, turns=count).of_items(items)) for i in range(count)]
    assert len({len(own) for own in found}) == 1
    assert sorted(x for own in found for x, counts in own if counts) == sorted(items)


def test_plain_data_of_several_processes_are_united_key_by_key():
    parts = [{"streams": {"0": [1, None]}, "samples": 8}, {"streams": {"1": [2, {"a": 1}]}, "samples": 8}]
    assert united(parts) == {"streams": {"0": [1, None], "1": [2, {"a": 1}]}, "samples": 8}
    assert united([3, 4]) == 3
    assert united([{"a": None}, {"a": {"b": 1}}]) == {"a": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence": 3}, r"train\.parallel\.sequence must divide the number of processes, 8; got 3"),
        ({"shard": 3}, r"train\.parallel\.shard must divide the number of data ranks, 8; got 3"),
        ({"sequence": 4, "shard": 4}, r"train\.parallel\.shard must divide the number of data ranks, 2; got 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(fields, message, monkeypatch):
    monkeypatch.setattr("kvbind.train.parallel.ranks", lambda: 8)
    with pytest.raises(ValueError, match=message):
        MeshLayout.of(ParallelConfig(**fields), torch.device("cpu"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "fdsp"}, r"train\.parallel\.strategy must be one of .*did you mean 'fsdp'"),
        ({"shard": -1}, r"train\.parallel\.shard must be at least 0; got -1"),
        ({"sequence": 0}, r"train\.parallel\.sequence must be at least 1; got 0"),
    ],
)
def test_a_wrong_configuration_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)
