"""Meshes for a number of GPUs, each with its memory, communication and time, the fastest that fits first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvbind.forms.obstacles import parallel_obstacles
from kvbind.hardware import Accelerator
from kvbind.plan.calibration import Calibration
from kvbind.plan.costs import Memory, Mesh, PlannedTraining, Seconds, StepTraffic, host_bytes, memory, seconds, traffic

RESERVE = 0.1
"""The part of a GPU's memory that is left for the driver, for communication, and for what the allocator cannot use."""


@dataclass(frozen=True)
class Option:
    """One way to train a job.

    Attributes:
        job: with the sequences of a step that this mesh needs at the least.
        mesh: replicate, shard and sequence.
        memory: of one GPU, bytes.
        traffic: of one GPU and step, bytes.
        seconds: of a step.
        mfu: model FLOPs of a step over what the GPUs could do in its time.
        fits: whether memory is enough.
    """

    job: PlannedTraining
    mesh: Mesh
    memory: Memory
    traffic: StepTraffic
    seconds: Seconds
    mfu: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.tokens_per_step / self.seconds.total

    @property
    def passes(self) -> int:
        """Forward and backward passes of a data rank in a step."""
        return self.job.batch // self.mesh.data

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "mesh": asdict(self.mesh),
            "gpus": self.mesh.gpus,
            "length": self.job.length,
            "sequences_per_step": self.job.batch,
            "tokens_per_gpu": self.job.length / self.mesh.sequence,
            "passes": self.passes,
            "recompute": self.job.recompute,
            "fits": self.fits,
            "host_bytes": host_bytes(self.job, self.mesh),
            "memory_bytes": {"total": self.memory.total, **asdict(self.memory)},
            "received_bytes_per_step": {"total": self.traffic.total, **asdict(self.traffic)},
            "seconds_per_step": {"total": self.seconds.total, **asdict(self.seconds)},
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "overrides": overrides(self),
        }


@dataclass(frozen=True)
class MeshPlan:
    """What was found for a number of GPUs.

    Attributes:
        options: the fastest that fits first, then what does not fit.
        hardware: of all GPUs.
        efficiency: at which products go, and the measured point that it is from.
        measured_as: that point's key.
        warnings: what a reader should know.
    """

    options: tuple[Option, ...]
    hardware: Accelerator
    efficiency: float
    measured_as: str
    warnings: tuple[str, ...]


def plan(job: PlannedTraining, gpus: int, name: str, hardware: Accelerator, calibration: Calibration) -> MeshPlan:
    """Plan the training of `job`.

    Args:
        job: what is trained; a mesh with more data ranks than it has sequences in a step gets as many sequences.
        gpus: how many.
        name: of the accelerator.
        hardware: the accelerator.
        calibration: measured efficiencies.
    """
    efficiency, measured_as = calibration.efficiency_for(name, job.rung, job.form)
    block = calibration.block_bytes
    options = []
    for mesh in meshes(gpus, hardware.node):
        own = job
        if own.batch % mesh.data:
            own = replace(own, batch=-(-own.batch // mesh.data) * mesh.data)
        if own.obstacle(mesh) is not None:
            continue
        held = memory(own, mesh, block)
        took = seconds(own, mesh, hardware, efficiency, calibration.shown)
        flops = sum(own.flops.values()) * own.batch
        mfu = flops / (took.total * gpus * hardware.flops)
        options.append(Option(own, mesh, held, traffic(own, mesh), took, mfu, held.total <= (1 - RESERVE) * hardware.memory))
    # what asks for more sequences than were wanted comes behind what does not
    options.sort(key=lambda o: (not o.fits, o.job.batch > job.batch, -o.tokens_per_second, o.mesh.sequence))
    return MeshPlan(
        tuple(options), hardware, efficiency, measured_as, _warnings(job, options[0], name, calibration, measured_as)
    )


def meshes(gpus: int, node: int) -> Iterator[Mesh]:
    """The meshes worth looking at: every way to cut sequences, weights whole, sharded in a node, or over all data ranks."""
    for sequence in (n for n in range(1, gpus + 1) if gpus % n == 0):
        data = gpus // sequence
        in_node = next(n for n in range(min(data, max(1, node // sequence)), 0, -1) if data % n == 0)
        for shard in sorted({1, in_node, data}):
            yield Mesh(data // shard, shard, sequence)


def overrides(option: Option) -> list[str]:
    """The edits of a configuration of `kvbind train language` that this option is."""
    job, mesh = option.job, option.mesh
    edits = [
        f"data.length={job.length}",
        f"data.batch={mesh.data}",
        f"train.accumulate={option.passes}",
        f"train.activation_checkpointing={job.recompute}",
        f"train.gather={'float32' if job.gather_bytes == 4 else 'bfloat16'}",
    ]
    if mesh.gpus > 1:
        edits.append(f"train.parallel.strategy={'fsdp' if mesh.weights > 1 else 'ddp'}")
        edits += [f"train.parallel.shard={mesh.shard}", f"train.parallel.sequence={mesh.sequence}"]
    return edits


def _warnings(job: PlannedTraining, best: Option, name: str, calibration: Calibration, measured_as: str) -> tuple[str, ...]:
    found = []
    if not best.fits:
        found.append(
            "no mesh of so many GPUs fits: use more GPUs, recompute blocks (offload keeps least), or shorten sequences"
        )
    if job.recompute == "offload":
        held = host_bytes(best.job, best.mesh) / 2**30
        found.append(f"each GPU keeps {held:.0f} GiB of block inputs in pinned memory of its host")
    if best.job.batch > job.batch:
        found.append(f"the mesh needs {best.job.batch} sequences in a step, more than the {job.batch} that were asked for")
    if job.form == "recurrent" and best.mesh.sequence > 1:
        edits = {key: value for obstacle in parallel_obstacles(job.config.inner) for key, value in obstacle.edit.items()}
        words = " ".join(f"model.inner.{key}={str(value).lower()}" for key, value in edits.items())
        hint = f"; with {words} it has a parallel form" if words else ""
        found.append(f"along a sequence, ranks wait for each other's fast weights in the recurrent form{hint}")
    if measured_as.split(" ") != [name, job.rung, job.form]:
        found.append(f"no step of this inner loop was measured on {name}: the efficiency is that of {measured_as}")
    points = [point for point in calibration.points if point.key == measured_as]
    if all(point.preset != job.preset for point in points):
        found.append("the efficiency was measured with another size of the model")
    if all(point.recompute != job.recompute for point in points):
        found.append(f"no step with {job.recompute!r} recomputation was measured: its time and memory are by formulas alone")
    least = min(point.length / point.mesh[2] for point in points)
    local = best.job.length / best.mesh.sequence
    if local < least:
        found.append(
            f"each GPU gets {local:.0f} tokens at a time, fewer than in any measured step ({least:.0f}): it will be slower"
        )
    return tuple(found)
