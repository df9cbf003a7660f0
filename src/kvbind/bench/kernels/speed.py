"""`kvbind bench kernels`: speed and memory of `ttt` with kernels, beside PyTorch's forms, other libraries and the limit.

Everything is measured through `kvbind.ttt`; the environment variable `KVBIND_KERNELS` alone decides what runs inside.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvbind.bench.harness.ceilings import Ceilings, attention_work, forward_work, measure_ceilings, training_work
from kvbind.bench.harness.device_time import duration, first_line
from kvbind.bench.harness.fresh_process import in_fresh_process
from kvbind.bench.harness.kernel_switch import operators_of, without_kernels
from kvbind.bench.harness.named_operands import Leaves, draw_leaves, in_precision, run
from kvbind.bench.harness.operands import Size
from kvbind.bench.harness.record import growing, provenance
from kvbind.bench.harness.timing import Work, now, peak_bytes
from kvbind.bench.kernels.goals import SOURCE, goal_of
from kvbind.forms import fla
from kvbind.forms.analysis import parallel_obstacles
from kvbind.forms.api import Form
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
class Case:
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
    def of(data: Mapping[str, Any]) -> Case:
        """What `asdict` made."""
        return Case(**data)

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
class Settings:
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


def plan(what: Sequence[What], settings: Settings) -> list[Case]:
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

    def case(part: What, name: str, by: By, form: Form, at: Size = size, chunk: int = chunk, graph: bool = True) -> Case:
        return Case(part, name, by, form, at.batch, at.tokens, at.heads, at.width, chunk, settings.dtype, graph)

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


def bench_kernels(
    cases: Sequence[Case],
    ceilings: Ceilings,
    device: torch.device,
    *,
    seconds: float = 0.2,
    compile_limit: float = 60.0,
    deadline: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Measure cases one after another; those left when `deadline` passes are not measured.

    Args:
        cases: from `plan`.
        ceilings: of this device.
        device: where to run.
        seconds: how long to time each pass, and each again as a graph.
        compile_limit: seconds after which a process of its own is given up on: each first call, `torch.compile` and fla.
        deadline: by `time.monotonic`.

    Yields:
        A row for each case: its fields, what was measured, and under "error" why something was not. Rates are in
        Mtok/s, TFLOP/s and TB/s; `of_limit` is a pass's shortest possible time (`ceilings`) over its own.
    """
    for case in cases:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        try:
            if case.what == "first":
                row = first_call_row(case, device, min(left, compile_limit))
            elif case.by in ("compiled", "fla"):
                # both compile for long at first, and nothing here can stop them
                release()
                fields = {"case": asdict(case), "device": str(device), "seconds": seconds}
                row = in_fresh_process("measured", fields, {"KVBIND_KERNELS": "0"}, min(left, compile_limit))
            else:
                row = measure(case, device, seconds)
        except Exception as problem:  # one case that fails must not stop the others
            row = asdict(case) | {"error": first_line(problem)}
        release()
        yield with_rates(row, ceilings)


def measured(
    what: Sequence[What], settings: Settings, device: torch.device, *, seconds: float, compile_limit: float, budget: float
) -> Iterator[dict[str, Any]]:
    """Measure parts of the benchmark; the record as it is `growing`.

    Args:
        what: parts, as `plan` takes them.
        settings: what to measure at.
        device: where to run.
        seconds: as `bench_kernels` takes it.
        compile_limit: as `bench_kernels` takes it.
        budget: seconds after which no further row is begun. The record then says `complete: false`.
    """
    deadline = time.monotonic() + budget
    dtype = getattr(torch, settings.dtype)
    cases, ceilings = plan(what, settings), measure_ceilings(device, dtype)
    about = provenance(device, ("triton", *fla.PACKAGES)) | {
        "config": asdict(settings.size) | {"chunk": settings.chunk, "dtype": settings.dtype, "what": list(what)},
        "goals": SOURCE,
        "ceilings": asdict(ceilings),
    }
    rows = bench_kernels(cases, ceilings, device, seconds=seconds, compile_limit=compile_limit, deadline=deadline)
    return growing(about, len(cases), rows)


