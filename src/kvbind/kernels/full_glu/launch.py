"""What the launches of one call share: operands with their strides, grids, and options of the compiler."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import multiprocessors
from kvbind.kernels.common.operands import cdiv, dot_precision, last_contiguous

PART = 256
"""The fewest tokens in a part of a long sequence."""


def _parts(x: Tensor, programs: int, tokens: int) -> int:
    """Into how many parts to cut the tokens, so that twice the device's multiprocessors have work."""
    at_once = 2 * multiprocessors(x)
    return max(1, min(-(-at_once // max(programs, 1)), tokens // PART))


def _padded(width: int) -> int:
    """The width of a tile that holds `width` columns: a power of two, and at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(width))


class GluLaunch:
    """What the launches of one call share.

    Attributes:
        operands: q, k, v, weight, gate and the rates as kernels take them, the weight standing in for what is missing.
        strides: theirs; those of the matrices are also in `matrix_strides`.
        heads: how many.
        programs: sequences times heads.
        parts: into how many parts the tokens are cut.
        counts: heads, tokens that write, tokens that read, and how many of each are in a part.
        flags: compile-time arguments of kernels that go over tokens.
        enter_flags: of those that add parts.
        full: there are operands in float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        rate_out: Tensor | None,
        rate_gate: Tensor | None,
        update_gate: bool,
        clip: bool,
        squared: bool,
    ) -> None:
        batch, readers, self.heads, key_width = q.shape
        writers, value_width = v.shape[1], v.shape[3]
        flags = {
            "GATE": gate is not None,
            "UPDATE_GATE": update_gate,
            "CLIP": clip,
            "SQUARED": squared,
            "RATED_OUT": rate_out is not None,
            "RATED_GATE": rate_gate is not None,
            "PRECISION_K": dot_precision(k.dtype),
            "PRECISION_Q": dot_precision(q.dtype),
        }
        q, k, v, weight = (last_contiguous(x) for x in (q, k, v, weight))
        gate = weight if gate is None else last_contiguous(gate)
        rates = [weight if rate is None else rate for rate in (rate_out, rate_gate)]
        self.operands = (q, k, v, weight, gate, *rates)
        self.matrix_strides = (*weight.stride()[:3], *gate.stride()[:3])
        token_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.strides = (*token_strides, *self.matrix_strides, *rates[0].stride()[:3], *rates[1].stride()[:3])

        self.programs = batch * self.heads
        self.parts = _parts(q, self.programs, max(writers, readers))
        self.counts = (self.heads, writers, readers, -(-writers // self.parts), -(-readers // self.parts))
        widths = {"DK": key_width, "DV": value_width, "BK": _padded(key_width)}
        self.flags: dict[str, Any] = {**flags, **widths, "BV": _padded(value_width)}
        self.enter_flags: dict[str, Any] = {**widths, "CLIP": clip, "BN": 16, "BP": 8, "num_warps": 4}
        self.full = torch.float32 in (q.dtype, k.dtype)

    def options(self, forward: bool) -> dict[str, int]:
        """The tile of tokens, warps and stages of kernels that go over tokens: the largest that fit into registers."""
        if self.full:
            # float32 products run on the plain cores, from registers, and are unrolled
            return {"BT": 16, "num_warps": 8, "num_stages": 1}
        return {"BT": 64 if forward else 32, "num_warps": 4, "num_stages": 2}

    def over_tokens(self, kernel: Any, stage: tl.constexpr, *arguments: Any, **options: Any) -> None:
        """Launch a kernel that goes over tokens."""
        kernel[self.programs, self.parts](
            *self.operands, *arguments, *self.counts, *self.strides, STAGE=stage.value, **self.flags, **options
        )

    def over_parts(self, kernel: Any, matrices: int, *arguments: Any, **flags: bool) -> None:
        """Launch a kernel that adds the parts of `matrices` matrices of each program."""
        grid = self.programs, cdiv(self.flags["DV"], self.enter_flags["BN"]), matrices
        kernel[grid](
            *self.operands[3:5], *arguments, self.heads, self.parts, *self.matrix_strides,
            MATRICES=matrices, **flags, **self.enter_flags,
        )  # fmt: skip

    def matrices(self, count: int, parts: int = 1) -> Tensor:
        """Room for `count` matrices of each program and part."""
        shape = (self.programs, parts, count, self.flags["DK"], self.flags["DV"])
        return torch.empty(shape, dtype=torch.float32, device=self.operands[0].device)
