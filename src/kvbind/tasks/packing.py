"""Packing: documents joined, cut to one length, shuffled, batched, and resumed at the exact sample.

Reading is by *windows*: `window` samples' worth of tokens is read from the documents, cut, and permuted; then the next. A
position therefore needs no tokens: it says where in the documents a window starts and how many batches of it are spent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kvbind.tasks.documents import Documents, Position
from kvbind.tasks.tokenizers import Tokenizer

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


class PackedBatches(IterableDataset[tuple[Batch, Position]]):
    """Endless batches of packed documents, each with the position behind it.

    Args:
        documents: where text comes from.
        tokenizer: what makes ids of it.
        length: tokens in a sample.
        batch: samples in a batch.
        window: samples that are shuffled together, rounded up to whole batches.
        seed: of every order.
        separate: whether documents stay apart (`cu_seqlens`), or run on into each other as one text.
        positions: by reader, what the last batch of each came with; None for the beginning.
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
        separate: bool = False,
        positions: list[Position | None] | None = None,
        first: int = 0,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.length, self.batch, self.separate, self.seed = length, batch, separate, seed
        self.batches_per_window = -(-window // batch)
        self.positions, self.first = positions, first

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        worker = get_worker_info()
        readers = worker.num_workers if worker else 1
        # torch asks its workers in turn from the first on, whoever's turn it was when the run stopped
        reader = (self.first + (worker.id if worker else 0)) % readers
        position = self.positions[reader] if self.positions else None
        for batch, behind in self.read(position, (reader, readers)):
            yield batch, {"reader": reader, "position": behind}

    def read(self, position: Position | None, shard: tuple[int, int]) -> Iterator[tuple[Batch, Position]]:
        """One reader's batches, each with that reader's position behind it."""
        here: Position = position or {"documents": None, "offset": 0, "window": 0, "spent": 0}
        while True:
            samples, following = self.fill(here, shard)
            order = np.random.default_rng((self.seed, shard[0], here["window"])).permutation(len(samples))
            for n in range(here["spent"], self.batches_per_window):
                rows = order[n * self.batch : (n + 1) * self.batch]
                here = here | {"spent": n + 1}
                yield collate([samples[i] for i in rows], self.separate), here
            here = following

    def fill(self, here: Position, shard: tuple[int, int]) -> tuple[list[Sample], Position]:
        """The samples of the window that starts at `here`, and where the next window starts."""
        wanted = self.batches_per_window * self.batch * self.length
        pieces: list[tuple[NDArray[np.int64], bool]] = []
        before, offset = here["documents"], here["offset"]
        for text, behind in self.documents.forever(self.seed, before, shard):
            ids = np.append(self.tokenizer.encode(text), self.tokenizer.end)[offset:]
            pieces.append((ids[:wanted], offset == 0))
            if len(ids) > wanted:
                offset += wanted
                break
            wanted -= len(ids)
            before, offset = behind, 0
            if not wanted:
                break
        return cut(pieces, self.length), {"documents": before, "offset": offset, "window": here["window"] + 1, "spent": 0}


def load_batches(batches: PackedBatches, workers: int, position: Position | None) -> Iterator[tuple[Batch, Position]]:
    """Batches, read in this process (`workers=0`) or in others, from `position` on.

    The order depends on the number of workers, and on nothing else; each batch comes with the position behind it.

    Raises:
        ValueError: a position that was taken with another number of workers.
    """
    readers = max(workers, 1)
    positions: list[Position | None] = list(position["readers"]) if position else [None] * readers
    if len(positions) != readers:
        raise ValueError(f"data.workers must stay as it was when the run was interrupted, {len(positions)}; got {workers}")
    batches.positions = list(positions)
    batches.first = position["next"] if position else 0
    # its own generator: the loader draws a seed for its workers, which must not come out of the model's randomness
    loader: Any = DataLoader(
        batches, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available(), generator=torch.Generator()
    )
    for batch, stamp in loader:
        positions[stamp["reader"]] = stamp["position"]
        yield batch, {"readers": list(positions), "next": (stamp["reader"] + 1) % readers}


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
        separate: as `PackedBatches` takes it.

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
        raise ValueError(f"data.length must be at most the held-out text, {tokens} tokens; got {length}")
    chosen = [cuts[i] for i in np.unique(np.linspace(0, len(cuts) - 1, min(samples, len(cuts))).round().astype(int))]
    return [collate(chosen[i : i + batch], separate) for i in range(0, len(chosen), batch)], size / tokens
