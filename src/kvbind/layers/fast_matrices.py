"""Starting fast matrices as parameters: their released names, what checkpoints hold, low-rank ones, and learned rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kvbind.inner.networks import SwiGLU
from kvbind.inner.spec import InnerLoop

LACT_NAMES = {"gate": "w0", "out": "w1", "up": "w2"}
"""The released names of a SwiGLU's matrices in LaCT, which every other network's matrices of that role share."""

VITTT_NAMES = {"out": "w1", "gate": "w2"}
"""The released names of a GLU's matrices in ViTTT, likewise."""


def lact_parameter(matrix: str) -> str:
    """The parameter of a LaCT layer that holds a fast matrix: `w0`, `w1`, `w2` for gate, out and up; "in.0" is `w_in_0`."""
    return LACT_NAMES.get(matrix, own_name(matrix))


def vittt_parameter(matrix: str) -> str:
    """The parameter of a ViTTT layer that holds a fast matrix: `w1` and `w2` for out and gate; "in.0" is `w_in_0`."""
    return VITTT_NAMES.get(matrix, own_name(matrix))


def own_name(matrix: str) -> str:
    """The parameter that holds a matrix without a released name: no name of a parameter has dots."""
    return "w_" + matrix.replace(".", "_")


def inverse_softplus(rate: float) -> float:
    """`softplus^-1(rate)`, which rates' logits are added to.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if rate <= 0:
        raise ValueError(f"base_lr must be above 0; got {rate}")
    return rate + math.log(-math.expm1(-rate))


def with_released_parameters(inner: InnerLoop) -> InnerLoop:
    """The inner loop whose parameters a released checkpoint of `inner` holds: those of the full system."""
    return inner.replace(network=SwiGLU(), update="all", token_lr=True)


class LowRankMatrix(nn.Module):
    """A fast matrix per head, `left @ right + I / 2`, stored `[heads, out, in]` like the full-rank ones.

    Args:
        heads: number of heads.
        outputs: channels that come out.
        inputs: channels that go in.
        rank: inner width of the product.
        gain: factor on the standard deviations at the start, `1 / sqrt(rank)` and `1 / sqrt(in)`.
    """

    def __init__(self, heads: int, outputs: int, inputs: int, rank: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.w_left = nn.Parameter(torch.empty(heads, outputs, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, inputs))

    def reset_parameters(self) -> None:
        """Draw both factors anew."""
        nn.init.normal_(self.w_left, std=self.gain / math.sqrt(self.w_left.shape[-1]))
        nn.init.normal_(self.w_right, std=self.gain / math.sqrt(self.w_right.shape[-1]))

    def forward(self) -> Tensor:
        """The matrices `[heads, out, in]`."""
        left, right = self.w_left, self.w_right
        eye = torch.eye(left.shape[-2], right.shape[-1], dtype=left.dtype, device=left.device)
        return torch.baddbmm(eye.expand(len(left), -1, -1), left, right, beta=0.5)
