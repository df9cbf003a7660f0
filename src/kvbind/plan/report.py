"""A plan in words: for a terminal, and as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvbind.plan.calibration import Calibration
from kvbind.plan.planner import RESERVE, MeshPlan, Option, overrides
from kvbind.screen import GAP, column_groups, duration

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """How long training goes on, and what an hour of a GPU costs.

    Attributes:
        tokens: in all.
        price: of an hour of one GPU, in whatever currency; None for none.
    """

    tokens: float
    price: float | None = None

    def of(self, option: Option) -> dict[str, float | None]:
        """Days, hours of GPUs, and their price."""
        hours = self.tokens / option.tokens_per_second / 3600
        gpu_hours = hours * option.mesh.gpus
        return {
            "days": hours / 24,
            "gpu_hours": gpu_hours,
            "cost": None if self.price is None else self.price * gpu_hours,
        }


HEADER = (
    "GPUs", "replicate x shard x sequence", "sequences/step", "tokens/GPU", "GiB", "GB received", "time/step", "tokens/s",
    "MFU", "total", "GPU hours",
)  # fmt: skip


LABELS = 2
"""The columns of `HEADER` that say which option a row is."""


def cells(option: Option, budget: Budget) -> list[str]:
    """A row under `HEADER`."""
    mesh, spent = option.mesh, budget.of(option)
    days, hours = spent["days"] or 0.0, spent["gpu_hours"] or 0.0
    return [
        str(mesh.gpus),
        f"{mesh.replicate} x {mesh.shard} x {mesh.sequence}",
        str(option.job.batch),
        f"{option.job.length // mesh.sequence}",
        f"{option.memory.total / GIB:.1f}" + ("" if option.fits else " (does not fit)"),
        f"{option.traffic.total / 1e9:.2f}",
        duration(option.seconds.total),
        f"{option.tokens_per_second:,.0f}",
        f"{option.mfu:.1%}",
        duration(86_400 * days),
        f"{hours:,.{0 if hours >= 10 else 2}f}" + ("" if spent["cost"] is None else f" ({spent['cost']:,.0f})"),
    ]


PARTS_HEADER = (
    "GPUs", "replicate x shard x sequence", "sequences/step", "tokens/GPU", "weights, gradients, optimizer", "gathered",
    "activations", "GiB in all", "GB for weights", "GB for the sequence", "time/step", "tokens/s", "MFU", "total",
)  # fmt: skip


def parts_cells(option: Option, budget: Budget) -> tuple[str, ...]:
    """A row under `PARTS_HEADER`; memory in GiB of one GPU, traffic in GB that one GPU receives in a step."""
    mesh, held, sent = option.mesh, option.memory, option.traffic
    memory = (
        held.weights + held.gradients + held.optimizer,
        held.gathered,
        held.kept + held.block + held.states + held.halo + held.logits,
        held.total,
    )
    days = budget.of(option)["days"] or 0.0
    return (
        str(mesh.gpus),
        f"{mesh.replicate} x {mesh.shard} x {mesh.sequence}",
        str(option.job.batch),
        f"{option.job.length // mesh.sequence:,}",
        *(f"{part / GIB:.2f}" for part in memory),
        f"{(sent.gather + sent.scatter + sent.reduce) / 1e9:.2f}",
        f"{(sent.states + sent.halo) / 1e9:.2f}",
        duration(option.seconds.total),
        f"{option.tokens_per_second:,.0f}",
        f"{option.mfu:.1%}",
        duration(86_400 * days),
    )


def show(
    plans: list[MeshPlan], title: str, budget: Budget, calibration: Calibration, command: str, console: Console
) -> None:
    """Draw plans: of one number of GPUs its options, of several the best of each; then the best in detail.

    Args:
        plans: one per number of GPUs.
        title: what is trained.
        budget: tokens and price.
        calibration: where efficiencies are from.
        command: of training, to which overrides are added.
        console: what to draw on.
    """
    options = [plan.options[0] for plan in plans] if len(plans) > 1 else list(plans[0].options[:6])
    rows = [cells(option, budget) for option in options]
    header = HEADER if budget.price is None else (*HEADER[:-1], "GPU hours (price)")
    console.print(title, style="italic", soft_wrap=True)
    # where the terminal is narrow, columns go below others
    for group in column_groups(header, rows, console.width - GAP, left=LABELS):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        cramped = sum(max(len(row[i]) for row in (header, *rows)) + GAP for i in group) > console.width - GAP
        for column in group:
            name = header[column]
            least = max(map(len, (*(row[column] for row in rows), *name.split())))
            # rich narrows columns of even width by turns, and would stop before all names are broken
            table.add_column(name, justify="right", overflow="fold", min_width=least, width=least if cramped else None)
        for option, row in zip(options, rows, strict=True):
            table.add_row(*(row[column] for column in group), style=None if option.fits else "dim")
        console.print(table, crop=False)
    for plan in plans:
        if len(plans) > 1:
            console.print(_counted(plan.options[0].mesh.gpus), style="bold")
        else:
            _detail(plan, console)
        console.print(launch(plan, command), style="green", markup=False, soft_wrap=True)
        for warning in plan.warnings:
            console.print("note: ", style="yellow", end="")
            console.print(warning, markup=False, soft_wrap=True)
    console.print(f"calibration: {calibration.summary()}", soft_wrap=True)


def _counted(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"


def _detail(plan: MeshPlan, console: Console) -> None:
    """Where the best option's memory, time and traffic go."""
    best = plan.options[0]
    held = ", ".join(f"{part.name} {getattr(best.memory, part.name) / GIB:.2f}" for part in fields(best.memory))
    console.print(f"memory, GiB per GPU of {plan.hardware.memory * (1 - RESERVE) / GIB:.0f} to use: {held}", soft_wrap=True)
    took = ", ".join(f"{part.name} {duration(getattr(best.seconds, part.name))}" for part in fields(best.seconds))
    console.print(f"time of a step: {took}", soft_wrap=True)
    if best.mesh.gpus > 1:
        names = ("gather", "scatter", "reduce", "states", "halo")
        sent = ", ".join(f"{name} {getattr(best.traffic, name) / 1e9:.3f}" for name in names)
        console.print(f"GB received per GPU and step: {sent}", soft_wrap=True)
    if best.mesh.sequence > 1:
        console.print(
            f"along the sequence {best.traffic.per_layer / 1e6:.1f} MB per layer, forward and backward, whatever its length"
        )


