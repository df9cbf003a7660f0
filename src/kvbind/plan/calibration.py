"""What formulas leave open, from measured points: efficiencies, bytes of a block, how much of communication shows.

`read_points` takes results of `kvbind bench step`, `scaling` and `models`; `kvbind plan --calibrate` writes what
`calibrate` finds to `calibration.json` beside this file, with every point and how far the formulas are from it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvbind.files import blaming, read_json
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.hardware import ACCELERATORS, recognized
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import ladder
from kvbind.models import PRESETS, LactConfig
from kvbind.plan.costs import Mesh, PlannedTraining, memory, seconds
from kvbind.train.files import laid_out, write_text

SHIPPED = Path(__file__).parent / "calibration.json"

TRAINED = "lact-760m-"
"""What the rows of `kvbind bench models` are called that train a whole language model; a rung follows."""

BLOCK_BYTES = 1.0
"""A first value for `memory`'s argument: with two of them the rest follows, as memory is linear in it."""


@dataclass(frozen=True)
class MeasuredPoint:
    """One measured training step.

    Attributes:
        source: the file of results.
        hardware: the accelerator, by name.
        preset: the model's size.
        rung: of the ladder.
        form: "parallel" or "recurrent".
        length: tokens in a sequence.
        batch: sequences in a step.
        recompute: as in `PlannedTraining`.
        gather_bytes: as in `PlannedTraining`.
        mesh: replicate, shard and sequence.
        tokens_per_second: of all GPUs.
        peak_bytes: of the fullest GPU; None where it was not measured.
    """

    source: str
    hardware: str
    preset: str
    rung: str
    form: str
    length: int
    batch: int
    recompute: str
    gather_bytes: int
    mesh: tuple[int, int, int]
    tokens_per_second: float
    peak_bytes: int | None

    @property
    def on(self) -> Mesh:
        """The mesh as one."""
        return Mesh(*self.mesh)

    @cached_property
    def job(self) -> PlannedTraining:
        """What was trained."""
        config = LactConfig(**{**PRESETS[self.preset], "inner": rung_of(self.preset, self.rung), "ttt_form": self.form})
        return PlannedTraining(
            config,
            self.length,
            self.batch,
            recompute=self.recompute,
            gather_bytes=self.gather_bytes,
            preset=self.preset,
            rung=self.rung,
        )

    @property
    def key(self) -> str:
        """What has an efficiency of its own."""
        return efficiency_key(self.hardware, self.rung, self.form)


def efficiency_key(hardware: str, rung: str, form: str) -> str:
    """The name under which a calibration holds an efficiency."""
    return f"{hardware} {rung} {form}"


def rung_of(preset: str, rung: str) -> InnerLoop:
    """The inner loop of a rung of a preset's ladder."""
    return ladder(PRESETS[preset]["inner"])[rung]


