"""`kvbind bench models`: training and decoding of whole models, each beside what a user would pick instead, in one process.

A row has the best of what its model's own steps come to, eager or as CUDA graphs, and the best of the peer's, compiled ones
included. The budget is divided: first every row gets one measurement of ours and the peer's likely best, then what time is
left goes to the other ways, compilation last, none of which may take longer than its share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvbind.bench.harness.device_time import duration, first_line
from kvbind.bench.harness.record import OUT_OF_TIME, answered, provenance, save
from kvbind.bench.harness.timing import TookTooLongError, at_most, now
from kvbind.bench.models import softmax_peers
from kvbind.bench.models.decoding import Load, decode, decode_llama
from kvbind.bench.models.vision import draw, forward, vision_transformer
from kvbind.bench.tables.kernels import Grid
from kvbind.bench.training import cuda_graphs
from kvbind.bench.training.cuda_graphs import give_back
from kvbind.bench.training.steps import build
from kvbind.files import read_json
from kvbind.hardware import peak_flops
from kvbind.inner.systems import ladder
from kvbind.models import PRESETS, LactConfig, lact_nvs, vittt
from kvbind.models.peers import llama as make_llama
from kvbind.precision import matmul_precision

PARTS = ("language", "small", "vision", "views", "decode")
"""Rows that are measured together."""

COMPILING = {"blocks": 60.0, "whole": 100.0}
"""Seconds after which a peer's compilation is given up: of its blocks, of the whole model."""

WAYS = {
    "": {"eager": "eager", "graphs": "graphs"},
    "blocks": {"eager": "compiled blocks", "graphs": "compiled blocks, graphs"},
    "whole": {"eager": "compiled", "graphs": "compiled, graphs"},
}
"""What ways are called, by what is compiled."""

RUNGS = ("rung2", "rung0", "rung6")

Found = dict[str, Any]
"""What was measured in one way: "value", in the row's unit, with more; or "failed" or "skipped", and why."""


@dataclass(frozen=True)
class Language:
    """A size of the LaCT language model, on rows of `length` tokens."""

    name: str
    preset: str
    length: int
    rows: int
    vocabulary: int


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        language, small: models that train.
        vision: size of ViTTT, images, their side, and the peer's name in timm.
        views: layers, width, scenes, input views (as many are rendered), side of the images.
        preset: of the model that decodes; with rung 2 of the ladder, and once with rung 0.
        one, many: what is decoded.
    """

    language: Language
    small: Language
    vision: tuple[str, int, int, str]
    views: tuple[int, int, int, int, int]
    preset: str
    one: Load
    many: Load


SIZES = {
    "full": Sizes(
        Language("lact-760m", "760m", 32768, 1, 32000), Language("lact-30m", "30m", 8192, 3, 256),
        ("base", 256, 224, "vit_base_patch16_224"), (12, 768, 4, 8, 128),
        "760m", Load(1, 32768, 4096, 8192), Load(64, 2048, 160, 512),
    ),
    "tiny": Sizes(
        Language("lact-tiny", "tiny", 128, 1, 256), Language("lact-tinier", "tiny", 64, 2, 256),
        ("tiny", 2, 32, "vit_tiny_patch16_224"), (1, 32, 1, 2, 16),
        "tiny", Load(1, 128, 8, 64), Load(2, 64, 8, 64),
    ),
}  # fmt: skip
"""By name; "tiny" for a look on a CPU, which measures nothing that matters."""


@dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
        name: of the row.
        part: of `PARTS`.
        unit: of its numbers.
        peer: what the peer is.
        higher: whether higher is better.
        flops: model FLOPs of each of what is counted per second; None where that is not asked.
    """

    name: str
    part: str
    unit: str
    peer: str
    higher: bool = True
    flops: float | None = None


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        rows: whose.
        side: "ours", "peer", or "beside" for what is no candidate, but worth knowing.
        ways: what it finds, by name.
        work: takes its share of the time, seconds, which what can be cut short keeps to; returns what it found in each way.
        first: whether it is done before those that are not.
        weight: of its share of the time.
        limit: seconds after which it is given up, if time is left; None for a multiple of its share.
    """

    rows: tuple[str, ...]
    side: str
    ways: tuple[str, ...]
    work: Callable[[float], dict[str, Found]] = field(repr=False)
    first: bool = True
    weight: float = 1.0
    limit: float | None = None


Plan = tuple[list[Row], list[Job]]


def per_second(found: dict[str, Found]) -> dict[str, Found]:
    """Ways of training with their speed as the value."""
    return {way: {"value": x["per_second"], **x} if "per_second" in x else x for way, x in found.items()}


def ours(case: cuda_graphs.Case, device: torch.device, seconds: float, how: str, share: float) -> dict[str, Found]:
    """This library's training steps: `how` is "graphs" or "eager"."""
    found = cuda_graphs.speed(case, device, {"graphs": "on", "eager": "off"}[how], min(seconds, share / 2))
    return per_second({how: found})


