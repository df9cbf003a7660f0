"""Where the chunks of some sequences lie: the tables that kernels go by, made once for each set of lengths."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvbind.sequence.boundaries import Chunks, owners

ENOUGH_PROGRAMS = 264
"""Twice the multiprocessors of an H100: work that has fewer pieces than this is split over tokens."""

SHORTEST_PIECE = 256
"""Tokens below which a sum over tokens is not split further."""

TILE = 128

RUNS = 8
"""Into how many parts the sum of a shared matrix's gradient over all tokens is cut."""


@dataclass(frozen=True)
class SpanTables:
    """Tables for queries and writers of some sequences, int32 on one device.

    Attributes:
        reads: spans of query rows, `[reads, 4]`: first row, rows, the state row that is read, the row of theta.
        read_pieces: the same spans cut further, for sums over tokens.
        row_pieces: of each state row, the first of its read pieces and their number, `[rows, 2]`.
        writes: spans of writing rows, `[pieces, 4]`: first row, rows, chunk, the row of theta.
        chunk_pieces: of each chunk, the first of its writes and their number, `[chunks, 2]`.
        whole_chunks: the same table of sums that are no longer in pieces.
        sequences: `[S, 4]`, as `kvbind.kernels.chunked.prefix_sums` takes it.
        query_runs: all query rows, in equally many spans for each row of theta.
        key_runs: all writing rows, likewise.
        idle: writing rows whose chunk is incomplete and seen by no query: int64, or bool for each row, or None.
        chunk_lengths: tokens of each chunk, int64, incomplete ones that do not write among them.
        writing_chunks: which of those are the chunks above, int64, or None for all.
        longest_read: the longest span of `reads`.
        longest_write: the longest of `writes`.
        rows: state rows.
        chunk: tokens in each chunk where all of them are complete, else None.
    """

    reads: Tensor
    read_pieces: Tensor
    row_pieces: Tensor
    writes: Tensor
    chunk_pieces: Tensor
    whole_chunks: Tensor
    sequences: Tensor
    query_runs: Tensor
    key_runs: Tensor
    idle: Tensor | None
    chunk_lengths: Tensor
    writing_chunks: Tensor | None
    longest_read: int
    longest_write: int
    rows: int
    chunk: int | None


def chunk_means(layout: SpanTables, gate: Tensor) -> Tensor:
    """Per-token gates `[rows, heads]` averaged over each chunk of a layout that writes, `[chunks, heads]`."""
    if layout.chunk is not None:
        return gate.unflatten(0, (-1, layout.chunk)).mean(1)
    means = torch.segment_reduce(gate.contiguous(), "mean", lengths=layout.chunk_lengths, axis=0)
    return means if layout.writing_chunks is None else means[layout.writing_chunks]


