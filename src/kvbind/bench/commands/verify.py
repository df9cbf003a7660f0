"""`kvbind bench verify`: kernels against float64, and what the documentation promises of models."""

from __future__ import annotations

from typing import Annotated

import typer

from kvbind.bench.options import Device, Out, open_device, some_of
from kvbind.bench.output import console, say_written, show_grid, write_growing


def command(
    what: Annotated[
        str, typer.Option(help="operators: kernels against float64; models: what the documentation promises of them.")
    ] = "operators",
    only: Annotated[str, typer.Option(help="Only cases whose name has this in it.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto for what the device computes in.")] = "auto",
    small: Annotated[bool, typer.Option("--small", help="Small sizes, for kernels interpreted on a CPU.")] = False,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin no further case after this, seconds.")] = 540,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the device.")] = 1,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Hold kernels to the PyTorch forms in float64, or models to what is promised of them: compiled, generating, training.

    Exits with code 1 where a case fails or was not run; of operators, also where no kernel runs on the device at all.
    """
    from kvbind.bench.tables.verify import promises_grid, summary_grid, verify_grid
    from kvbind.bench.verify.operators import DTYPES, verified
    from kvbind.bench.verify.promises import verified_promises
    from kvbind.kernels.common.devices import has_triton

    place = open_device(device)
    if some_of(what, ("operators", "models"), "what") == ("models",):
        record = write_growing(verified_promises(place, small=small, only=only, budget=budget, workers=workers), out)
        show_grid(promises_grid(record))
        say_written(out)
        if not all(row["passed"] for row in record["rows"]):
            raise typer.Exit(1)
        return
    dtypes = None if dtype == "auto" else some_of(dtype, DTYPES, "dtype")
    records = verified(place, dtypes=dtypes, small=small, only=only, budget=budget, workers=workers)
    record = write_growing(records, out)
    if not record["kernels"]:
        console.print(f"kernels are off on {place}: {record['why_off']}; nothing was verified", style="bold red")
        if place.type == "cpu" and has_triton():
            console.print("TRITON_INTERPRET=1 KVBIND_KERNELS=force kvbind bench verify --small --device cpu does it here")
        raise typer.Exit(1)
    show_grid(verify_grid(record))
    show_grid(summary_grid(record))
    failed = sum(not row["passed"] for row in record["rows"])
    console.print(
        f"{len(record['rows'])} of {record['planned']} cases, {failed} failed, "
        f"{sum(not row.get('operators') for row in record['rows'])} that no kernel took part in"
    )
    say_written(out)
    if failed or not record["complete"]:
        raise typer.Exit(1)