def peers(case: cuda_graphs.Case, device: torch.device, seconds: float, scope: str, share: float) -> dict[str, Found]:
    """A peer's training steps; `scope` is what is compiled."""
    found = softmax_peers.training(case, device, min(seconds, share / 4), scope=scope)
    return per_second({WAYS[scope][way]: x for way, x in found.items()})


def peer_jobs(rows: tuple[str, ...], work: Callable[[str, float], dict[str, Found]]) -> list[Job]:
    """Those of a peer, whose `work` takes what is compiled."""
    return [
        Job(rows, "peer", tuple(WAYS[scope].values()), partial(work, scope), first=not scope, limit=COMPILING.get(scope))
        for scope in WAYS
    ]


def our_jobs(case: cuda_graphs.Case, device: torch.device, seconds: float) -> list[Job]:
    """Those of this library's training steps."""
    return [
        Job((case.name,), "ours", (how,), partial(ours, case, device, seconds, how), first=how == "graphs")
        for how in ("graphs", "eager")
    ]


def language_plan(part: str, sizes: Language, device: torch.device, seconds: float) -> Plan:
    """The language model in three rungs, and a Llama of its size."""
    cases = [
        cuda_graphs.language(f"{sizes.name}-{rung}", sizes.preset, rung, sizes.length, sizes.rows, sizes.vocabulary)
        for rung in RUNGS
    ]
    config = LactConfig(**{**PRESETS[sizes.preset], "vocab_size": sizes.vocabulary, "max_position_embeddings": sizes.length})
    jobs = [job for case in cases for job in our_jobs(case, device, seconds)]
    peer = softmax_peers.language(cases[0], config)
    jobs += peer_jobs(tuple(case.name for case in cases), partial(peers, peer, device, seconds))
    rows = [
        Row(case.name, part, "tokens/s", "transformers' Llama of that size, SDPA", flops=case.flops)
        for case in sorted(cases, key=lambda case: case.name)
    ]
    return rows, jobs


def forward_speed(
    make: Callable[[], nn.Module], batch: int, size: int, device: torch.device, seconds: float, scope: str, share: float
) -> dict[str, Found]:
    """Images per second without gradients, eager and as a CUDA graph; `scope` is what is compiled."""
    give_back(device)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = make()
    softmax_peers.compile_(model, model.blocks, scope)
    images, _ = draw(batch, size, device)
    with matmul_precision("high"):
        start = now(device)
        forward(model, images)
        first = now(device) - start
        took = duration(partial(forward, model, images), device, seconds=min(seconds, share / 4))
    known = {"first_seconds": first, "peak_bytes": torch.cuda.max_memory_allocated(device) if images.is_cuda else None}
    found: dict[str, Found] = {"eager": {"value": batch / took.seconds, **known}}
    if took.graph_seconds is None:
        found["graphs"] = {"failed": took.not_capturable}
    else:
        found["graphs"] = {"value": batch / took.graph_seconds, **known}
    return {WAYS[scope][way]: x for way, x in found.items()}


def vision_plan(sizes: Sizes, device: torch.device, seconds: float) -> Plan:
    """ViTTT and a vision transformer of timm's, training and forward."""
    model, batch, side, peer = sizes.vision
    case = cuda_graphs.images(model, batch, side)
    name = f"vittt-{model[0]}-forward"
    called = f"timm's {peer}"
    rows = [
        Row(case.name, "vision", "images/s", called, flops=case.flops),
        Row(name, "vision", "images/s", called),
    ]

    def forwards(make: Callable[[], nn.Module], scope: str, share: float) -> dict[str, Found]:
        return forward_speed(make, batch, side, device, seconds, scope, share)

    own = partial(vittt.build, f"vittt_{model}", num_classes=1000)
    return rows, [
        *our_jobs(case, device, seconds),
        *peer_jobs((case.name,), partial(peers, softmax_peers.images(case, peer, side), device, seconds)),
        Job((name,), "ours", ("eager", "graphs"), partial(forwards, own, "")),
        *peer_jobs((name,), partial(forwards, partial(vision_transformer, peer, side))),
    ]