def rung_name(preset: str, inner: InnerLoop) -> str:
    """The rung that `inner` is, whatever its chunk, or ""."""
    rungs = ladder(PRESETS[preset]["inner"]) if preset in PRESETS else {}
    return next((name for name, rung in rungs.items() if rung.replace(chunk=inner.chunk) == inner), "")


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        efficiency: fraction of the peak by `efficiency_key`.
        block_bytes: per token and channel, as `memory` takes it.
        exposed: as `seconds` takes it; None where no point had several GPUs.
        points: what it was found from.
    """

    efficiency: dict[str, float]
    block_bytes: float
    exposed: float | None
    points: tuple[MeasuredPoint, ...]

    def efficiency_for(self, hardware: str, rung: str, form: str) -> tuple[float, str]:
        """The efficiency to use, and the key it was measured under: of the nearest point there is.

        Nearest is the same form on the same accelerator; the lowest of several.
        """
        exact = efficiency_key(hardware, rung, form)
        if exact in self.efficiency:
            return self.efficiency[exact], exact
        words = {key: tuple(key.split(" ")) for key in self.efficiency}

        def distance(key: str) -> tuple[bool, bool, bool, float]:
            device, name, shape = words[key]
            return shape != form, name != rung, device != hardware, self.efficiency[key]

        chosen = min(self.efficiency, key=distance)
        return self.efficiency[chosen], chosen

    def predicted(self, point: MeasuredPoint) -> tuple[float, float]:
        """Tokens per second and peak bytes that the formulas give for a measured point."""
        job, mesh = point.job, point.on
        efficiency, _ = self.efficiency_for(point.hardware, point.rung, point.form)
        took = seconds(job, mesh, ACCELERATORS[point.hardware], efficiency, self.shown)
        return job.tokens_per_step / took.total, memory(job, mesh, self.block_bytes).total

    @property
    def shown(self) -> float:
        """`exposed`, or 1 (nothing hidden, at datasheet bandwidth) where it was not measured."""
        return 1.0 if self.exposed is None else self.exposed

    def errors(self) -> list[tuple[float, float | None]]:
        """Of each point, how far tokens per second and peak memory are off, relative to what was measured."""
        found: list[tuple[float, float | None]] = []
        for point in self.points:
            speed, held = self.predicted(point)
            memory_error = None if point.peak_bytes is None else held / point.peak_bytes - 1
            found.append((speed / point.tokens_per_second - 1, memory_error))
        return found

    @property
    def coefficients(self) -> int:
        """How many numbers were fitted to the points' speeds."""
        return len(self.efficiency) + (self.exposed is not None)

    def summary(self) -> str:
        """How far the formulas are off, in a sentence or two."""
        errors, fitted = self.errors(), self.coefficients
        if fitted < len(errors):
            off = max(abs(speed) for speed, _ in errors)
            text = f"speed within {off:.0%} of {len(errors)} measured points, to which {fitted} numbers were fitted"
        else:
            text = f"speed fitted to {len(errors)} measured points with as many numbers, which leaves its error unknown"
        held = [abs(x) for _, x in errors if x is not None]
        if len(held) > 1:
            text += f"; memory within {max(held):.0%} of {len(held)}, to which 1 was"
        if self.exposed is None:
            text += "; no point has several GPUs: communication is at datasheet bandwidth, none of it hidden"
        return text


def read_points(path: Path) -> list[MeasuredPoint]:
    """The measured points of a file of results, of `kvbind bench step`, `kvbind bench scaling` or `kvbind bench models`.

    Raises:
        ValueError: another file, or a device that has no entry in `ACCELERATORS`.
    """
    record = read_json(path, finite=False)
    with blaming(f"calibration files must be results of kvbind bench step, scaling or models; {path}", "such a file"):
        return _points(path.name, record)


def _points(name: str, record: Any) -> list[MeasuredPoint]:
    hardware = recognized(record["machine"]["device"]) if isinstance(record, dict) and "machine" in record else None
    if hardware is None or "rows" not in record:
        raise ValueError(f"there are no rows, or not of one of {', '.join(ACCELERATORS)}")
    config, points = record["config"], []
    for row in record["rows"]:
        if "ours_by" in row:
            points += _language_point(name, hardware, row)
            continue
        if "mesh" in row:
            if row.get("tokens_per_second") is None:
                continue
            mesh = (row["mesh"]["replicate"], row["mesh"]["shard"], row["mesh"]["sequence"])
            named: dict[str, Any] = {key: row[key] for key in ("rung", "form", "length", "batch", "recompute")}
        else:
            mesh = (1, 1, 1)
            named = {
                "rung": row["rung"].split()[0], "form": row["form"], "length": config["tokens"], "batch": 1,
                "recompute": "block",
            }  # fmt: skip
        points.append(
            MeasuredPoint(
                name,
                hardware,
                row.get("preset", config.get("preset")),
                **named,
                gather_bytes=row.get("gather_bytes", 4),
                mesh=mesh,
                tokens_per_second=row["tokens_per_second"],
                peak_bytes=row.get("peak_bytes"),
            )
        )
    return points


