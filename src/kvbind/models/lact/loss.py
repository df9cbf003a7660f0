"""Cross-entropy of a vocabulary projection, in pieces, so that no full matrix of logits is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""The label of positions that count for nothing, as in `torch.nn.functional.cross_entropy`."""

PIECE = 1024
"""Tokens whose logits exist at the same time."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Literal["sum", "none"] = "sum", piece: int = PIECE
) -> Tensor:
    """Cross-entropy of `hidden @ weight^T` against labels; softmax in float32 or wider.

    Logits are made for `piece` tokens at a time and made again in the backward pass.

    Args:
        hidden: `[..., d]`.
        weight: `[vocab, d]`.
        labels: `[...]` token ids, or -100 where nothing is predicted.
        reduction: "sum" over tokens, or "none".
        piece: tokens at a time.

    Returns:
        The summed loss, or the loss of each token `[...]`, 0 where the label is -100; float32 or wider.
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    losses = []
    for part, target in zip(torch.split(rows, piece), torch.split(targets, piece), strict=True):
        if torch.is_grad_enabled():
            losses.append(checkpoint(_piece_loss, part, weight, target, reduction, use_reentrant=False))
        else:
            losses.append(_piece_loss(part, weight, target, reduction))
    if reduction == "none":
        return torch.cat(losses).reshape(labels.shape)
    return torch.stack(losses).sum()


def _piece_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORE, reduction=reduction)


def next_token_labels(
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """What each position has to predict: the label behind it in its own document.

    Args:
        labels: `[B, T]`, aligned with the input.
        attention_mask: `[B, S]`, S at least T; columns are 0 at padding, which predicts nothing and is not predicted.
        position_ids: `[B, T]` or `[1, T]`; a document's last token, behind which they do not rise by one, predicts nothing.
        cu_seqlens: `[n + 1]` boundaries of documents, likewise.

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
        ends = (torch.as_tensor(cu_seqlens, device=labels.device)[1:] - 1) % length
        targets = targets.index_fill(1, ends.long(), IGNORE)
    return targets