def views_plan(sizes: Sizes, device: torch.device, seconds: float) -> Plan:
    """LaCT view synthesis, and the same transformer with full attention."""
    case = cuda_graphs.views(*sizes.views)
    layers, dim = sizes.views[:2]
    config = lact_nvs.LactNvsConfig(dim=dim, layers=layers, fast_head_dim=dim, head_dim=min(64, dim))
    row = Row(case.name, "views", "views/s", "the same with full attention, SDPA", flops=case.flops)
    jobs = peer_jobs((case.name,), partial(peers, softmax_peers.views(case, config), device, seconds))
    return [row], our_jobs(case, device, seconds) + jobs


def decode_plan(sizes: Sizes, device: torch.device, seconds: float) -> Plan:
    """A token of one sequence, and of many."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset = PRESETS[sizes.preset]
    chunk = preset["inner"].chunk
    one, many = f"decode-{sizes.preset}-batch{sizes.one.batch}-ms", f"decode-{sizes.preset}-batch{sizes.many.batch}"
    measured = {one: "p50_ms", many: "tokens_per_second"}

    def valued(name: str, found: Found) -> Found:
        return {"value": found[measured[name]], **found}

    def lact(name: str, load: Load, rung: str, how: str, way: str, share: float) -> dict[str, Found]:
        give_back(device)
        model = build(sizes.preset, device, dtype, inner=ladder(preset["inner"])[rung]).eval()
        until = time.perf_counter() + 0.75 * share
        return {way: valued(name, decode(model, load, until, graphs=how == "graphs"))}

    def llama(name: str, load: Load, how: str, share: float) -> dict[str, Found]:
        give_back(device)
        torch.manual_seed(0)
        with torch.device(device):
            model = make_llama(LactConfig(**preset))
        model = nn.Module.to(model, dtype).eval()
        until = time.perf_counter() + 0.75 * share
        return {how: valued(name, decode_llama(model, load, chunk, until, static=how == "static graphs"))}

    def short(load: Load) -> Load:
        return replace(load, tokens=min(load.tokens, 256))

    jobs = []
    for name, load, weight in ((one, sizes.one, 5.0), (many, sizes.many, 2.0)):
        jobs += [
            Job((name,), "ours", ("graphs",), partial(lact, name, load, "rung2", "graphs", "graphs"), weight=weight),
            Job((name,), "peer", ("static graphs",), partial(llama, name, short(load), "static graphs")),
            Job((name,), "peer", ("dynamic",), partial(llama, name, short(load), "dynamic"), first=False),
            Job((name,), "ours", ("eager",), partial(lact, name, short(load), "rung2", "eager", "eager"), first=False),
            Job(
                (name,),
                "beside",
                ("rung0",),
                partial(lact, name, short(load), "rung0", "graphs", "rung0"),
                first=False,
                limit=COMPILING["blocks"],
            ),
        ]
    peer = "transformers' Llama of that size, SDPA"
    return [Row(one, "decode", "ms", peer, higher=False), Row(many, "decode", "tokens/s", peer)], jobs


def plan(what: Sequence[str], sizes: Sizes, device: torch.device, seconds: float) -> Plan:
    """Rows and jobs of some of `PARTS`, in that order."""
    plans: dict[str, Callable[[], Plan]] = {
        "language": partial(language_plan, "language", sizes.language, device, seconds),
        "small": partial(language_plan, "small", sizes.small, device, seconds),
        "vision": partial(vision_plan, sizes, device, seconds),
        "views": partial(views_plan, sizes, device, seconds),
        "decode": partial(decode_plan, sizes, device, seconds),
    }
    found = [plans[part]() for part in what]
    return [row for rows, _ in found for row in rows], [job for _, jobs in found for job in jobs]


Results = dict[tuple[str, str], dict[str, Found]]
"""By row and side, by way."""


def results_of(rows: Iterable[Mapping[str, Any]]) -> Results:
    """What an earlier record has found."""
    return {(row["name"], side): dict(row[f"{side}_ways"]) for row in rows for side in ("ours", "peer", "beside")}


def row_of(row: Row, results: Results, peak: float | None) -> dict[str, Any]:
    """A row of the record.

    Args:
        row: which.
        results: found so far.
        peak: what the device could compute, operations per second; None where that is not known.

    Returns:
        `name`, `unit`, `ours`, `peer`, `peer_name`, `higher_is_better`; `ours_by` and `peer_by`, the way of each; `ratio`,
        how many times better ours is; of ours `graphs_on` and `graphs_off`, `mfu`, `peak_bytes`, `first_seconds`; and all
        that was found, by side and way. What is not known is None; a row without a pair of numbers says under `skipped` why.
    """
    ways = {side: results.get((row.name, side), {}) for side in ("ours", "peer", "beside")}

    def best(side: str) -> str | None:
        values = {way: x["value"] for way, x in ways[side].items() if "value" in x}
        if not values:
            return None
        return max(values, key=lambda way: values[way] if row.higher else -values[way])

    by = {side: best(side) for side in ("ours", "peer")}
    values = {side: None if way is None else ways[side][way]["value"] for side, way in by.items()}
    mine, theirs = values["ours"], values["peer"]
    ratio = None if mine is None or theirs is None else mine / theirs if row.higher else theirs / mine
    chosen = ways["ours"].get(by["ours"] or "", {})
    found: dict[str, Any] = {
        "name": row.name, "part": row.part, "unit": row.unit, "ours": mine, "ours_by": by["ours"], "peer": theirs,
        "peer_by": by["peer"], "peer_name": row.peer, "higher_is_better": row.higher, "ratio": ratio,
        "mfu": None if mine is None or row.flops is None or peak is None else row.flops * mine / peak,
        "peak_bytes": chosen.get("peak_bytes"), "first_seconds": chosen.get("first_seconds"),
        "graphs_on": ways["ours"].get("graphs", {}).get("value"), "graphs_off": ways["ours"].get("eager", {}).get("value"),
        **{f"{side}_ways": x for side, x in ways.items()},
    }  # fmt: skip
    for side in ("ours", "peer"):
        if values[side] is None:
            said = [x.get("failed") for x in ways[side].values() if "failed" in x]
            found["skipped"] = f"{side}: {said[0]}" if said else OUT_OF_TIME
    return found


def is_answered(job: Job, results: Results) -> bool:
    """Whether all that a job finds is there."""
    return all(
        way in results.get((name, job.side), {}) and "skipped" not in results[name, job.side][way]
        for name in job.rows
        for way in job.ways
    )


def done(jobs: Sequence[Job], budget: float, results: Results) -> Iterator[Job]:
    """Do jobs, those that come first before the others; put what they find into `results`.

    Args:
        jobs: what to do.
        budget: seconds for all; none goes on after that.
        results: filled.
    """
    end = time.perf_counter() + budget
    rest = sorted(jobs, key=lambda job: (not job.first, job.limit or 0.0))
    while rest:
        job = rest.pop(0)
        left = end - time.perf_counter()
        others = [x for x in rest if x.first == job.first and x.limit is None]
        share = left * job.weight / (job.weight + sum(x.weight for x in others))
        limit = min(left, job.limit or max(60.0, 4 * share))
        found: dict[str, Found] = {}
        if left > 0:
            try:
                with at_most(limit):
                    found = job.work(share)
            except TookTooLongError:
                if limit < left:
                    found = {way: {"failed": f"given up after {limit:.0f} s"} for way in job.ways}
            except Exception as problem:  # the next may do better
                found = {way: {"failed": first_line(problem)} for way in job.ways}
        for way in job.ways:
            for name in job.rows:
                results.setdefault((name, job.side), {})[way] = found.get(way, {"skipped": OUT_OF_TIME})
        yield job


def line_of(job: Job, row: Mapping[str, Any]) -> str:
    """What a job found, in a line."""
    ways = row[f"{job.side}_ways"]
    told = [
        f"{way} {ways[way]['value']:,.4g}" if "value" in ways[way] else f"{way} {ways[way].get('failed', OUT_OF_TIME)}"
        for way in job.ways
    ]
    ratio = "" if row["ratio"] is None else f"; ratio {row['ratio']:.2f}"
    return f"{', '.join(job.rows)} ({row['unit']}), {job.side}: {'; '.join(told)}{ratio}"


def model_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of a record: all rows, and what decoding is like."""

    def text(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        number = ",.0f" if row["higher_is_better"] else ".2f"
        peer = "-" if row["peer"] is None else f"{row['peer']:{number}}"
        memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30
        return (
            row["name"], row["unit"], row["peer_name"] + (f" ({row['peer_by']})" if row["peer_by"] else ""),
            text(row["ours"], number), peer, text(row["ratio"], ".2f"), text(row["graphs_off"], number),
            text(row["mfu"], ".1%"), text(memory, ".1f"), text(row["first_seconds"], ".1f"),
        )  # fmt: skip

    header = ("row", "unit", "peer, its best", "ours", "peer", "x", "ours without graphs", "MFU", "GiB", "first s")
    note = (
        "x: how many times better ours is; ours: with CUDA graphs or without, whichever is faster; MFU: of the datasheet's "
        "dense bfloat16 rate; GiB: the most held in a step; first s: the first step, or the first token and its capture"
    )
    title = "Training (AdamW, bfloat16 autocast) and decoding, beside softmax attention"
    rows = record["rows"]
    grids = [Grid("models", title, header, tuple(map(cells, rows)), left=3, note=note)]
    lines = []
    for row in rows:
        if row["part"] != "decode":
            continue
        for side, called in (("ours", "LaCT, rung 2"), ("beside", "LaCT"), ("peer", "Llama")):
            for way, x in row[f"{side}_ways"].items():
                if "value" not in x:
                    continue
                batch = round(x["tokens_per_second"] * x["queued_ms"] / 1e3)
                lines.append((
                    f"{called}, {way}", f"{batch} x {x['prompt']}", *(f"{x[name]:.2f}" for name in ("p50_ms", "p99_ms")),
                    f"{x['slowest_ms']:.1f}", str(x["tokens"]), f"{x['tokens_per_second']:,.0f}",
                    f"{x['prefill_seconds']:.2f}", f"{x['cache_bytes'] / batch / 2**20:,.0f}", f"{x['first_seconds']:.2f}",
                ))  # fmt: skip
    if lines:
        header = ("model", "prompt", "p50 ms", "p99 ms", "slowest ms", "of tokens", "tokens/s", "prefill s", "cache MiB",
                  "first s")  # fmt: skip
        note = "ms: of tokens that are each waited for; tokens/s: of tokens that are not; cache: of one sequence"
        grids.append(Grid("decoding", "Decoding, bfloat16, greedy", header, tuple(lines), note=note))
    return grids


def main(
    out: str | Path | None = None,
    device: str = "auto",
    what: str | Sequence[str] = "all",
    budget: float = 540.0,
    *,
    sizes: str = "full",
    seconds: float = 1.5,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure models and their peers, and print a line for each as it comes.

    Args:
        out: a JSON file for the record, written as it grows; None for none.
        device: where; "auto" for a GPU where there is one.
        what: of `PARTS`, in the order in which they are measured; commas between them, or "all".
        budget: end after this, seconds.
        sizes: of `SIZES`.
        seconds: how long to time each kind of steps at the most.
        resume: keep what is in the file, of all parts, and measure what is not.

    Returns:
        The record.

    Raises:
        ValueError: an unknown part or size.
    """
    parts = PARTS if what == "all" else tuple(what.split(",") if isinstance(what, str) else what)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"what must be of {', '.join(PARTS)}, or all; got {what!r}")
    if sizes not in SIZES:
        raise ValueError(f"sizes must be one of {', '.join(SIZES)}; got {sizes!r}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place, path = torch.device(name), None if out is None else Path(out)
    results: Results = {}
    if resume and path is not None and path.is_file():
        results = results_of(read_json(path, finite=False)["rows"])
    earlier = {name for name, _ in results}
    every, _ = plan(PARTS, SIZES[sizes], place, seconds)
    _, jobs = plan(parts, SIZES[sizes], place, seconds)
    rows = [row for row in every if row.part in parts or row.name in earlier]
    peak = peak_flops(torch.cuda.get_device_name(place)) if place.type == "cuda" else None
    about = provenance(place, ("triton", "timm")) | {"config": {"sizes": sizes, "seconds": seconds, "budget": budget}}

    def record() -> dict[str, Any]:
        found = [row_of(row, results, peak) for row in rows]
        whole = {**about, "planned": len(rows), "complete": False, "rows": found}
        return whole | {"complete": answered(whole) == len(rows)}

    current = record()
    for job in done([job for job in jobs if not is_answered(job, results)], budget, results):
        current = record()
        save(path, current)
        print(line_of(job, next(row for row in current["rows"] if row["name"] == job.rows[0])), flush=True)
    return current
