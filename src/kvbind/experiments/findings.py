"""What a figure or a check of the paper leaves behind: verdicts by stated rules, pictures in two formats, and a page."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console

from kvbind.experiments import figures, report
from kvbind.experiments.provenance import command, machine, versions
from kvbind.inner.value import check_positive_int
from kvbind.train.checkpoint import write_with


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `kvbind reproduce` asks of an experiment.

    Attributes:
        task: what was trained.
        scale: how large.
        seeds: how many, counted from 0.
        out: the report's folder, whose `trained/` holds the training runs; default `runs/EXPERIMENT-TASK-SCALE`, with the
            runs in `runs/trained`, where other experiments find them.
        fresh: train everything anew.
        data: another source of data.
        workers: rows trained at once.
        overrides: further `key=value` edits of every run's configuration.
        console: where progress and verdicts are shown; None for nowhere.
    """

    task: str = "language"
    scale: str = "smoke"
    seeds: int = 1
    out: Path | None = None
    fresh: bool = False
    data: str | None = None
    workers: int | None = None
    overrides: Sequence[str] = ()
    console: Console | None = None
    started: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        check_positive_int("seeds", self.seeds)

    def say(self, text: str) -> None:
        """Show a line."""
        if self.console:
            self.console.print(text, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Verdict:
    """What the numbers say to a claim.

    Attributes:
        claim: in words.
        rule: when it holds.
        holds: whether it does.
        found: the numbers that decided.
    """

    claim: str
    rule: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Findings:
    """An experiment that was made.

    Attributes:
        experiment: its name.
        title: of the page.
        lead: a sentence or two below it.
        config: what it was made with, as plain data.
        data: its own numbers, as `results.json` holds them.
        verdicts: what they say.
        tables: header and lines by heading.
        pictures: a PNG's name and its description, by heading.
    """

    experiment: str
    title: str
    lead: str
    config: Any
    data: Mapping[str, Any]
    verdicts: Sequence[Verdict]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]
    pictures: Mapping[str, tuple[str, str]]


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the house style, written as PNG to `path` and as SVG beside it.

    Args:
        path: ends in .png.
        width: in inches.
        height: in inches.
    """
    with figures.figure(path, width, height) as fig:
        yield fig
        write_with(path.with_suffix(".svg"), fig.savefig)


def write_findings(out: Path, request: Request, findings: Findings, device: torch.device) -> dict[str, Any]:
    """Write `results.json` and the page; the pictures are there already.

    Args:
        out: folder of the report.
        request: what was asked.
        findings: what came out.
        device: that did the work.

    Returns:
        What `results.json` holds.
    """
    results = {
        "experiment": findings.experiment,
        "task": request.task,
        "scale": request.scale,
        "seeds": list(range(request.seeds)),
        "command": command(),
        "wall_seconds": round(time.monotonic() - request.started, 1),
        "versions": versions(),
        "machine": machine(device),
        "config": findings.config,
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        **findings.data,
    }
    report.write_json(out / "results.json", results)
    lines = [[x.claim, "holds" if x.holds else "does not hold", x.found, x.rule] for x in findings.verdicts]
    sections = {"Verdicts": wrapped(report.html_table(["claim", "verdict", "found", "it holds if"], lines))}
    for heading, (file, text) in findings.pictures.items():
        sections[heading] = report.html_image(out / file, text)
    for heading, (header, rows) in findings.tables.items():
        sections[heading] = report.html_table(header, rows)
    sections["How it was made"] = (
        f"<pre>{html.escape(results['command'])}</pre>"
        + report.html_details("configuration", yaml.safe_dump(findings.config, sort_keys=False))
        + report.html_details("versions and machine", json.dumps([results["versions"], results["machine"]], indent=2))
    )
    report.write_page(out / "index.html", findings.title, findings.lead, sections)
    for verdict in findings.verdicts:
        request.say(f"{'holds' if verdict.holds else 'does not hold'}: {verdict.claim}: {verdict.found}")
    request.say(f"{results['wall_seconds']:.0f} s. Everything is in {out}; start with {out / 'index.html'}")
    return results


def wrapped(table: str) -> str:
    """An HTML table of sentences, whose cells break lines."""
    return f"<style>.words th, .words td {{ white-space: normal; text-align: left }}</style><div class='words'>{table}</div>"