def _language_point(name: str, hardware: str, row: dict[str, Any]) -> list[MeasuredPoint]:
    """The point of a row of `kvbind bench models` that trains a whole language model, its blocks kept."""
    if not row["name"].startswith(TRAINED):
        return []
    rung, ours = row["name"].removeprefix(TRAINED), row["ours_ways"][row["ours_by"]]
    form = "recurrent" if parallel_obstacles(rung_of("760m", rung)) else "parallel"
    measured = {"tokens_per_second": ours["per_second"], "peak_bytes": ours["peak_bytes"]}
    return [MeasuredPoint(name, hardware, "760m", rung, form, 32768, 1, "none", 4, (1, 1, 1), **measured)]


def calibrate(points: Sequence[MeasuredPoint]) -> Calibration:
    """Fit the coefficients to measured points.

    An efficiency is the median over the points of one GPU (of the fewest GPUs, where there is none), the bytes of a block
    the median over all points with a peak, the exposed share of communication a least-squares fit to the rest.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points must be at least one measured step; got none")
    keys = dict.fromkeys(point.key for point in points)
    efficiency = {}
    for key in keys:
        own = [point for point in points if point.key == key]
        fewest = min(point.on.gpus for point in own)
        efficiency[key] = statistics.median(_efficiency(point) for point in own if point.on.gpus == fewest)

    block = statistics.median([_block_bytes(point) for point in points if point.peak_bytes is not None] or [BLOCK_BYTES])
    several = [point for point in points if point.on.gpus > 1]
    exposed = _exposed(several, efficiency) if several else None
    return Calibration(efficiency, block, exposed, tuple(points))


def _efficiency(point: MeasuredPoint) -> float:
    """What `seconds` needs as efficiency to give the measured time, communication counted in full."""
    job, hardware = point.job, ACCELERATORS[point.hardware]
    at_one = seconds(job, point.on, hardware, 1.0, 1.0)
    measured = job.tokens_per_step / point.tokens_per_second
    return at_one.compute / max(measured - (at_one.total - at_one.compute), at_one.compute)


def _block_bytes(point: MeasuredPoint) -> float:
    """What `memory` needs as bytes of a block to give the measured peak."""
    job, mesh = point.job, point.on
    none, one = (memory(job, mesh, value).total for value in (0.0, BLOCK_BYTES))
    return max(float(point.peak_bytes or 0) - none, 0.0) / (one - none) * BLOCK_BYTES


def _exposed(points: Iterable[MeasuredPoint], efficiency: dict[str, float]) -> float:
    """The least-squares fit of the share of communication by which steps on several GPUs were longer, relative errors."""
    above = below = 0.0
    for point in points:
        job = point.job
        took = seconds(job, point.on, ACCELERATORS[point.hardware], efficiency[point.key], 1.0)
        measured = job.tokens_per_step / point.tokens_per_second
        sent, rest = (took.weights + took.sequence) / measured, (measured - took.compute - took.optimizer) / measured
        above, below = above + sent * rest, below + sent * sent
    return max(above / below, 0.0) if below else 0.0


def save_calibration(found: Calibration, path: Path = SHIPPED) -> None:
    """Write a calibration as JSON."""
    errors = [{"tokens_per_second": speed, "peak_bytes": held} for speed, held in found.errors()]
    points = [asdict(point) | {"errors": error} for point, error in zip(found.points, errors, strict=True)]
    plain = {
        "efficiency": found.efficiency,
        "block_bytes": found.block_bytes,
        "exposed": found.exposed,
        "points": points,
    }
    write_text(path, laid_out(plain) + "\n")


def load_calibration(path: Path = SHIPPED) -> Calibration:
    """The calibration that `save_calibration` wrote; by default the one this library comes with."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    points = []
    for fields in plain["points"]:
        fields.pop("errors", None)
        points.append(MeasuredPoint(**{**fields, "mesh": tuple(fields["mesh"])}))
    return Calibration(plain["efficiency"], plain["block_bytes"], plain["exposed"], tuple(points))
