"""`kvbind bench decode`: time per token by prompt length."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvbind.bench.options import Device, Out, known_preset, numbers_of, open_device, some_of
from kvbind.bench.output import say_written, show_grid, write_growing


def command(
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model: tiny, 30m, 125m, 760m or 3b.")] = "tiny",
    system: Annotated[
        str, typer.Option(help="Named systems in place of its inner loop and layer, separated by commas, or all.")
    ] = "",
    prompts: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "1024,4096,16384,65536",
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are decoded at once.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to time after each prompt, at the most.")] = 256,
    piece: Annotated[int, typer.Option(min=1, help="Tokens of each sequence that prefill reads at a time.")] = 8192,
    graphs: Annotated[str, typer.Option(help="CUDA graphs: on, off or both; auto is both on a GPU.")] = "auto",
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time no more tokens of a prompt after this; 128, if that many are asked for.")
    ] = 20.0,
    decode_dtype: Annotated[
        str, typer.Option(help="What decoding reads fast weights in: bfloat16; by default as they are.")
    ] = "",
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time one more token after prompts of growing length: with and without CUDA graphs, and by reading the prompt again."""
    import torch

    from kvbind.bench.harness.record import growing, provenance
    from kvbind.bench.models.decoding import CAUSAL, DecodingLoad, bench_systems
    from kvbind.bench.tables.decoding import decoding_grid
    from kvbind.forms.on_kernels import fla
    from kvbind.inner.value import check_choice
    from kvbind.layers.lact.layer import check_decode_dtype

    place = open_device(device)
    check_choice("graphs", graphs, ("auto", "on", "off", "both"))
    if graphs in ("on", "both") and place.type != "cuda":
        raise typer.BadParameter(f"graphs must be off or auto on {place}, which has none; got {graphs!r}")
    if graphs == "auto":
        graphs = "both" if place.type == "cuda" else "off"
    switches = {"on": (True,), "off": (False,), "both": (True, False)}[graphs]
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    chosen = some_of(system, CAUSAL, "system") if system else ()
    loads = [DecodingLoad(batch, prompt, tokens, piece) for prompt in numbers_of(prompts, "prompts")]
    config: dict[str, Any] = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "piece": piece}
    reads = check_decode_dtype(decode_dtype or None)
    if reads is not None:
        config["decode_dtype"] = reads
    about = provenance(place, ("triton", *fla.PACKAGES)) | {"config": config}
    rows = bench_systems(known_preset(preset), chosen, place, dtype, loads, switches, seconds, reads)
    planned = len(loads) * len(switches) * max(len(chosen), 1)
    show_grid(decoding_grid(write_growing(growing(about, planned, rows), out)))
    say_written(out)
