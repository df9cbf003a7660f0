"""What a figure or a check of the paper leaves behind: verdicts by stated rules, pictures in two formats, and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.report import page
from kvbind.experiments.report.finding_contents import findings_part
from kvbind.experiments.request import Request
from kvbind.experiments.results.files import write_json
from kvbind.provenance import command, machine, today, versions
from kvbind.screen import duration


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
        "date": today(),
        "wall_seconds": round(time.monotonic() - request.started, 1),
        "versions": versions(),
        "machine": machine(device),
        "config": findings.config,
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        "title": findings.title,
        "lead": findings.lead,
        "tables": [{"heading": name, "header": header, "rows": rows} for name, (header, rows) in findings.tables.items()],
        "pictures": [{"heading": name, "file": file, "text": text} for name, (file, text) in findings.pictures.items()],
        **findings.data,
    }
    write_json(out / "results.json", results)
    page.write_index(out, findings_part(results, out))
    for verdict in findings.verdicts:
        request.say(f"{verdict.word}: {verdict.claim}: {verdict.found}")
    request.say(f"{duration(results['wall_seconds'])}. Everything is in {out}; start with {out / 'index.html'}")
    return results