def piece_of(length: int, parts: int) -> int:
    """Rows of each piece where `length` of them are cut into at most `parts`: whole tiles, none of them short."""
    size = max(SHORTEST_PIECE, -(-length // max(parts, 1)))
    return -(-size // TILE) * TILE


def cut(start: int, length: int, parts: int) -> list[tuple[int, int]]:
    """`length` rows from `start` in at most `parts` spans of whole tiles, none of them short."""
    size = piece_of(length, parts)
    return [(start + at, min(size, length - at)) for at in range(0, length, size)] or [(start, 0)]


def chunked_layout(
    queries: tuple[int, ...],
    pending: tuple[int, ...],
    writers: tuple[int, ...],
    chunk: int,
    own: bool,
    shared: bool,
    programs: int,
    device: torch.device,
) -> SpanTables:
    """The tables of sequences that lie one after another; made once, and constants of what `torch.compile` makes.

    Args:
        queries: query rows of each sequence.
        pending: writing rows that each sequence has before the first query's.
        writers: all writing rows of each sequence, those included.
        chunk: tokens in a chunk.
        own: queries see their own chunk's write, also of a chunk that is incomplete.
        shared: all sequences have the same theta.
        programs: how many programs one span keeps busy; spans are cut where all together are too few.
        device: of the tables.
    """

    def known(lengths: tuple[int, ...]) -> tuple[int, ...]:
        # where a trace has lengths as symbols, this takes their values
        return tuple(operator.index(n) for n in lengths)

    sizes = operator.index(chunk), own, shared, operator.index(programs)
    return _constant_layout(known(queries), known(pending), known(writers), *sizes, device)


@torch.compiler.assume_constant_result
def _constant_layout(*key: Any) -> SpanTables:
    return _chunked_layout(*key)


@lru_cache(maxsize=64)
# tables made for inference serve training too
@torch.inference_mode(False)
def _chunked_layout(
    queries: tuple[int, ...],
    pending: tuple[int, ...],
    writers: tuple[int, ...],
    chunk: int,
    own: bool,
    shared: bool,
    programs: int,
    device: torch.device,
) -> SpanTables:
    total_chunks = sum(-(-n // chunk) for n in writers)
    parts = -(-ENOUGH_PROGRAMS // max(programs * total_chunks, 1))
    reads: list[tuple[int, ...]] = []
    read_pieces: list[tuple[int, ...]] = []
    row_pieces: list[tuple[int, ...]] = []
    writes: list[tuple[int, ...]] = []
    chunk_pieces: list[tuple[int, ...]] = []
    sequences: list[tuple[int, ...]] = []
    lengths: list[int] = []
    writing: list[int] = []
    idle: list[int] = []
    query_start = key_start = row = 0
    for s, (asked, old, there) in enumerate(zip(queries, pending, writers, strict=True)):
        theta = 0 if shared else s
        complete, rest = divmod(there, chunk)
        count = complete + (1 if own and rest else 0)
        sequences.append((len(chunk_pieces), count, complete, row))
        for c in range(complete + (1 if rest else 0)):
            size = min(chunk, there - c * chunk)
            lengths.append(size)
            if c < count:
                writing.append(len(lengths) - 1)
                pieces = cut(key_start + c * chunk, size, parts)
                chunk_pieces.append((len(writes), len(pieces)))
                writes += [(at, n, len(chunk_pieces) - 1, theta) for at, n in pieces]
            else:
                idle += range(key_start + c * chunk, key_start + there)
        for c in range(count + 1):
            # the queries that read state c: those of chunk c, or of the chunk before where their own counts; the last state
            # is for all that are left
            low, high = (c - own) * chunk, (c - own + 1) * chunk
            first, last = max(low - old, 0), asked if c == count else min(high - old, asked)
            if first < last:
                reads.append((query_start + first, last - first, row + c, theta))
                pieces = cut(query_start + first, last - first, parts)
                row_pieces.append((len(read_pieces), len(pieces)))
                read_pieces += [(at, n, row + c, theta) for at, n in pieces]
            else:
                row_pieces.append((len(read_pieces), 0))
        query_start, key_start, row = query_start + asked, key_start + there, row + count + 1

    def table(entries: Sequence[Sequence[int]], columns: int) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32).reshape(-1, columns).to(device)

    def index(entries: list[int]) -> Tensor:
        return torch.tensor(entries, dtype=torch.int64).to(device)

    whole = set(lengths) == {chunk} and not idle
    return SpanTables(
        reads=table(reads, 4),
        read_pieces=table(read_pieces, 4),
        row_pieces=table(row_pieces, 2),
        writes=table(writes, 4),
        chunk_pieces=table(chunk_pieces, 2),
        whole_chunks=table([(i, 1) for i in range(len(chunk_pieces))], 2),
        sequences=table(sequences, 4),
        query_runs=table(runs(queries, shared), 4),
        key_runs=table(runs(writers, shared), 4),
        idle=index(idle) if idle else None,
        chunk_lengths=index(lengths),
        writing_chunks=None if len(writing) == len(lengths) else index(writing),
        longest_read=max((n for _, n, _, _ in reads), default=0),
        longest_write=max((n for _, n, _, _ in writes), default=0),
        rows=row,
        chunk=chunk if whole else None,
    )


def packed_layout(chunks: Chunks, programs: int) -> SpanTables:
    """The tables of packed documents that have one theta and whose queries see complete earlier chunks alone.

    Made on the device, of sizes that a capacity decides: spans that a row lacks are empty.

    Args:
        chunks: of the documents.
        programs: as `chunked_layout` takes it.
    """
    boundaries, size, device = chunks.boundaries, chunks.size, chunks.first.device
    begins, ends = boundaries.bounds[:-1], boundaries.bounds[1:]
    most, documents, length = len(chunks), boundaries.capacity, boundaries.length
    # one state row before each complete chunk and one after the last, and queries of one span for each
    rows = most + documents
    before = torch.arange(documents, device=device)
    stops = chunks.stops + before + 1
    document, real = owners(stops, rows)
    row = torch.arange(rows, device=device)
    first = begins[document] + (row - (stops - chunks.counts - 1)[document]) * size
    asked = torch.where(real, (ends[document] - first).clamp(max=size), 0)
    first = torch.where(real, first, 0)
    piece = piece_of(size, -(-ENOUGH_PROGRAMS // max(programs * rows, 1)))
    each = -(-size // piece)

    def table(*columns: Tensor | int) -> Tensor:
        tensors = [x if isinstance(x, Tensor) else row.new_full((), x) for x in columns]
        return torch.stack(torch.broadcast_tensors(*tensors), dim=-1).flatten(0, -2).to(torch.int32)

    def spans(first: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Spans cut into equally many pieces, some of them empty, and which pieces are whose."""
        number = torch.arange(len(first), device=device)
        offset = torch.arange(each, device=device) * piece
        pieces = table(first[:, None] + offset, (length[:, None] - offset).clamp(0, piece), number[:, None], 0)
        return pieces, table(number * each, each)

    read_pieces, row_pieces = spans(first, asked)
    writes, chunk_pieces = spans(chunks.first, torch.where(chunks.real, size, 0))
    run = -(-length // RUNS)
    at = (torch.arange(RUNS, device=device) * run).clamp(max=length)
    whole = table(at, (length - at).clamp(max=run), 0, 0)
    place = torch.arange(length, device=device) - boundaries.starts
    return SpanTables(
        reads=table(first, asked, row, 0),
        read_pieces=read_pieces,
        row_pieces=row_pieces,
        writes=writes,
        chunk_pieces=chunk_pieces,
        whole_chunks=table(torch.arange(most, device=device), 1),
        sequences=table(chunks.stops - chunks.counts, chunks.counts, chunks.counts, stops - chunks.counts - 1),
        query_runs=whole,
        key_runs=whole,
        idle=place // size >= chunks.counts[boundaries.document],
        chunk_lengths=torch.where(chunks.real, size, 0),
        writing_chunks=None,
        longest_read=min(size, length),
        longest_write=min(piece, size),
        rows=rows,
        chunk=None,
    )


def runs(lengths: tuple[int, ...], shared: bool) -> list[tuple[int, int, int, int]]:
    """All rows of some sequences, each sequence (or all together) in equally many spans, some of them empty."""
    groups = (sum(lengths),) if shared else lengths
    parts = max(1, RUNS // max(len(groups), 1))
    found, start = [], 0
    for theta, length in enumerate(groups):
        size = -(-length // parts)
        for i in range(parts):
            first = min(i * size, length)
            found.append((start + first, min(size, length - first), 0, theta))
        start += length
    return found
