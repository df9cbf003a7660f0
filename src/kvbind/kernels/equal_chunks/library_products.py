"""Batched products of the vendor's library, where tokens lie as it takes them: chunk by chunk, head by head, without gaps.

Each is called as its counterpart in `tma_products`, on the current stream. Matrices of chunks lie by head too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.equal_chunks.tma_products import TokenRows

LEAST = 1 << 33
"""Operations of a product from which the library is faster; under them a call costs the host more than the device."""


def fits(like: Tensor, *tokens: TokenRows) -> bool:
    """Whether the library is there for tensors like one, and takes these tokens."""
    return like.is_cuda and all(x.strides == x.by_head(x.shape[3]).strides for x in tokens)


class _Chunks:
    """Tokens `[B, T, H, D]`, whole chunks of them, as batches of matrices `[B H T / chunk, chunk, D]`."""

    __slots__ = ("shape", "strides")

    def __init__(self, rows: TokenRows, chunk: int) -> None:
        batch, length, heads, width = rows.shape
        self.shape = batch * heads * length // chunk, chunk, width
        self.strides = chunk * width, width, 1

    def __call__(self, x: Tensor) -> Tensor:
        return x.as_strided(self.shape, self.strides)


class LibraryWrite:
    """`tma_products.write` by the library.

    Args:
        x: the left factor.
        g: the right one.
        chunk: tokens in a chunk.
    """

    def __init__(self, x: TokenRows, g: TokenRows, chunk: int) -> None:
        self.left, self.right = _Chunks(x, chunk), _Chunks(g, chunk)

    def __call__(self, stream: int, x: Any, g: Any, y: Any) -> None:
        """Write to y, float32 `[B * H * parts, M, N]`."""
        torch.bmm(self.left(x).mT, self.right(g), out_dtype=torch.float32, out=y)


class LibraryProduct:
    """`tma_products.product` by the library, without rates and sums; each chunk has a matrix.

    Args:
        x: what is multiplied.
        y: the result.
        chunk: tokens in a chunk.
        transposed: multiply by the transposes.
    """

    def __init__(self, x: TokenRows, y: TokenRows, chunk: int, *, transposed: bool = False) -> None:
        self.left, self.result, self.transposed = _Chunks(x, chunk), _Chunks(y, chunk), transposed

    def __call__(self, stream: int, x: Any, w: Any, y: Any, *_: Any) -> None:
        """Write x `[B, T, H, K]` times w `[B * H * T / chunk, K, N]` to y `[B, T, H, N]`."""
        torch.bmm(self.left(x), w.mT if self.transposed else w, out=self.result(y))
