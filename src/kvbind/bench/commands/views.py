"""`kvbind bench views`: scenes beside full attention."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, numbers_of, open_device
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    preset: Annotated[str, typer.Option(help="Size of the view synthesis model: tiny, small, 114m, 14x768, ...")] = "114m",
    counts: Annotated[
        str, typer.Option("--views", help="Numbers of input views, separated by commas.")
    ] = "8,16,32,64,128,256",
    size: Annotated[int, typer.Option(min=1, help="Height and width of all images in pixels.")] = 256,
    frames: Annotated[int, typer.Option(min=1, help="Frames rendered in one pass.")] = 8,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each case.")] = 1.0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time reading and rendering scenes, beside the same transformer with full attention to all input views."""
    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.models.views import bench_views
    from kvbind.bench.tables.models import views_grid
    from kvbind.inner.value import nearest
    from kvbind.models.lact_nvs import PRESETS

    if preset not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}{nearest(preset, PRESETS)}")
    if size % PRESETS[preset].patch_size:
        raise typer.BadParameter(f"size must be a multiple of the patches' side, {PRESETS[preset].patch_size}; got {size}")
    place = open_device(device)
    numbers = numbers_of(counts, "views")
    config = {"preset": preset, "size": size, "frames": frames, "dtype": "bfloat16" if place.type == "cuda" else "float32"}
    rows = bench_views(PRESETS[preset], numbers, (size, size), place, frames=frames, seconds=seconds)
    record = write_growing(growing(provenance(place) | {"config": config}, 2 * len(numbers), map(asdict, rows)), out)
    show_grid(views_grid(record, place))
    say_written(out)
