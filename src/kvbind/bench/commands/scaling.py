"""`kvbind bench scaling`: training on 1 to 8 GPUs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from kvbind.bench.options import Device, Out, known_preset, numbers_of, open_device, some_of
from kvbind.bench.output import console, say_written, show_grid


def command(
    what: Annotated[str, typer.Option(help="fsdp, sequence, equality; some of them, or all.")] = "all",
    gpus: Annotated[
        str, typer.Option(help="Numbers of GPUs, separated by commas; default 1, 2, 4, 8 as far as there are any.")
    ] = "auto",
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model whose speed is measured.")] = "760m",
    rung: Annotated[str, typer.Option(help="Of the ladder; those from rung2 on have a parallel form.")] = "rung2",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each GPU's sequence, of fsdp.")] = 32768,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the one sequence of all GPUs, of sequence; separated by commas.")
    ] = "131072,262144,524288,1048576,2097152,4194304",
    equality_preset: Annotated[str, typer.Option(help="Size of the model whose losses are compared.")] = "125m",
    equality_tokens: Annotated[int, typer.Option(min=2, help="Tokens of its sequences.")] = 32768,
    steps: Annotated[int, typer.Option(min=1, help="Steps whose losses are compared.")] = 20,
    recompute: Annotated[
        str, typer.Option(help="What blocks compute again backward: block, offload, selective or none.")
    ] = "block",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each case, after one step to warm up.")] = 6.0,
    limit: Annotated[float, typer.Option(min=1.0, help="Give up on one case after this, seconds.")] = 180.0,
    budget: Annotated[float, typer.Option(min=0.0, help="Run nothing after this, seconds.")] = 540.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the rows in the file, of this machine and versions; measure the rest.")
    ] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train on 1, 2, 4, 8 GPUs: sharded, and with one long sequence cut over all; and compare losses with one GPU's.

    Starts torchrun for each number of GPUs. On a CPU, processes talk through gloo. Rows are written as they come; what had
    no time left is measured by the same command with --resume.
    """
    import torch

    from kvbind.bench.harness.record import growing, provenance, resumed, save
    from kvbind.bench.tables.scaling import scaling_grids
    from kvbind.bench.training.scaling import WHATS, ScalingSettings, cases, equality, finished, measured
    from kvbind.inner.systems import RUNGS
    from kvbind.inner.value import check_choice
    from kvbind.plan.costs import RECOMPUTE

    place = open_device(device)
    check_choice("recompute", recompute, RECOMPUTE)
    check_choice("rung", rung, tuple(RUNGS))
    present = torch.cuda.device_count() if place.type == "cuda" else 8
    numbers = [n for n in (1, 2, 4, 8) if n <= present] if gpus == "auto" else numbers_of(gpus, "gpus")
    if place.type == "cuda" and numbers[-1] > present:
        raise typer.BadParameter(f"gpus must be at most the {present} that there are; got {numbers[-1]}")
    settings = ScalingSettings(
        preset=known_preset(preset), rung=rung, form="parallel" if rung >= "rung2" else "recurrent", fsdp_length=tokens,
        lengths=tuple(numbers_of(lengths, "lengths")), equality_preset=known_preset(equality_preset),
        equality_length=equality_tokens, equality_steps=steps, recompute=recompute, seconds=seconds,
    )  # fmt: skip
    planned = cases(some_of(what, WHATS, "what"), numbers, settings)
    about = provenance(place, ("triton",)) | {"config": asdict(settings) | {"gpus": numbers}}
    kept: dict[int, dict[str, Any]] = {}
    if resume and out is not None and out.is_file():
        kept = resumed(out, about, lambda rows: finished(rows, planned))
    held = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None
    rest = [case for number, case in enumerate(planned) if number not in kept]
    rows = measured(rest, place.type, budget=budget, limit=limit, memory_bytes=held)
    record: dict[str, Any] = {}
    for record in growing(about, len(planned), rows, kept.values()):
        record["equality"] = equality(record["rows"])
        if len(record["rows"]) == len(kept):
            continue  # as long as nothing is measured, an earlier record is not replaced
        save(out, record)
        row = record["rows"][-1]
        said = row.get("skipped") or (f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "done")
        console.print(f"{row['what']}, {row['gpus']} GPUs, {row['length']:,} tokens: {said}", markup=False, soft_wrap=True)
    for grid in scaling_grids(record):
        show_grid(grid)
    say_written(out)
