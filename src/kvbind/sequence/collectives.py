"""The exchanges on plain tensors, by functional collectives: started at once, waited for where their result is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvbind.sequence.traffic import record, waiting


def wait(x: Tensor) -> Tensor:
    """The result of a collective, once it is there."""
    with waiting(x.device):
        result: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return result


def begin_gather(parts: Sequence[Tensor], group: str, size: int) -> Tensor:
    """Start to gather every rank's tensors of one dtype; `gathered` takes the result apart.

    Returns:
        `[size * elements]`, to be waited for.
    """
    flat = torch.cat([x.reshape(-1) for x in parts])
    nbytes = flat.numel() * flat.element_size()
    record("scan", nbytes * (size - 1), nbytes * (size - 1))
    result: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(flat, size, group)
    return result


def gathered(raw: Tensor, shapes: Sequence[torch.Size], size: int) -> list[Tensor]:
    """Wait for `begin_gather`: for each of its tensors, `[size, *shape]`."""
    rows = wait(raw).view(size, -1)
    parts = rows.split([shape.numel() for shape in shapes], dim=1)
    return [part.reshape(size, *shape) for part, shape in zip(parts, shapes, strict=True)]


def compose(steps: Tensor, reaches: Tensor, order: Iterable[int], transposed: bool = False) -> Tensor:
    """`x <- P_r x + E_r` over ranks in an order, from zero.

    Args:
        steps: every rank's `E`, `[ranks, ..., n, m]`.
        reaches: every rank's `P`, `[ranks, ..., n, n]`; the first in the order is not read.
        order: the ranks.
        transposed: `P^T` in place of `P`.
    """
    x = None
    for rank in order:
        if x is None:
            # a copy, or what is kept of one rank would keep what all ranks sent
            x = steps[rank].clone()
            continue
        p = reaches[rank].mT if transposed else reaches[rank]
        x = steps[rank] + (p * x if p.shape[-1] == 1 else p @ x)
    return torch.zeros_like(steps[0]) if x is None else x


def exchange(rows: Tensor, sending: Sequence[int], receiving: Sequence[int], group: str) -> Tensor:
    """Send consecutive rows `[n, bytes]` to each rank and take as many as each has for this one, in the order of ranks."""
    width = rows.shape[1] * rows.element_size()
    record("halo", width * sum(sending), width * sum(receiving))
    raw = torch.ops._c10d_functional.all_to_all_single(rows, list(receiving), list(sending), group)
    return wait(raw)


def as_bytes(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors whose first axis has `rows` entries as one of bytes, `[rows, bytes]`."""
    columns = []
    for x in tensors:
        column = torch.empty(rows, x.shape[1:].numel(), dtype=x.dtype, device=x.device)
        columns.append(column.copy_(x.reshape(column.shape)).view(torch.uint8))
    return torch.cat(columns, dim=1)


def from_bytes(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `as_bytes` packed, of the shapes behind the first axis and the dtypes of `like`."""
    widths = [x.shape[1:].numel() * x.element_size() for x in like]
    starts = [0, *itertools.accumulate(widths)]
    found = []
    for x, start, width in zip(like, starts, widths, strict=False):
        # a copy starts at an address that any dtype may have
        part = torch.empty(rows.shape[0], width, dtype=torch.uint8, device=rows.device)
        part.copy_(rows[:, start : start + width])
        found.append(part.view(x.dtype).reshape(rows.shape[0], *x.shape[1:]))
    return found
