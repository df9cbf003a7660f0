"""Speed and memory of one call: forward and in training, plain and as a CUDA graph."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvbind.bench.harness.device_time import duration, first_line
from kvbind.bench.harness.kernel_switch import operators_of, without_kernels
from kvbind.bench.harness.named_operands import Leaves, draw_leaves, in_precision, run
from kvbind.bench.harness.timing import Work, now, peak_bytes
from kvbind.bench.kernels.cases import PASSES, SpeedCase


def measure(case: SpeedCase, device: torch.device, seconds: float) -> dict[str, Any]:
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


def works(case: SpeedCase, device: torch.device) -> tuple[Work, Work, dict[str, Any]]:
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


def _attention(case: SpeedCase, device: torch.device) -> tuple[Work, Work, dict[str, Any]]:
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
