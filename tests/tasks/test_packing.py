import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbind.tasks.documents import Texts
from kvbind.tasks.packing import IGNORED, Packed, WindowStart, WindowStream, collate, cut, evaluation_batches, load_batches
from kvbind.tasks.sources import TextSource
from kvbind.tasks.tokenizers import Bytes
from kvbind.train.ranks import WHOLE, Share, united

TEXTS = [chr(97 + i % 26) * (3 + 7 * i % 41) for i in range(60)]


def packed(texts=TEXTS, **options):
    options = {"length": 8, "batch": 3, "window": 7, "seed": 0} | options
    return Packed(Texts(texts), Bytes(), **options)


def take(count, workers=0, separate=False, **options):
    return list(itertools.islice(load_batches(packed(**options), separate, workers), count))


def ids(batches):
    return [batch["input_ids"].tolist() for batch, _ in batches]


def test_a_window_holds_consecutive_text_and_the_next_goes_on_where_it_stopped():
    stream = WindowStream(packed(window=9), 0, WindowStart())
    here, texts = WindowStart(), []
    for _ in range(5):
        samples, here = stream.fill(here)
        assert len(samples) == 9
        texts += [sample.ids for sample in samples]
    whole = [np.append(Bytes().encode(text), 0) for text, _ in itertools.islice(Texts(TEXTS).forever(0), 200)]
    joined = np.concatenate(whole)[: 5 * 9 * 8]
    assert np.array_equal(np.concatenate(texts), joined)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    length=st.integers(2, 16),
    fresh=st.booleans(),
)
def test_starts_are_exactly_where_documents_start(lengths, length, fresh):
    pieces = [(np.full(n, i), fresh or i > 0) for i, n in enumerate(lengths)]
    samples = cut(pieces, length)
    assert len(samples) == sum(lengths) // length
    bounds = np.cumsum([0, *lengths])[0 if fresh else 1 :]
    for i, sample in enumerate(samples):
        inside = [b - i * length for b in bounds if i * length < b < (i + 1) * length]
        assert sample.starts.tolist() == inside


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_reading_resumes_at_the_exact_sample(streams, separate):
    whole = take(16, separate=separate, streams=streams)
    for stop in (1, 2, 3, 5, 10):
        position = json.loads(json.dumps(whole[stop - 1][1]))
        assert len(json.dumps(position)) < 300
        rest = take(16 - stop, separate=separate, streams=streams, position=position)
        assert ids(rest) == ids(whole[stop:])
        assert [p for _, p in rest] == [p for _, p in whole[stop:]]


def test_workers_change_nothing():
    whole = take(12, streams=3)
    helped = take(5, workers=2, streams=3)
    rest = take(7, workers=4, streams=3, position=helped[-1][1])
    assert ids(helped + rest) == ids(whole)
    assert [p for _, p in helped + rest] == [p for _, p in whole]


def samples(batches):
    return sorted(tuple(row) for batch in ids(batches) for row in batch)


