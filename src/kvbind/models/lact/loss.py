"""Cross-entropy of a vocabulary projection, in pieces, so that no full matrix of logits is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvbind.forms.autocast import without_autocast
from kvbind.kernels.common.tracing import is_transformed
from kvbind.kernels.elementwise.cross_entropy import cross_entropy_
from kvbind.layers.norm import narrowed
from kvbind.sequence.boundaries import Boundaries

IGNORE = -100
"""The label of positions that count for nothing, as in `torch.nn.functional.cross_entropy`."""

PIECE = 2048
"""Tokens whose logits exist at the same time."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Literal["sum", "none"] = "sum", piece: int = PIECE
) -> Tensor:
    """Cross-entropy of `hidden @ weight^T` against labels; softmax in float32 or wider.

    Logits are made for `piece` tokens at a time. A sum's gradients are made with it, while its logits are there, up to the
    factor that a backward pass brings; those of each token's loss, and those of float16, which would lose what is small
    before it is scaled, in the backward pass from logits made again. Transforms of `torch.func` keep all logits.

    Args:
        hidden: `[..., d]`.
        weight: `[vocab, d]`.
        labels: `[...]` token ids, or -100 where nothing is predicted.
        reduction: "sum" over tokens, or "none".
        piece: tokens at a time.

    Returns:
        The summed loss, or the loss of each token `[...]`, 0 where the label is -100; float32 or wider.

    Raises:
        ValueError: `labels` are not one for each token.
        RuntimeError: in a backward pass that is to be differentiated itself, of a sum.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if len(rows) != len(targets):
        raise ValueError(f"labels must be {list(hidden.shape[:-1])}, one for each token; got {list(labels.shape)}")
    low = narrowed(torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type)
    if reduction == "sum" and low != torch.float16 and not is_transformed():
        loss: Tensor = _Summed.apply(rows, weight, targets, low, piece, torch.is_grad_enabled())
        return loss
    each = _in_pieces(lambda part, target: _losses(F.linear(part, weight), target), rows, targets, piece).reshape(
        labels.shape
    )
    return each if reduction == "none" else each.sum()


def cross_entropy(logits: Tensor, labels: Tensor, piece: int = PIECE) -> Tensor:
    """The summed cross-entropy of logits that are there already; softmax in float32 or wider.

    Args:
        logits: `[..., vocab]`.
        labels: `[...]` token ids, or -100 where nothing is predicted.
        piece: tokens whose logits are widened at the same time.
    """
    return _in_pieces(_losses, logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), piece).sum()


def _in_pieces(losses: Callable[[Tensor, Tensor], Tensor], rows: Tensor, targets: Tensor, piece: int) -> Tensor:
    """Each token's loss; what a piece needs on the way is made again in the backward pass."""
    # which transforms of functions know nothing of
    again = torch.is_grad_enabled() and not is_transformed()
    return torch.cat(
        [
            checkpoint(losses, part, target, use_reentrant=False) if again else losses(part, target)
            for part, target in zip(torch.split(rows, piece), torch.split(targets, piece), strict=True)
        ]
    )


class _Summed(torch.autograd.Function):
    """The summed loss of rows `[N, d]`, from products in the dtype `low`; weights' gradients are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, low: torch.dtype, piece: int, gradient: bool
    ) -> Tensor:
        of_rows, of_weight = (gradient and wanted for wanted in ctx.needs_input_grad[:2])
        wide, matrix = torch.promote_types(low, torch.float32), weight.to(low)
        d_rows = torch.empty_like(rows) if of_rows else None
        d_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        losses = [torch.zeros(1, dtype=wide, device=rows.device)]
        # autocast to float16 would take bfloat16 operands, too, and lose what is small of the gradients
        with without_autocast(rows.device.type):
            for start in range(0, len(rows), piece):
                part = rows[start : start + piece].to(low)
                logits = part @ matrix.T
                losses.append(cross_entropy_(logits, labels[start : start + piece], IGNORE, of_rows or of_weight))
                # from here on logits are their gradients
                if d_rows is not None:
                    d_rows[start : start + piece] = logits @ matrix
                if d_weight is not None:
                    d_weight += logits.T @ part
        ctx.save_for_backward(d_rows, d_weight)
        ctx.dtypes = rows.dtype, weight.dtype
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would take gradients for constants where the slope is one, without a word
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy's sum is differentiable once; reduction='none' as often as wanted")
        # a narrow tensor times the slope would round the slope
        scaled = [
            None if x is None else (x.to(slope.dtype) * slope).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction="none")


def next_token_labels(
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | Boundaries | None = None,
) -> Tensor:
    """What each position has to predict: the label behind it in its own document.

    Args:
        labels: `[B, T]`, aligned with the input.
        attention_mask: `[B, S]`, S at least T; columns are 0 at padding, which predicts nothing and is not predicted.
        position_ids: `[B, T]` or `[1, T]`; a document's last token, behind which they do not rise by one, predicts nothing.
        cu_seqlens: `[n + 1]` boundaries of documents, likewise, or such as the device alone reads.

    Returns:
        `[B, T]` with -100 where nothing is predicted.
    """
    length = labels.shape[1]
    real = None if attention_mask is None else attention_mask[:, -length:] != 0
    if real is not None:
        labels = labels.masked_fill(~real, IGNORE)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if real is not None:
        targets = targets.masked_fill(~real, IGNORE)
    if position_ids is not None:
        last = F.pad(position_ids[:, 1:] - position_ids[:, :-1] != 1, (0, 1), value=True)
        targets = targets.masked_fill(last.to(labels.device), IGNORE)
    if cu_seqlens is not None:
        # an empty first document ends at -1, which stands for the last column, where nothing is predicted anyway
        bounds = (
            cu_seqlens.bounds if isinstance(cu_seqlens, Boundaries) else torch.as_tensor(cu_seqlens, device=labels.device)
        )
        ends = (bounds[1:] - 1) % length
        targets = targets.index_fill(1, ends.long(), IGNORE)
    return targets
