"""From what transformers hands a model (masks, position ids, packed boundaries, a cache) to a `Layout`, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbind.kernels.common.tracing import is_exported, is_for_onnx, is_mapped
from kvbind.layers.layout import Layout
from kvbind.sequence.boundaries import Boundaries
from kvbind.sequence.shard import current_shard


@dataclass(frozen=True)
class Arrangement:
    """How a model's input `[B, T, ...]` is laid out for its layers.

    Attributes:
        shape: (B, T) as given.
        layout: as the layers see it.
        real: bool `[B, T]`, False at padding; None where there is none.
        order: for each place of a row, the column of the input that goes there, int64 `[B, T]`; None where all stay.
        uncacheable: why no cache can be read or written beside this input; None where one can.
    """

    shape: tuple[int, int]
    layout: Layout
    real: Tensor | None = None
    order: Tensor | None = None
    uncacheable: str | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Bring `[B, T, d]` into the layers' arrangement."""
        if self.layout.cu_seqlens is not None:
            return x.reshape(1, -1, x.shape[-1])
        return x if self.order is None else x.take_along_dim(self.order[..., None], dim=1)

    def undo(self, x: Tensor) -> Tensor:
        """Bring the layers' output back to `[B, T, d]`; zero at padding."""
        if self.layout.cu_seqlens is not None:
            x = x.reshape(*self.shape, x.shape[-1])
        if self.order is not None:
            x = x.take_along_dim(self.order.argsort(dim=1)[..., None], dim=1)
        return x if self.real is None else x.masked_fill(~self.real[..., None], 0)


def arrange(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | Boundaries | None = None,
    *,
    seen: tuple[int, ...] = (),
    columns: int = 0,
) -> Arrangement:
    """Lay out one call's tokens: inside `kvbind.sequence_parallel` those of a slice, whose documents its shard knows.

    Padding may sit anywhere in a row: a row's tokens close up at its left, so that padding is neither attended to nor
    written, and positions count tokens alone.

    Args:
        shape: (B, T) of the input.
        device: of the input.
        attention_mask: `[B, columns + T]`, 0 at padding; only the last T columns say anything new.
        position_ids: `[B, T]` or `[1, T]`; where they do not rise by one, a new document starts.
        cu_seqlens: `[n + 1]` boundaries of documents packed into one row, or such as the device alone reads.
        seen: how many tokens each row's cache has had.
        columns: how many columns it has had, padding included.

    Raises:
        ValueError: an argument of a wrong shape, packing beside padding, or any of them beside a shard or mapped by `vmap`.
    """
    batch, length = shape
    shard = current_shard()
    if shard is not None:
        for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids), ("cu_seqlens", cu_seqlens)):
            if x is not None:
                raise ValueError(f"{name} must be None inside sequence_parallel, whose shard says where documents start")
        reason = "no cache can be made inside sequence_parallel, where a row's state is spread over ranks"
        return Arrangement(shape, Layout.sharded(shard, batch, length, device), uncacheable=reason)
    for name, x in (("attention_mask", attention_mask), ("position_ids", position_ids), ("cu_seqlens", cu_seqlens)):
        if x is not None and is_exported():
            raise ValueError(
                f"{name} must be None in torch.export, as it says where tokens are: put padding behind the tokens, which do "
                "not see it, and export without"
            )
        if isinstance(x, Tensor) and is_mapped(x):
            raise ValueError(
                f"{name} must be the same for all that vmap runs at once, as it says where tokens are; loop over it"
            )
    if seen and len(seen) != batch:
        raise ValueError(f"past_key_values must hold {batch} sequences, as the input has; it holds {len(seen)}")
    if isinstance(length, torch.SymInt) and is_for_onnx():
        raise ValueError(
            "input_ids must have one length in ONNX, where chunks are written out: export the longest, put padding behind "
            "shorter rows, which do not see it; torch.export takes any length"
        )
    real = _padding(shape, attention_mask, columns)
    positions = _positions(shape, position_ids)

    if cu_seqlens is not None:
        if real is not None:
            raise ValueError("cu_seqlens must be None beside an attention_mask with padding; leave the padding out")
        layout = Layout.packed(cu_seqlens, batch, length, device)
        if positions is not None:
            layout = replace(layout, positions=positions)
        return Arrangement(
            shape, layout, uncacheable="cu_seqlens must be None beside a cache, as a packed row has no one state"
        )

    layout, order = Layout.rows(length, device, seen), None
    if real is not None:
        # a stable sort of the mask alone: tokens to the left, in their order
        order = torch.argsort(real.logical_not().to(torch.int8), dim=1, stable=True)
        layout = replace(layout, lengths=tuple(real.sum(1).tolist()))
    if positions is None:
        return Arrangement(shape, layout, real, order)

    if order is not None:
        positions = positions.take_along_dim(order, dim=1)
    lengths = torch.tensor(layout.lengths or (length,) * batch, device=device)[:, None]
    within = torch.arange(length, device=device) < lengths
    if bool((within & (positions != layout.positions)).any()):
        breaks = within[:, 1:] & (positions[:, 1:] - positions[:, :-1] != 1)
        if not bool(breaks.any()):
            before = list(seen or (0,) * batch)
            reason = f"position_ids must go on from the {before} tokens of each row before them where there is a cache"
            return Arrangement(shape, replace(layout, positions=positions), real, order, reason)
        if real is not None:
            raise ValueError("position_ids must rise by one from token to token where there is padding, which is not packed")
        starts = torch.nn.functional.pad(breaks, (1, 0), value=True).flatten().nonzero().flatten().tolist()
        reason = "position_ids must rise by one from token to token beside a cache, as a packed row has no one state"
        return Arrangement(shape, Layout(positions.reshape(1, -1), (*starts, batch * length)), uncacheable=reason)
    return Arrangement(shape, layout, real, order)