@given(
    streams=st.integers(1, 5),
    batch=st.sampled_from([1, 2, 4, 6]),
    count=st.sampled_from([1, 2, 3, 4, 6]),
    others=st.sampled_from([1, 2, 4]),
)
def test_ranks_read_together_what_one_reads_and_others_go_on_from_there(streams, batch, count, others):
    options = {"streams": streams, "batch": batch, "window": 8}
    accumulate = 12  # a step's batches, whatever number of ranks divides them
    step = take(2 * accumulate, **options)

    def together(ranks, position):
        shares = [Share.of(i, ranks, batch, accumulate) for i in range(ranks)]
        parts = [take(accumulate // shares[0].turns, position=position, share=share, **options) for share in shares]
        return [x for part in parts for x in part], united([part[-1][1] for part in parts])

    first, position = together(count, None)
    assert samples(first) == samples(step[:accumulate])
    second, position = together(others, json.loads(json.dumps(position)))
    assert samples(second) == samples(step[accumulate:])
    assert ids(take(3, position=position, **options)) == ids(take(2 * accumulate + 3, **options)[2 * accumulate :])


def test_ranks_with_a_stream_each_read_no_document_twice():
    read = []

    class Watched(Texts):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    for share in (Share.of(i, 4, batch=2, accumulate=2) for i in range(4)):
        reader = Packed(Watched(TEXTS), Bytes(), length=8, batch=2, window=4, seed=0, streams=4, share=share)
        assert len(reader.own) == 1
        next(load_batches(reader, False, 0))
    assert len(read) == len(set(read)) >= 4


def test_the_order_goes_by_the_seed():
    assert ids(take(6)) == ids(take(6))
    assert ids(take(6)) != ids(take(6, seed=1))


def test_reading_leaves_torchs_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    take(2)
    assert torch.equal(torch.rand(2), expected)


def test_resuming_with_other_streams_is_refused():
    position = take(1)[0][1]
    with pytest.raises(ValueError, match=r"data\.streams must stay as it was .*, 1; got 2"):
        take(1, streams=2, position=position)


def test_documents_kept_apart_have_boundaries_and_no_first_labels():
    (batch, _), *_ = take(1, separate=True)
    row, bounds, labels = batch["input_ids"][0], batch["cu_seqlens"], batch["labels"][0]
    assert row.shape == labels.shape == (24,)
    assert bounds.dtype == torch.int32
    assert (int(bounds[0]), int(bounds[-1])) == (0, 24)
    assert {0, 8, 16} <= set(bounds.tolist())  # rows of the batch are apart too
    after_ends = {i + 1 for i in range(24) if row[i] == 0 and (i + 1) % 8}
    assert set(bounds.tolist()) == {0, 8, 16, 24} | after_ends
    starts = bounds[:-1].long()
    assert (labels[starts] == IGNORED).all()
    inside = torch.ones(24, dtype=torch.bool)
    inside[starts] = False
    assert torch.equal(labels[inside], row[inside])


def test_joined_documents_are_plain_rows():
    (batch, _), *_ = take(1)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 8)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_a_document_longer_than_a_window_is_read_to_its_end():
    long = "".join(chr(97 + i % 26) for i in range(1000))
    stream = WindowStream(packed([long], window=3), 0, WindowStart())
    here, seen = WindowStart(), ""
    for _ in range(13):
        samples, here = stream.fill(here)
        seen += "".join(Bytes().decode(sample.ids.tolist()) for sample in samples)
    assert seen == long[: 13 * 24]


def test_evaluation_samples_are_spread_over_the_text_and_always_the_same():
    batches, bytes_per_token = evaluation_batches(Texts(TEXTS), Bytes(), length=16, batch=4, samples=10)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]
    assert bytes_per_token == 1.0
    joined = np.concatenate([np.append(Bytes().encode(text), 0) for text in TEXTS])
    rows = torch.cat([b["input_ids"] for b in batches]).numpy()
    places = [next(i for i in range(0, len(joined) - 15, 16) if np.array_equal(joined[i : i + 16], row)) for row in rows]
    assert places[0] == 0
    assert places[-1] == (len(joined) // 16 - 1) * 16
    again, _ = evaluation_batches(Texts(TEXTS), Bytes(), length=16, batch=4, samples=10)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_too_little_held_out_text_is_refused():
    with pytest.raises(ValueError, match=r"data\.length must be at most the held-out text, 4 tokens; got 16"):
        evaluation_batches(Texts(["abc"]), Bytes(), length=16, batch=4, samples=10)


def test_collated_samples_keep_their_order():
    samples = cut([(np.arange(24), True)], 8)
    assert collate(samples, separate=False)["input_ids"].flatten().tolist() == list(range(24))


LENGTHS = (20, 1, 7, 13, 4)
"""Rows of each file of a streamed table."""


@pytest.fixture(params=["jsonl", "parquet"])
def streamed(request, tmp_path, monkeypatch):
    """Batches of a streamed table of files of different lengths, by streams, workers and position."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, rows in enumerate(LENGTHS):
        texts = [f"<{number}.{row}>" + "x" * (3 + (7 * row + number) % 30) for row in range(rows)]
        path = tmp_path / f"{number}.{request.param}"
        if request.param == "jsonl":
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    documents = TextSource(str(tmp_path), held_out=1e-9, stream=True).open("train")

    def batches(count, streams, workers=0, position=None, share=WHOLE):
        reading = Packed(
            documents, Bytes(), length=16, batch=4, window=8, seed=0, streams=streams, position=position, share=share
        )
        return list(itertools.islice(load_batches(reading, False, workers), count))

    return batches


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_workers_leave_no_file_of_a_stream_out_and_change_nothing(streamed, streams):
    whole = streamed(30, streams)
    text = bytes(torch.cat([batch["input_ids"].flatten() for batch, _ in whole]).tolist()).decode()
    assert {int(number) for number in re.findall(r"<(\d)\.", text)} == set(range(len(LENGTHS)))
    for workers in (2, 4) if streams == 4 else (streams,):
        shared = streamed(30, streams, workers)
        assert ids(shared) == ids(whole)
        assert [p for _, p in shared] == [p for _, p in whole]


def test_a_stream_goes_on_with_another_number_of_workers_and_processes(streamed):
    whole = streamed(20, 4)
    for stop, workers in ((3, 2), (11, 3)):
        position = json.loads(json.dumps(streamed(stop, 4, workers)[-1][1]))
        assert ids(streamed(4, 4, 0, position)) == ids(whole[stop : stop + 4])
        assert ids(streamed(4, 4, 4, position)) == ids(whole[stop : stop + 4])
    parts = [streamed(6, 4, 2, share=Share.of(i, 2, 4, 1)) for i in range(2)]
    assert samples([x for part in parts for x in part]) == samples(whole[:6])


@pytest.mark.parametrize("streamed", ["jsonl"], indirect=True)
def test_an_error_of_a_worker_is_the_line_that_it_is_without_workers(streamed):
    said = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match=r"^data\.streams must be at most the 5 files of \S+; got 6$") as caught:
            streamed(1, 6, workers)
        said.append(str(caught.value))
    assert said[0] == said[1]