def release() -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time a case and count its memory: the fields of its row.

    A pass that fails leaves its reason under "error" and the other pass's numbers.
    """
    row: dict[str, Any] = asdict(case)
    with nullcontext() if case.by == "kvbind" else without_kernels():
        forward, training, facts = works(case, device)
        row |= facts
        if case.by == "compiled":
            begin = now(device)
            forward()
            training()
            row["compile_seconds"] = now(device) - begin
        ran: set[str] = set()
        before = _allocated(device)
        for name, work in zip(PASSES, (forward, training), strict=True):
            try:
                # first calls compile and tune, second calls may capture graphs
                if case.by == "kvbind":
                    ran.update(operators_of(work))
                work()
                kept = _allocated(device) - before
                held = kept + peak_bytes(work, device)
                timed = duration(work, device, seconds=seconds, graph=case.graph and case.by != "compiled")
            except Exception as problem:  # out of memory in training leaves the forward pass's numbers
                row["error"] = f"{name}: {first_line(problem)}"
                break
            row[name] = asdict(timed) | {"peak_bytes": held}
        row["operators"] = sorted(ran)
    return row


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def works(case: Case, device: torch.device) -> tuple[Work, Work, dict[str, Any]]:
    """A forward pass without gradients; a forward and backward pass with those of every leaf; facts for the row."""
    if case.by == "sdpa":
        return _attention(case, device)
    wide = torch.float32
    leaves = in_precision(draw_leaves(case.spec, case.size, device), case.torch_dtype, wide)
    if case.by == "fla":
        leaves = {name: leaves[name] for name in ("q", "k", "v")}

    def read(leaves: Leaves) -> Tensor:
        if case.by != "fla":
            return run(case.spec, leaves, case.form)[0]
        from fla.ops.linear_attn import chunk_linear_attn

        output: Tensor = chunk_linear_attn(leaves["q"], leaves["k"], leaves["v"], scale=1.0, normalize=False)[0]
        return output

    if case.by == "compiled":
        read = torch.compile(read)
    facts = {"operand_bytes": sum(x.nbytes for x in leaves.values())}
    return *passes(read, leaves), facts


def passes(read: Any, leaves: Leaves) -> tuple[Work, Work]:
    """The two passes of a function of leaves that gives one output."""
    wanted = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    slope: list[Tensor] = []

    def forward() -> object:
        with torch.no_grad():
            return read(leaves)

    def training() -> object:
        y = read(wanted)
        if not slope:
            slope.append(torch.ones_like(y))
        return torch.autograd.grad(y, list(wanted.values()), slope[0], allow_unused=True)

    return forward, training


def _attention(case: Case, device: torch.device) -> tuple[Work, Work, dict[str, Any]]:
    """Causal softmax attention with heads of the case's width, or else of the next narrower that the backend takes."""
    total, refused = case.heads * case.width, []
    backend = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext

    def read(leaves: Leaves) -> Tensor:
        with backend():
            return F.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], is_causal=True)

    for width in sorted({w for w in range(8, case.width + 1, 8) if total % w == 0} | {case.width}, reverse=True):
        shape = (case.batch, total // width, case.tokens, width)
        small = {name: torch.randn(*shape[:2], 16, width, device=device).to(case.torch_dtype) for name in ("q", "k", "v")}
        try:
            passes(read, small)[1]()
        except RuntimeError:
            refused.append(width)
            continue
        leaves = {name: torch.randn(shape, device=device).to(case.torch_dtype) for name in ("q", "k", "v")}
        facts = {"heads": total // width, "width": width, "refused_widths": refused}
        return *passes(read, leaves), facts | {"operand_bytes": sum(x.nbytes for x in leaves.values())}
    raise RuntimeError(f"no head width up to {case.width} is supported")


def first_call_row(case: Case, device: torch.device, limit: float) -> dict[str, Any]:
    """First calls in two fresh processes that share a cache of compiled kernels: empty for one, filled for the next."""
    release()
    fields = {"case": asdict(case), "device": str(device)}
    row: dict[str, Any] = asdict(case)
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            row[state] = in_fresh_process("first_calls", fields, {"TRITON_CACHE_DIR": cache}, limit)
    return row


def with_rates(row: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """A row with what follows from its times: rates, the part of the limit reached, and measured over goal."""
    if not any(name in row for name in PASSES):
        return row
    case = Case.of({name: row[name] for name in Case.__dataclass_fields__})
    size, dtype = case.size, case.torch_dtype
    if case.by == "sdpa":
        needs = dict(zip(PASSES, attention_work(size, dtype), strict=True))
    else:
        forward = forward_work(case.spec, size, dtype)
        needs = {"forward": forward, "training": training_work(forward, size, dtype)}
    goal = goal_of(case.name, case.form, size, case.chunk, case.dtype) if case.by == "kvbind" else None
    tokens, row = size.batch * size.tokens, dict(row)
    for name, need in needs.items():
        if name not in row:
            continue
        timed, aim = row[name], getattr(goal, name, None)
        taken, graph = timed["seconds"], timed["graph_seconds"]
        row[name] = timed | {
            "mtok_per_s": tokens / taken / 1e6,
            "graph_mtok_per_s": None if graph is None else tokens / graph / 1e6,
            "tflop_per_s": need.flops / taken / 1e12,
            "tb_per_s": need.bytes / taken / 1e12,
            "limit_mtok_per_s": tokens / need.limit(ceilings) / 1e6,
            "of_limit": need.limit(ceilings) / taken,
            "goal_mtok_per_s": aim,
            "of_goal": None if aim is None else tokens / taken / 1e6 / aim,
            "peer_mtok_per_s": getattr(goal, f"peer_{name}", None),
        }
    return row