def launch(plan: MeshPlan, command: str) -> str:
    """The command line that trains as the best option of a plan says."""
    best, node = plan.options[0], plan.hardware.node
    words = f"{command} {' '.join(overrides(best))}"
    gpus = best.mesh.gpus
    if gpus == 1:
        return words
    nodes = -(-gpus // node)
    if nodes == 1:
        return f"torchrun --standalone --nproc-per-node {gpus} -m {words}"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun --nnodes {nodes} --nproc-per-node {-(-gpus // nodes)} {rendezvous} -m {words}"


def as_data(plans: list[MeshPlan], budget: Budget, calibration: Calibration) -> dict[str, Any]:
    """Plans as plain data."""
    return {
        "budget": {"tokens": budget.tokens, "price": budget.price},
        "calibration": {
            "summary": calibration.summary(),
            "efficiency": calibration.efficiency,
            "block_bytes": calibration.block_bytes,
            "exposed": calibration.exposed,
            "errors": [{"tokens_per_second": speed, "peak_bytes": held} for speed, held in calibration.errors()],
        },
        "plans": [
            {
                "gpus": plan.options[0].mesh.gpus,
                "hardware": plan.hardware.title,
                "efficiency": plan.efficiency,
                "measured_as": plan.measured_as,
                "warnings": list(plan.warnings),
                "options": [option.as_data() | {"budget": budget.of(option)} for option in plan.options],
            }
            for plan in plans
        ],
    }
