"""The calls that `kvbind bench kernels` measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from kvbind.bench.harness.operands import Size
from kvbind.forms.evaluate import Form
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import RUNGS, lact_llm, ladder, linear_attention

What = Literal["targets", "token", "lengths", "chunks", "widths", "first", "compiled"]

WHATS: tuple[What, ...] = ("targets", "token", "lengths", "chunks", "widths", "first", "compiled")
"""The parts of the benchmark, in the order in which "all" takes them."""

By = Literal["kvbind", "pytorch", "compiled", "fla", "sdpa"]

BY: dict[By, str] = {
    "kvbind": "kernels",
    "pytorch": "PyTorch",
    "compiled": "compiled",
    "fla": "fla",
    "sdpa": "softmax",
}
"""Who computes, and what tables call it: `ttt` as it comes; `ttt` without kernels; that under `torch.compile`;
`chunk_linear_attn` of flash-linear-attention; `scaled_dot_product_attention`, on a GPU its flash backend."""

PASSES = ("forward", "training")


@dataclass(frozen=True)
class SpeedCase:
    """One call to measure; plain data.

    Attributes:
        what: the part of the benchmark.
        name: a rung of the LaCT language model's ladder, "linear_attention" (token visibility) or "softmax_attention".
        by: who computes it.
        form: of `ttt`.
        batch: sequences.
        tokens: per sequence.
        heads: fast heads.
        width: channels of keys, values and the hidden layer, per head.
        chunk: tokens in a chunk.
        dtype: of q, k, v and Newton-Schulz.
        graph: also time replays of a CUDA graph.
    """

    what: What
    name: str
    by: By
    form: Form
    batch: int
    tokens: int
    heads: int
    width: int
    chunk: int
    dtype: str
    graph: bool = True

    @staticmethod
    def of(data: Mapping[str, Any]) -> SpeedCase:
        """What `asdict` made."""
        return SpeedCase(**data)

    @property
    def size(self) -> Size:
        """The sizes of the call."""
        return self.size_at(self.tokens)

    def size_at(self, tokens: int) -> Size:
        """The sizes with another number of tokens."""
        return Size(self.batch, tokens, self.heads, self.width)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @cached_property
    def spec(self) -> InnerLoop:
        """The inner loop."""
        if self.name == "linear_attention":
            return linear_attention(self.chunk)
        return ladder(lact_llm(self.chunk).replace(orthogonalize=NewtonSchulz(dtype=self.torch_dtype)))[self.name]


@dataclass(frozen=True)
class SpeedSettings:
    """The call that everything is measured at or around.

    Attributes:
        size: of the call.
        chunk: tokens in a chunk.
        dtype: of q, k, v and Newton-Schulz.
        rungs: of the ladder, by name.
    """

    size: Size
    chunk: int
    dtype: str
    rungs: tuple[str, ...] = tuple(RUNGS)


def plan(what: Sequence[What], settings: SpeedSettings) -> list[SpeedCase]:
    """The cases of some parts of the benchmark, in order.

    - targets: every rung in every form, first with kernels, then softmax attention, then without kernels.
    - token: linear attention under token visibility at three widths of the same total, then two peers.
    - lengths: from 1/16 to 16 times the tokens; without kernels, and softmax attention, up to 4 times.
    - chunks: from 1/8 to twice the chunk.
    - widths: from 1/6 to 4/3 of the width, with as many heads as keep the total.
    - first: first calls in fresh processes.
    - compiled: the rungs that have a parallel form in it, and then the others, without kernels under `torch.compile`.
    """
    size, chunk = settings.size, settings.chunk

    def case(
        part: What, name: str, by: By, form: Form, at: Size = size, chunk: int = chunk, graph: bool = True
    ) -> SpeedCase:
        return SpeedCase(part, name, by, form, at.batch, at.tokens, at.heads, at.width, chunk, settings.dtype, graph)

    def fastest(name: str) -> Form:
        return "recurrent" if parallel_obstacles(case("targets", name, "kvbind", "auto").spec) else "parallel"

    # one rung of each kind: neither form nor features shared, features frozen, none
    kinds = [name for name in ("rung0", "rung2", "rung6") if name in settings.rungs]
    widths = [size.width * part // 6 for part in (1, 2, 3, 4, 6, 8)]
    shapes = [
        replace(size, heads=size.heads * size.width // width, width=width)
        for width in widths
        if width and size.heads * size.width % width == 0
    ]
    cases = []
    for part in what:
        if part == "targets":
            forms: list[Form] = ["recurrent", "parallel"]
            every = [(name, form) for name in settings.rungs for form in forms if form in ("recurrent", fastest(name))]
            cases += [case(part, name, "kvbind", form) for name, form in every]
            cases.append(case(part, "softmax_attention", "sdpa", "auto"))
            cases += [case(part, name, "pytorch", form) for name, form in every]
        elif part == "token":
            found = shapes[1], shapes[0], shapes[3]
            # each write is a chunk of its own: the system as it is named
            cases += [case(part, "linear_attention", "kvbind", "parallel", at, 1) for at in found]
            cases += [case(part, "softmax_attention", "sdpa", "auto", at) for at in found]
            cases += [case(part, "linear_attention", "fla", "parallel", at, 1) for at in found]
        elif part == "lengths":
            for power in range(-4, 5):
                at = replace(size, tokens=max(1, int(size.tokens * 2.0**power)))
                cases += [case(part, name, "kvbind", fastest(name), at) for name in kinds]
                if "rung2" in kinds and power <= 2:
                    cases.append(case(part, "rung2", "pytorch", "parallel", at))
                if power <= 2:
                    # beyond, one training call takes seconds
                    cases.append(case(part, "softmax_attention", "sdpa", "auto", at, graph=False))
        elif part == "chunks":
            for power in range(-3, 2):
                length = max(1, int(chunk * 2.0**power))
                cases += [case(part, name, "kvbind", fastest(name), chunk=length, graph=False) for name in kinds]
                if "rung2" in kinds:
                    cases.append(case(part, "rung2", "pytorch", "parallel", chunk=length, graph=False))
        elif part == "widths":
            for at in shapes:
                cases += [case(part, name, "kvbind", fastest(name), at, graph=False) for name in kinds]
        elif part == "first":
            cases += [case(part, name, "kvbind", fastest(name)) for name in reversed(kinds) if name != "rung6"]
        elif part == "compiled":
            # a loop over chunks takes a compiler longest
            names = sorted(settings.rungs, key=lambda name: fastest(name) == "recurrent")
            cases += [case(part, name, "compiled", fastest(name)) for name in names]
    return cases
