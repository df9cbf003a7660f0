"""How many blocks of a model must be recomputed for a step to fit a GPU: a batch tells before the first step."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from kvbind.train.average import local
from kvbind.train.checkpoint import random_state, restore_random_state
from kvbind.train.ranks import from_all, rank
from kvbind.train.recompute import Recomputed, that_fit

if TYPE_CHECKING:
    from kvbind.train.step import TrainingStep

log = logging.getLogger("kvbind.train")

SHARE = 0.8
"""Of a GPU's memory that tensors may take: the rest is for its allocator's gaps, libraries and other processes."""


def initial(what: str, device: torch.device) -> str:
    """What `recompute` is to be told at first: for "auto" on a GPU all blocks, as only a batch tells which need not be."""
    if what != "auto":
        return what
    return "block" if device.type == "cuda" else "none"


def keep_what_fits(step: TrainingStep, blocks: list[Recomputed]) -> None:
    """Let as many blocks keep their activations as fit the GPU's memory beside all that a step holds.

    One forward and backward pass of the next batch, all blocks recomputed, shows how much memory that takes and what each
    block would keep. It leaves no trace: the batch stays the next, gradients are given up, buffers and random numbers are
    what they were. All processes decide alike, as the one with the least memory must.

    Args:
        step: of the run, before its first.
        blocks: all of the model's, recomputed.
    """
    device = step.device
    for block in blocks:
        block.measured_by = lambda: torch.cuda.memory_allocated(device)
    state, buffers = random_state(), [x.clone() for x in step.model.buffers()]
    torch.cuda.reset_peak_memory_stats(device)
    step.backward(step.first_part(), last=True)
    peak = torch.cuda.max_memory_allocated(device)
    step.optimizer.zero_grad(set_to_none=True)
    for buffer, before in zip(step.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    restore_random_state(state)

    room = SHARE * capacity(device) - peak - missing_averages(step.optimizer)
    count = min(from_all(that_fit([block.extra for block in blocks], room)))
    for block in blocks[len(blocks) - count :]:
        block.on = False
    step.relieve = partial(all_recomputed, blocks)
    if rank() == 0 and count < len(blocks):
        log.info("%d of %d blocks are computed again in the backward pass, as memory asks", len(blocks) - count, len(blocks))


def all_recomputed(blocks: list[Recomputed]) -> bool:
    """Recompute all blocks from now on; False where they were already."""
    if all(block.on for block in blocks):
        return False
    for block in blocks:
        block.on = True
    log.info("all %d blocks are computed again in the backward pass, as a CUDA graph of a step did not fit", len(blocks))
    return True


def capacity(device: torch.device) -> float:
    """Bytes of a GPU that this process may take, those that it has taken included."""
    free, total = torch.cuda.mem_get_info(device)
    # which wants a number
    number = torch.cuda.current_device() if device.index is None else device.index
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(number)
    return min(free + torch.cuda.memory_reserved(device), fraction * total)


def missing_averages(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the two averages that AdamW is yet to make, in the dtype of each parameter."""
    parameters = [local(p) for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    return sum(2 * p.numel() * p.element_size() for p in parameters)
