"""A batch of the language model cut over ranks: each rank's slice, with labels that cross no boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvbind.models.lact.loss import IGNORE, next_token_labels
from kvbind.sequence.shard import SequenceShard


def shard_batch(batch: Mapping[str, Any], shard: SequenceShard) -> dict[str, Any]:
    """This rank's slice of a batch of whole rows, to call the model with inside `kvbind.sequence_parallel(shard)`.

    The last token of a slice predicts the first of the next: labels are shifted before they are cut. A rank's loss is its
    part of the sum over the whole row, divided by the whole row's number of predicted tokens, so that losses, and gradients
    of parameters, of all ranks add up to those of one process.

    Args:
        batch: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, d]` of whole rows, the same on every rank; `labels`, aligned
            with them, or `shift_labels`; `num_items_in_batch`; and, of no further meaning, `cu_seqlens` like the shard's.
            Entries that are None are left out.
        shard: how the rows are cut.

    Returns:
        The slices of `input_ids` or `inputs_embeds`, and where there are labels `shift_labels` and `num_items_in_batch`.

    Raises:
        ValueError: rows of another length than the shard's, other boundaries, or padding.
        TypeError: an entry that is none of these, or `shard` is no `SequenceShard`.
    """
    if not isinstance(shard, SequenceShard):
        raise TypeError(f"shard must be a kvbind.SequenceShard; got {type(shard).__name__}")
    given = {name: x for name, x in batch.items() if x is not None}
    found: dict[str, Any] = {
        name: shard.take(given.pop(name)) for name in ("input_ids", "inputs_embeds") if isinstance(given.get(name), Tensor)
    }
    bounds = given.pop("cu_seqlens", None)
    bounds = bounds.tolist() if isinstance(bounds, Tensor) else bounds
    if bounds is not None and tuple(bounds) != shard.cu_seqlens:
        raise ValueError(f"cu_seqlens must be the shard's, {shard.cu_seqlens}; got {list(bounds)}")
    mask = given.pop("attention_mask", None)
    if mask is not None and not bool(mask.all()):
        raise ValueError("attention_mask must have no padding in rows that are cut over ranks; pack the documents instead")
    labels, targets = given.pop("labels", None), given.pop("shift_labels", None)
    count = given.pop("num_items_in_batch", None)
    if given:
        raise TypeError(f"shard_batch knows no entry {next(iter(given))!r}")
    if targets is None and labels is not None:
        targets = next_token_labels(labels, cu_seqlens=shard.cu_seqlens)
    if targets is not None:
        found["shift_labels"] = shard.take(targets)
        found["num_items_in_batch"] = (targets != IGNORE).sum().clamp(min=1) if count is None else count
    return found