def _padding(shape: tuple[int, int], attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """Which of this call's columns are tokens, bool `[B, T]`; None where all are."""
    if attention_mask is None:
        return None
    batch, length = shape
    if tuple(attention_mask.shape) != (batch, columns + length):
        raise ValueError(
            f"attention_mask must be [B, T] = {[batch, columns + length]}, columns in the cache included; got shape "
            f"{list(attention_mask.shape)}"
        )
    real = attention_mask[:, columns:] != 0
    return None if bool(real.all()) else real


def _positions(shape: tuple[int, int], position_ids: Tensor | None) -> Tensor | None:
    if position_ids is None:
        return None
    batch, length = shape
    if tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids must be [B, T] = {list(shape)} or [1, T]; got shape {list(position_ids.shape)}")
    return position_ids.expand(batch, length)


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """What a model was given of its two kinds of input.

    Args:
        input_ids: `[B, T]`, or None.
        inputs_embeds: `[B, T, d]`, or None.

    Raises:
        ValueError: both, neither, another shape, or no sequence.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    name, given, shape = (
        ("input_ids", input_ids, "[B, T]") if inputs_embeds is None else ("inputs_embeds", inputs_embeds, "[B, T, d]")
    )
    assert given is not None
    if given.ndim != shape.count(",") + 1 or not given.shape[0]:
        raise ValueError(f"{name} must be {shape} with at least one sequence; got shape {list(given.shape)}")
    return given


def check_padding_side(mask: Tensor | None) -> None:
    """Refuse prompts that end in padding, behind which no token can follow.

    Args:
        mask: an attention mask `[B, T]`, or None.

    Raises:
        ValueError: a row whose last column is padding.
    """
    if mask is not None and mask.dim() == 2 and mask.shape[1] and bool((mask[:, -1] == 0).any()):
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(
            "attention_mask must not end in padding, as what is generated follows the last column: tokenize with "
            f"padding_side='left'; got padding at the end of rows {rows}"
        )
