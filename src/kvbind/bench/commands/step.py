"""`kvbind bench step`: training steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, known_preset, open_device
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model: tiny, 30m, 125m, 760m or 3b.")] = "tiny",
    tokens: Annotated[int | None, typer.Option(help="Tokens per sequence; default what the preset trains at.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps, after one to warm up.")] = 4,
    profile: Annotated[bool, typer.Option("--profile", help="Also say where a step's time on a GPU goes.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time a training step of rung 0 and rung 2, recurrent and parallel."""
    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.tables.layers import step_grids
    from kvbind.bench.training.steps import bench_step
    from kvbind.inner.systems import ladder
    from kvbind.models import PRESETS

    place, sizes = open_device(device), PRESETS[known_preset(preset)]
    length = tokens or sizes["max_position_embeddings"]
    rungs = ladder(sizes["inner"])
    cases = {
        "rung0": (rungs["rung0"], "recurrent"),
        "rung2": (rungs["rung2"], "recurrent"),
        "rung2 parallel": (rungs["rung2"], "parallel"),
    }
    if profile and place.type != "cuda":
        raise typer.BadParameter(f"profile is of a GPU's kernels; the device is {place}")
    rows = map(asdict, bench_step(preset, cases, length, place, steps=steps, profile=profile))
    config = {"preset": preset, "tokens": length, "steps": steps}
    about = provenance(place, ("triton",)) | {"config": config, "device": str(place)}
    record = write_growing(growing(about, len(cases), rows), out)
    for grid in step_grids(record):
        show_grid(grid)
    say_written(out)
