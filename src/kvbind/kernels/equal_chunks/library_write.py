"""Writes as a batched product of the vendor's library, where tokens lie as it takes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.equal_chunks.tma_products import TokenRows


class LibraryWrite:
    """`tma_products.write` as one product of the vendor's library, for chunks that lie one after another, head by head.

    Args:
        x: the left factor.
        g: the right one.
        chunk: tokens in a chunk; a sequence has a whole number of them.
    """

    def __init__(self, x: TokenRows, g: TokenRows, chunk: int) -> None:
        count = math.prod(x.shape[:3]) // chunk
        self.left = (count, x.shape[3], chunk), (chunk * x.shape[3], 1, x.shape[3])
        self.right = (count, chunk, g.shape[3]), (chunk * g.shape[3], g.shape[3], 1)
        self.shape = count, x.shape[3], g.shape[3]

    @staticmethod
    def fits(like: Tensor, *tokens: TokenRows) -> bool:
        """Whether the library is there for tensors like one, and tokens lie head by head, without gaps."""
        return like.is_cuda and all(x.strides == x.by_head(x.shape[3]).strides for x in tokens)

    def __call__(self, stream: int, x: Any, g: Any, y: Any) -> None:
        """Write to y, float32, sequences outermost, then heads; the stream is the current one."""
        torch.bmm(x.as_strided(*self.left), g.as_strided(*self.right), out_dtype=torch.float32, out=y.view(self.shape))
