"""`kvbind bench step`: training of the LaCT language model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvbind.bench.harness.profiler import launches, summary
from kvbind.bench.harness.timing import now
from kvbind.inner.spec import InnerLoop
from kvbind.models import PRESETS, LactConfig, LactForCausalLM
from kvbind.precision import matmul_precision


def build(preset: str, device: torch.device, dtype: torch.dtype, **fields: Any) -> LactForCausalLM:
    """A model of a preset's size with random weights.

    Args:
        preset: a name in `kvbind.models.PRESETS`.
        device: where it lives.
        dtype: of its parameters.
        **fields: of `LactConfig`, in place of the preset's.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = LactForCausalLM(LactConfig(**{**PRESETS[preset], **fields}))
    return nn.Module.to(model, dtype)


@dataclass(frozen=True)
class TimedStep:
    """One training step of one inner loop in one form.

    Attributes:
        rung: of the ladder.
        form: "recurrent" or "parallel".
        tokens_per_second: median over the measured steps, the optimizer's included.
        peak_bytes: the most memory held at once, parameters and optimizer included; None on a CPU.
        loss: after the measured steps, on the same random tokens.
        profile: of one more step, `kvbind.bench.kernels.profiles.summary`; None where none was asked for.
    """

    rung: str
    form: str
    tokens_per_second: float
    peak_bytes: int | None
    loss: float
    profile: dict[str, Any] | None = None


def bench_step(
    preset: str,
    rungs: dict[str, tuple[InnerLoop, str]],
    length: int,
    device: torch.device,
    *,
    steps: int = 4,
    profile: bool = False,
) -> Iterator[TimedStep]:
    """Time training steps of AdamW under bfloat16 autocast on a GPU (float32 on a CPU), one sequence per step.

    Blocks are checkpointed; matrix products of float32 operands may use TF32.

    Args:
        preset: a name in `kvbind.models.PRESETS`.
        rungs: by row name, the inner loop and the form that evaluates it.
        length: tokens per sequence.
        device: where to run.
        steps: measured, after one to warm up.
        profile: also profile one; on a GPU.
    """
    for name, (inner, form) in rungs.items():
        with matmul_precision("high"):
            model = build(preset, device, torch.float32, inner=inner, ttt_form=form).train()
            # transformers renamed it in 5.23
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            row = _steps(name, form, model, length, device, steps, profile)
            del model
        yield row


def _steps(
    name: str, form: str, model: nn.Module, length: int, device: torch.device, steps: int, profile: bool
) -> TimedStep:
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(1 + steps):
        start = now(device)
        step()
        times.append(now(device) - start)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    last = float(loss.detach())
    spent = summary(launches(step, device, calls=1), 1) if profile else None
    return TimedStep(name, form, length / statistics.median(times[1:]), peak, last, spent)
