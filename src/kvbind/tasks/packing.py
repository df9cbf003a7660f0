"""Packing: documents joined, cut to one length, shuffled, batched, and resumed at the exact sample.

Reading is by *windows*: so many samples' worth of tokens is read from the documents, cut, and permuted; then the next. A
position therefore needs no tokens: it says where in the documents windows start and how many samples of the run are spent.
Text may be read in several *streams* that take turns, sample by sample. Processes that share a batch, and workers of each,
read the streams that their samples come from; more streams let more of them read without reading the same text twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from kvbind.tasks.documents import Documents, Position
from kvbind.tasks.reading import read_with
from kvbind.tasks.tokenizers import Tokenizer
from kvbind.train.ranks import WHOLE, Share

Batch = dict[str, Tensor]
IGNORED = -100
"""The label of tokens that count nowhere, as torch's cross-entropy and transformers have it."""


@dataclass(frozen=True)
class Sample:
    """Consecutive tokens of joined documents.

    Attributes:
        ids: `[T]`, int64.
        starts: where in `ids` a document starts, a continued one at 0 not among them.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]


def cut(pieces: list[tuple[NDArray[np.int64], bool]], length: int) -> list[Sample]:
    """Join pieces of documents and cut them to samples of `length` tokens; what is left over at the end is dropped.

    Args:
        pieces: token ids, and whether they are from the document's beginning.
        length: tokens in a sample.
    """
    ids = np.concatenate([piece for piece, _ in pieces])
    ends = np.cumsum([len(piece) for piece, _ in pieces])
    starts = np.array([end - len(piece) for end, (piece, fresh) in zip(ends, pieces, strict=True) if fresh], dtype=np.int64)
    samples = []
    for begin in range(0, len(ids) - length + 1, length):
        inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + length)] - begin
        samples.append(Sample(ids[begin : begin + length], inside[inside > 0]))
    return samples


def collate(samples: list[Sample], separate: bool) -> Batch:
    """A batch as the language model takes it.

    Joined, a row per sample: `input_ids` and `labels` `[B, T]`, int64. Separate, one row of sequences between which nothing
    passes: `input_ids` and `labels` `[1, B * T]`, and `cu_seqlens` `[n + 1]`, int32; no sequence's first token is a label.
    """
    ids = torch.from_numpy(np.stack([sample.ids for sample in samples]))
    if not separate:
        return {"input_ids": ids, "labels": ids}
    length = ids.shape[1]
    starts = np.concatenate([np.append(0, sample.starts) + i * length for i, sample in enumerate(samples)])
    labels = ids.flatten().clone()
    labels[torch.from_numpy(starts)] = IGNORED
    bounds = torch.from_numpy(np.append(starts, len(samples) * length).astype(np.int32))
    return {"input_ids": ids.reshape(1, -1), "labels": labels[None], "cu_seqlens": bounds}


@dataclass(frozen=True)
class WindowStart:
    """Where a stream is read: the documents behind which a window of samples starts.

    Attributes:
        window: its number.
        documents: position behind the last document that was read to its end before the window.
        offset: tokens of the following document that belong to earlier windows.
    """

    window: int = 0
    documents: Position | None = None
    offset: int = 0


class Packed(IterableDataset[tuple[list[tuple[int, Sample]], dict[str, Any]]]):
    """Endless batches of packed documents, each with the position behind it.

    Samples are numbered; sample q comes from stream q mod `streams`, each of which reads every `streams`-th document. What a
    sample is therefore depends on the seed and the number of streams alone: not on batches, nor on who reads.

    Args:
        documents: where text comes from.
        tokenizer: what makes ids of it.
        length: tokens in a sample.
        batch: samples in a batch.
        window: samples that are shuffled together, in all streams.
        seed: of every order.
        streams: how many.
        position: what the last batch came with; None for the beginning.
        share: which samples to read: every `parts`-th of a batch, in every `turns`-th batch.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        length: int,
        batch: int,
        window: int,
        seed: int,
        streams: int = 1,
        position: Position | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.length, self.batch, self.seed, self.streams, self.share = length, batch, seed, streams, share
        self.window = -(-window // streams)
        if position and position["streams"] != streams:
            raise ValueError(
                f"data.streams must stay as it was when the run was interrupted, {position['streams']}; got {streams}"
            )
        self.first = position["samples"] if position else 0
        self.places = {int(s): WindowStart(*place) for s, place in position["places"].items()} if position else {}

    @property
    def own(self) -> list[int]:
        """The streams that this share reads."""
        each = self.batch * self.share.turns
        rounds = itertools.islice(self.numbers(), math.lcm(self.streams, each) // each)
        return sorted({q % self.streams for numbers in rounds for q in numbers})

    def numbers(self) -> Iterator[range]:
        """The numbers of the samples of each of this share's batches, endlessly."""
        share = self.share
        for begin in itertools.count(self.first + share.turn * self.batch, share.turns * self.batch):
            yield range(begin + share.part, begin + self.batch, share.parts)

    def __iter__(self) -> Iterator[tuple[list[tuple[int, Sample]], dict[str, Any]]]:
        """For each batch, those of its samples that this worker reads, by number, and where its streams are."""
        worker = get_worker_info()
        mine = self.own[worker.id :: worker.num_workers] if worker else self.own
        streams = {s: WindowStream(self, s, self.places.get(s, WindowStart())) for s in mine}
        for numbers in self.numbers():
            read = [(q, streams[q % self.streams].sample(q // self.streams)) for q in numbers if q % self.streams in streams]
            yield read, {str(s): list(astuple(stream.place)) for s, stream in streams.items()}


class WindowStream:
    """One reading of the text, window by window.

    Args:
        packed: what is read, and how.
        number: of the stream.
        place: where a window starts.
    """

    def __init__(self, packed: Packed, number: int, place: WindowStart) -> None:
        self.packed, self.number, self.place = packed, number, place
        self.samples: list[Sample] = []
        self.following = place

    def sample(self, index: int) -> Sample:
        """The stream's sample of that number, which is in this window or in one behind."""
        size = self.packed.window
        while not self.samples or index >= (self.place.window + 1) * size:
            self.place = self.following
            self.samples, self.following = self.fill(self.place)
            order = np.random.default_rng((self.packed.seed, self.number, self.place.window)).permutation(size)
            self.samples = [self.samples[i] for i in order]
        return self.samples[index - self.place.window * size]

    def fill(self, here: WindowStart) -> tuple[list[Sample], WindowStart]:
        """The samples of the window at `here`, in the text's order, and where the next window starts."""
        packed = self.packed
        wanted = packed.window * packed.length
        pieces: list[tuple[NDArray[np.int64], bool]] = []
        before, offset = here.documents, here.offset
        for text, behind in packed.documents.forever(packed.seed, before, (self.number, packed.streams)):
            ids = np.append(packed.tokenizer.encode(text), packed.tokenizer.end)[offset:]
            pieces.append((ids[:wanted], offset == 0))
            if len(ids) > wanted:
                offset += wanted
                break
            wanted -= len(ids)
            before, offset = behind, 0
            if not wanted:
                break
        return cut(pieces, packed.length), WindowStart(here.window + 1, before, offset)


def load_batches(packed: Packed, separate: bool, workers: int) -> Iterator[tuple[Batch, Position]]:
    """Batches, read in this process (`workers=0`) or in others; the same whatever their number.

    Args:
        packed: the text, in samples.
        separate: whether documents stay apart (`cu_seqlens`), or run on into each other as one text.
        workers: how many read at most: each has streams of its own.

    Yields:
        A batch, and the position behind it, and behind those of the other ranks' shares that belong to the same turn.
    """
    workers = min(workers, len(packed.own))
    read = read_with(workers, packed, batch_size=None, collate_fn=_as_read)
    places: dict[str, Any] = {}
    for turn in itertools.count(1):
        parts = [next(read) for _ in range(max(workers, 1))]  # torch asks its workers in turn
        samples = sorted((numbered for part, _ in parts for numbered in part), key=lambda numbered: numbered[0])
        for _, behind in parts:
            places |= behind
        behind = packed.first + turn * packed.share.turns * packed.batch
        yield (
            collate([sample for _, sample in samples], separate),
            {"streams": packed.streams, "samples": behind, "places": dict(places)},
        )


def _as_read(item: Any) -> Any:
    return item


def evaluation_batches(
    documents: Documents, tokenizer: Tokenizer, *, length: int, batch: int, samples: int, separate: bool = False
) -> tuple[list[Batch], float]:
    """The same few samples every time: spread evenly over the documents, in their own order.

    Args:
        documents: held-out text.
        tokenizer: what makes ids of it.
        length: tokens in a sample.
        batch: samples in a batch.
        samples: at most how many.
        separate: as `load_batches` takes it.

    Returns:
        The batches, and how many bytes of UTF-8 a token stands for, on the average over the text that was read.

    Raises:
        ValueError: less than one sample of text.
    """
    pieces, tokens, size = [], 0, 0
    # a source without end is read only as far as four times what is needed
    for text in documents.once():
        ids = np.append(tokenizer.encode(text), tokenizer.end)
        pieces.append((ids, True))
        tokens, size = tokens + len(ids), size + len(text.encode("utf-8", errors="replace")) + 1
        if tokens >= 4 * samples * length and not hasattr(documents, "__len__"):
            break
    cuts = cut(pieces, length) if pieces else []
    if not cuts:
        raise ValueError(
            f"data.length must be at most the held-out text, {tokens} tokens; got {length} (data.held_out holds out more, "
            "data.held_out_source names other text)"
        )
    chosen = [cuts[i] for i in np.unique(np.linspace(0, len(cuts) - 1, min(samples, len(cuts))).round().astype(int))]
    return [collate(chosen[i : i + batch], separate) for i in range(0, len(chosen), batch)], size / tokens
