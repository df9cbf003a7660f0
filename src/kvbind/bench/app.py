"""The commands `kvbind bench ...`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and exactness on the device at hand.")
console = Console()

Tokens = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")]
Width = Annotated[int, typer.Option(min=1, help="Channels per head of keys, values and the hidden layer.")]
Heads = Annotated[int, typer.Option(min=1, help="Fast heads.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Out = Annotated[Path | None, typer.Option(help="A JSON file to write results, machine, versions and command to.")]


@app.command()
def forms(
    tokens: Tokens = 4096,
    chunk: Chunk = 256,
    width: Width = 128,
    heads: Heads = 1,
    batch: Batch = 1,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default float32 on a CPU, bfloat16 on a GPU.")] = "auto",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each rung, forward and training each.")] = 3.0,
    out: Out = None,
) -> None:
    """Time the recurrent and parallel forms of every rung of the ladder, forward and backward."""
    import torch

    from kvbind.bench.forms import as_data, bench_forms
    from kvbind.bench.operands import Size

    place = _device(device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if dtype not in kinds:
        raise typer.BadParameter(f"dtype must be float32, bfloat16 or auto; got {dtype!r}")
    size = Size(batch, tokens, heads, width)
    rows = as_data(bench_forms(size, chunk, place, kinds[dtype], seconds=seconds))

    title = f"{dtype} on {place}: T = {tokens}, chunk {chunk}, {batch} x {heads} heads of width {width}"
    caption = "ktok/s of the recurrent (rec) and the parallel form (par), and par / rec; peak MiB of training"
    table = Table(title=title, caption=caption)
    for name in ("rung", "fwd rec", "fwd par", "x", "train rec", "train par", "x", "MiB rec", "MiB par"):
        table.add_column(name, justify="left" if name == "rung" else "right")
    by_form = {(row["rung"], row["form"]): row for row in rows}
    for rung in dict.fromkeys(row["rung"] for row in rows):
        recurrent, parallel = by_form[rung, "recurrent"], by_form.get((rung, "parallel"))
        cells = [rung]
        for work in ("forward", "training"):
            cells.append(f"{recurrent[work] / 1e3:.0f}")
            cells += [f"{parallel[work] / 1e3:.0f}", f"{parallel[f'{work}_over_recurrent']:.2f}"] if parallel else ["-", "-"]
        cells.append(f"{recurrent['training_bytes'] / 2**20:.0f}")
        cells.append(f"{parallel['training_bytes'] / 2**20:.0f}" if parallel else "-")
        table.add_row(*cells)
    console.print(table)
    config = {"batch": batch, "tokens": tokens, "chunk": chunk, "heads": heads, "width": width, "dtype": dtype}
    _write(out, place, {"config": config, "rows": rows})


@app.command()
def accuracy(
    tokens: Tokens = 1024,
    chunk: Chunk = 64,
    width: Width = 64,
    heads: Heads = 2,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Measure the error of every rung and form in float32 and bfloat16 against float64."""
    from dataclasses import asdict

    from kvbind.bench.accuracy import bench_accuracy, scan_errors
    from kvbind.bench.operands import Size

    place = _device(device)
    errors = [asdict(error) for error in bench_accuracy(Size(1, tokens, heads, width), chunk, place)]
    scans = scan_errors([16, 32, 64, 128, 256, 1024], place)
    table = Table(title=f"relative error against float64; T = {tokens}, chunk {chunk}, {heads} heads of width {width}")
    for name in ("rung", "form", "operands", "Newton-Schulz", "error"):
        table.add_column(name, justify="right" if name == "error" else "left")
    for row in errors:
        table.add_row(row["rung"], row["form"], row["dtype"], row["newton_schulz"] or "-", f"{row['error']:.1e}")
    console.print(table)
    scan_table = Table(title="momentum scan in float32, gates near 1/2")
    for name in ("chunks", "by products (ours)", "by division (cumprod, cumsum)"):
        scan_table.add_column(name, justify="right")
    for scan in scans:
        scan_table.add_row(str(scan["chunks"]), f"{scan['by_products']:.1e}", f"{scan['by_division']:.1e}")
    console.print(scan_table)
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    _write(out, place, {"config": config, "errors": errors, "scan": scans})


@app.command()
def decode(
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model: tiny, 30m, 125m, 760m or 3b.")] = "tiny",
    prompts: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "1024,4096,16384,65536",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 64,
    piece: Annotated[int, typer.Option(min=1, help="Tokens that prefill reads at a time.")] = 8192,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time one more token after prompts of growing length, with the cache and by reading the prompt again."""
    from dataclasses import asdict

    import torch

    from kvbind.bench.language import bench_decoding, build

    place = _device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    model = build(_preset(preset), place, dtype)
    model.train(False)
    rows = bench_decoding(model, [int(x) for x in prompts.split(",")], tokens=tokens, piece=piece)
    table = Table(title=f"{preset}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {place}, {dtype}")
    for name in ("prompt", "prefill s", "ms per token", "slowest token ms", "prompt read again ms", "cache MiB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.prompt),
            f"{row.prefill_seconds:.2f}",
            f"{1e3 * row.token_seconds:.2f}",
            f"{1e3 * row.slowest_token_seconds:.2f}",
            f"{1e3 * (row.reread_seconds or 0):.1f}",
            f"{row.cache_bytes / 2**20:.2f}",
        )
    console.print(table)
    config = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "piece": piece}
    _write(out, place, {"config": config, "rows": [asdict(row) for row in rows]})


@app.command()
def step(
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model: tiny, 30m, 125m, 760m or 3b.")] = "tiny",
    tokens: Annotated[int | None, typer.Option(help="Tokens per sequence; default what the preset trains at.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps, after one to warm up.")] = 4,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time a training step of rung 0 and rung 2, recurrent and parallel."""
    from dataclasses import asdict

    from kvbind.bench.language import bench_step
    from kvbind.inner.systems import ladder
    from kvbind.models import PRESETS

    place, sizes = _device(device), PRESETS[_preset(preset)]
    length = tokens or sizes["max_position_embeddings"]
    rungs = ladder(sizes["inner"])
    cases = {
        "rung0": (rungs["rung0"], "recurrent"),
        "rung2": (rungs["rung2"], "recurrent"),
        "rung2 parallel": (rungs["rung2"], "parallel"),
    }
    rows = bench_step(preset, cases, length, place, steps=steps)
    table = Table(title=f"training step of {preset} at {length} tokens, {place}")
    for name in ("rung", "form", "tokens/s", "peak GiB"):
        table.add_column(name, justify="right")
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
        table.add_row(row.rung, row.form, f"{row.tokens_per_second:.0f}", peak)
    console.print(table)
    _write(out, place, {"config": {"preset": preset, "tokens": length, "steps": steps}, "rows": [asdict(r) for r in rows]})


def _preset(name: str) -> str:
    from kvbind.inner.value import nearest
    from kvbind.models import PRESETS

    if name not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {', '.join(PRESETS)}; got {name!r}{nearest(name, PRESETS)}")
    return name


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise typer.BadParameter(f"device must be cpu, cuda or auto; got {name!r}") from problem
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device cuda was asked for, and PyTorch sees no GPU")
    return device


def _write(out: Path | None, device: Any, results: dict[str, Any]) -> None:
    if out is None:
        return
    from kvbind.experiments.provenance import command, machine, versions

    record = {
        "command": command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(device),
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record | results, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {out}")
