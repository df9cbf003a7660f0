"""`kvbind bench vision`: ViTTT beside a vision transformer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, numbers_of, open_device
from kvbind.bench.output import console, show_grid, write_results


def command(
    model: Annotated[str, typer.Option(help="Size of ViTTT: vittt_tiny, vittt_small or vittt_base.")] = "vittt_base",
    peer: Annotated[
        str, typer.Option(help="The vision transformer of timm's beside it, with softmax attention, or none.")
    ] = "vit_base_patch16_224",
    sizes: Annotated[str, typer.Option(help="Sides of the images in pixels, separated by commas.")] = "224,512,1024",
    batch: Annotated[
        int, typer.Option(min=0, help="Images at once; 0 for about 50,000 patches, halved until training fits in memory.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each size, forward and training each.")] = 3.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Let torch.compile make both models' kernels.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time ViTTT beside a vision transformer at growing image sizes, forward and training, with their memory."""
    from kvbind.bench.models.vision import bench_vision, compare
    from kvbind.bench.tables.models import vision_grid

    place = open_device(device)
    other = None if peer == "none" else peer
    sides = numbers_of(sizes, "sizes")
    measured = bench_vision(model, other, sides, place, batch=batch, seconds=seconds, compiled=compiled)
    rows = [asdict(row) for row in measured]
    show_grid(vision_grid(rows, place))
    compared = compare(measured, model, other) if other else None
    for work, found in (compared or {}).items():
        ratios = ", ".join(f"{ratio:.2f} at {size}" for size, ratio in found["speed"].items())
        where = f"; equal at about {found['crossing']:.0f} pixels" if found["crossing"] else ""
        console.print(f"{work}: {model} over {peer} {ratios}{where}", soft_wrap=True)
    config = {
        "model": model,
        "peer": other,
        "dtype": "bfloat16 autocast, TF32" if place.type == "cuda" else "float32",
        "compiled": compiled,
    }
    results = {"config": config, "rows": rows, "compared": compared}
    write_results(out, place, results, ("timm",))
