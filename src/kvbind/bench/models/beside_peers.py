"""`kvbind bench models`: training and decoding of whole models, each beside what a user would pick instead, in one process.

A row has the best of what its model's own steps come to, eager or as CUDA graphs, and the best of the peer's, compiled ones
included. The budget is divided: first every row gets one measurement of ours and the peer's likely best, then what time is
left goes to the other ways, compilation last, none of which may take longer than its share.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvbind.bench.harness.device_time import first_line
from kvbind.bench.harness.record import OUT_OF_TIME, answered, provenance, resumed, save
from kvbind.bench.harness.timing import DeadlineError, at_most
from kvbind.bench.models.plans import PARTS, SIZES, Found, Measurement, ModelRow, plan
from kvbind.files import shortened
from kvbind.hardware import peak_flops
from kvbind.screen import duration

Results = dict[tuple[str, str], dict[str, Found]]
"""By row and side, by way."""


def results_of(rows: Iterable[Mapping[str, Any]]) -> Results:
    """What an earlier record has found.

    Raises:
        KeyError, TypeError, ValueError: rows that are none.
    """
    results = {(row["name"], side): dict(row[f"{side}_ways"]) for row in rows for side in ("ours", "peer", "beside")}
    for ways in results.values():
        for way, found in ways.items():
            if not isinstance(found.get("value", 0.0), int | float) or not {"value", "failed", "skipped"} & set(found):
                raise ValueError(f"{way!r} holds {shortened(found)}, no value")
    return results


def row_of(row: ModelRow, results: Results, peak: float | None) -> dict[str, Any]:
    """A row of the record.

    Args:
        row: what is compared.
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


def is_answered(job: Measurement, results: Results) -> bool:
    """Whether all that a job finds is there."""
    return all(
        way in results.get((name, job.side), {}) and "skipped" not in results[name, job.side][way]
        for name in job.rows
        for way in job.ways
    )


def done(jobs: Sequence[Measurement], budget: float, results: Results) -> Iterator[Measurement]:
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
            except DeadlineError:
                if limit < left:
                    found = {way: {"failed": f"given up after {duration(limit)}"} for way in job.ways}
            except Exception as problem:  # the next may do better
                found = {way: {"failed": first_line(problem)} for way in job.ways}
        for way in job.ways:
            for name in job.rows:
                results.setdefault((name, job.side), {})[way] = found.get(way, {"skipped": OUT_OF_TIME})
        yield job


def line_of(job: Measurement, row: Mapping[str, Any]) -> str:
    """What a job found, in a line."""
    ways = row[f"{job.side}_ways"]
    told = [
        f"{way} {ways[way]['value']:,.4g}" if "value" in ways[way] else f"{way} {ways[way].get('failed', OUT_OF_TIME)}"
        for way in job.ways
    ]
    ratio = "" if row["ratio"] is None else f"; ratio {row['ratio']:.2f}"
    return f"{', '.join(job.rows)} ({row['unit']}), {job.side}: {'; '.join(told)}{ratio}"


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
        ValueError: an unknown part or size; with `resume` a file that is no record of this machine and these versions.
    """
    parts = PARTS if what == "all" else tuple(what.split(",") if isinstance(what, str) else what)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"what must be of {', '.join(PARTS)}, or all; got {what!r}")
    if sizes not in SIZES:
        raise ValueError(f"sizes must be one of {', '.join(SIZES)}; got {sizes!r}")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place, path = torch.device(name), None if out is None else Path(out)
    about = provenance(place, ("triton", "timm")) | {"config": {"sizes": sizes, "seconds": seconds, "budget": budget}}
    results: Results = {}
    if resume and path is not None and path.is_file():
        results = resumed(path, about, results_of)
    earlier = {name for name, _ in results}
    every, _ = plan(PARTS, SIZES[sizes], place, seconds)
    _, jobs = plan(parts, SIZES[sizes], place, seconds)
    rows = [row for row in every if row.part in parts or row.name in earlier]
    peak = peak_flops(torch.cuda.get_device_name(place)) if place.type == "cuda" else None

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
