import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbind.tasks.documents import Texts
from kvbind.tasks.packing import IGNORED, PackedBatches, collate, cut, evaluation_batches, load_batches
from kvbind.tasks.tokenizers import Bytes

TEXTS = [chr(97 + i % 26) * (3 + 7 * i % 41) for i in range(60)]


def packed(texts=TEXTS, **options):
    options = {"length": 8, "batch": 3, "window": 7, "seed": 0} | options
    return PackedBatches(Texts(texts), Bytes(), **options)


def take(batches, count, workers=0, position=None):
    return list(itertools.islice(load_batches(batches, workers, position), count))


def ids(batches):
    return [batch["input_ids"].tolist() for batch, _ in batches]


def test_a_window_holds_consecutive_text_and_the_next_goes_on_where_it_stopped():
    reader = packed()
    here, texts = {"documents": None, "offset": 0, "window": 0, "spent": 0}, []
    for _ in range(5):
        samples, here = reader.fill(here, (0, 1))
        assert len(samples) == 9  # 7 rounded up to whole batches of 3
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
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_resumes_at_the_exact_sample(workers, separate):
    whole = take(packed(separate=separate), 16, workers)
    for stop in (1, 2, 3, 5, 10) if workers == 0 else (3, 4):
        position = json.loads(json.dumps(whole[stop - 1][1]))
        assert len(json.dumps(position)) < 500
        rest = take(packed(separate=separate), 16 - stop, workers, position)
        assert ids(rest) == ids(whole[stop:])
        assert [p for _, p in rest] == [p for _, p in whole[stop:]]


def test_the_order_goes_by_the_seed():
    assert ids(take(packed(), 6)) == ids(take(packed(), 6))
    assert ids(take(packed(), 6)) != ids(take(packed(seed=1), 6))


def test_reading_leaves_torchs_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    take(packed(), 2)
    assert torch.equal(torch.rand(2), expected)


def test_resuming_with_other_workers_is_refused():
    position = take(packed(), 1)[0][1]
    with pytest.raises(ValueError, match=r"data\.workers must stay as it was .*, 1; got 2"):
        take(packed(), 1, 2, position)


def test_documents_kept_apart_have_boundaries_and_no_first_labels():
    (batch, _), *_ = take(packed(separate=True), 1)
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
    (batch, _), *_ = take(packed(), 1)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 8)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_a_document_longer_than_a_window_is_read_to_its_end():
    long = "".join(chr(97 + i % 26) for i in range(1000))
    reader = packed([long], window=3)
    here, seen = {"documents": None, "offset": 0, "window": 0, "spent": 0}, ""
    for _ in range(13):
        samples, here = reader.fill(here, (0, 1))
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
