"""Pages on what experiments found: one beside each result, and that of `kvbind report` on all of them, with an explorer.

Both are single files that need no network; only the explorer has a script. Experiments are read from their `results.json`
and runs from their metrics, so that a page can be made wherever these are.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from kvbind.experiments import EXPERIMENTS
from kvbind.experiments.report import svg
from kvbind.experiments.report.checks import check_results, read_model
from kvbind.experiments.report.contents import PagePart, shown
from kvbind.experiments.report.finding_contents import findings_part
from kvbind.experiments.report.page_cache import PageCache
from kvbind.experiments.report.run_contents import RUN, find_runs, run_part
from kvbind.experiments.report.sections import ONE_SEED, Section, sections_of
from kvbind.experiments.report.table_contents import read_outcome, table_part
from kvbind.experiments.subjects import SUBJECTS
from kvbind.files import blaming, inside
from kvbind.train.files import read_json, restored, spelled, write_text

RESULTS, EXPLORER = "results.json", "explorer"

LADDER = "The ladder"
"""Heading of the chart that stands on top of a page too."""

WORDS = {True: "holds", False: "does not hold", None: "not decided"}
KINDS = {True: "yes", False: "no", None: "open"}
"""Of a verdict: what a page says, and how its style sheet calls that."""

UNKNOWN = "unknown"
"""The version of a package that had none."""

_ASSETS = files("kvbind.experiments.report") / "assets"


def write_index(folder: Path, part: PagePart, links: Mapping[str, Path] | None = None) -> None:
    """Write the page on one result, `index.html`, without any script.

    Args:
        folder: of the result.
        part: what came out.
        links: further pages, by name.
    """
    places = {name: href(path, folder) for name, path in (links or {}).items()}
    section = sections_of([part])[0]
    write_text(
        folder / "index.html",
        template("index.html").render(part=part, section=section, links=places, css=style(), policy=policy()),
    )


def write_page(
    path: Path, parts: Sequence[PagePart], explorer: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> None:
    """Write the page on many results.

    Args:
        path: of the HTML file.
        parts: what came out.
        explorer: models to look into, as `kvbind.experiments.studies.explorer` makes them.
        versions: of the packages that made the page.
    """
    script, sections = asset("page.js"), sections_of(parts)
    page = template("page.html").render(
        sections={
            "Tables": [own for own in sections if own.name.startswith("table")],
            "Figures and checks": [own for own in sections if not own.name.startswith(("table", RUN))],
            "Training runs": [own for own in sections if own.name.startswith(RUN)],
        },
        summary=summary(sections),
        links={part.place: href(part.place / (RESULTS if part.experiment != RUN else ""), path.parent) for part in parts},
        places={part.place: shown(relpath(part.place, path.parent)) for part in parts},
        run=RUN,
        data=as_script({"explorer": list(explorer)}),
        css=style(),
        script=script,
        policy=policy(script),
        versions=versions,
    )
    write_text(path, page)


def summary(sections: Sequence[Section]) -> dict[str, Any]:
    """What stands on top of a page: how many claims hold, on what and when, and the ladder at its largest scale."""
    parts = [part for section in sections for part in section.parts]
    counts = {word: sum(own.counts[holds] for own in sections) for holds, word in WORDS.items()}
    dates = sorted(part.date for part in parts if part.date)
    ladder = next((part for section in sections for part in section.parts if LADDER in part.charts), None)
    return {
        "title": headline(sections),
        "counts": counts,
        "claims": sum(counts.values()),
        "sections": sum(section.name.startswith(RUN) is False for section in sections),
        "runs": sum(section.name.startswith(RUN) for section in sections),
        "devices": list(dict.fromkeys(part.device for part in parts if part.device)),
        "versions": {name: known(part.made.get(name, UNKNOWN) for part in parts) for name in ("kvbind", "torch")},
        "dates": dates[:1] + dates[-1:] if len(set(dates)) > 1 else dates[:1],
        "ladder": ladder,
        "heading": LADDER,
    }  # fmt: skip


def headline(sections: Sequence[Section]) -> str:
    """What a page comes to: how many claims hold, do not hold and are not decided; first of all that none is, where so."""
    claims = [claim for section in sections for claim in section.claims]
    if not claims:
        return "Results" if any(not section.name.startswith(RUN) for section in sections) else "Training runs"
    said = f"{len(claims)} claim{'' if len(claims) == 1 else 's'}"
    hold, fail, undecided = (sum(claim.holds is holds for claim in claims) for holds in WORDS)
    if undecided == len(claims):
        why = ": one seed decides nothing" if all(claim.reason == ONE_SEED for claim in claims) else ""
        return f"{said}, {'none' if undecided > 1 else 'not'} decided yet{why}"
    return (
        f"{said}: {hold} hold{'s' if hold == 1 else ''}, {fail} {'does' if fail == 1 else 'do'} not, "
        f"{undecided} {'is' if undecided == 1 else 'are'} not decided"
    )


def known(versions: Iterable[str]) -> list[str]:
    """Versions in their order, each once, without those that nobody knows."""
    return sorted({version for version in versions if version != UNKNOWN})


def find_parts(folders: Sequence[Path], cache: PageCache | None = None) -> tuple[list[PagePart], list[dict[str, Any]]]:
    """The results below some folders, and the models that were prepared there to be looked into.

    Args:
        folders: each holds `results.json`, or folders that do, at any depth.
        cache: where samples of what models write are; default a new one that stores nothing.

    Raises:
        ValueError: a folder that is none, a file that is no result, or one that names files outside its folder.
    """
    found = {place: results for folder in folders for place, results in find_results(folder)}
    runs: dict[Path, Path] = {}
    for folder in folders:
        for typed in find_runs(folder):
            runs.setdefault(typed.resolve(), typed)
    cache = cache or PageCache()
    ordered = sorted(found, key=lambda place: rank(found[place], place))
    parts, models = [], []
    for place in ordered:
        results = found[place]
        if results["experiment"] == EXPLORER:
            models.append(restored(read_model(inside(place, results.get("models"), place / RESULTS))))
            continue
        with blaming(place / RESULTS, "what kvbind reproduce writes"):
            name = results["experiment"]
            table = "rows" in results and name.startswith("table") and name in EXPERIMENTS
            parts.append(table_part(read_outcome(results), place) if table else findings_part(results, place))
    for place, typed in runs.items():
        with blaming(place, "what kvbind train writes"):
            parts.append(run_part(place, typed, cache))
    return parts, models


def find_results(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders below `folder`, itself among them, that hold an experiment's results, and these."""
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder with results of kvbind reproduce; there is no {str(folder)!r}")
    for file in sorted(folder.rglob(RESULTS)):
        results = read_json(inside(file.parent, RESULTS))
        # an overview over several tasks holds the results of others, which have folders of their own
        if isinstance(results, dict) and "experiment" in results:
            check_results(results, file)
            yield file.parent.resolve(), results


def rank(results: Mapping[str, Any], place: Path) -> tuple[int, int, Any, str]:
    """Where results stand on a page: as experiments and tasks are listed."""
    names, tasks = list(EXPERIMENTS), [None, *SUBJECTS]
    name, task = results["experiment"], results["task"]
    return (
        names.index(name) if name in names else len(names),
        tasks.index(task) if task in tasks else len(tasks),
        results["scale"],
        place.as_posix(),
    )


def template(name: str) -> jinja2.Template:
    """A template among the assets."""
    loader = jinja2.PackageLoader("kvbind.experiments.report", "assets")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["kind"] = KINDS.get
    environment.filters |= {"word": WORDS.get, "as_numbers": svg.numbers}
    environment.globals |= {"draw": svg.draw, "order_of": svg.order_of, "legend": svg.legend}
    return environment.get_template(name)


def asset(name: str) -> str:
    """A style sheet or script, as it stands in a page."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def style() -> str:
    """The style sheet, with a rule for each series that a legend may hide."""
    hidden = (f".group:has(.legend input[value='{i}']:not(:checked)) .s{i}" for i in range(svg.SERIES))
    return f"{asset('page.css')}{','.join(hidden)} {{ display: none }}\n"


def as_script(data: Any) -> str:
    """Plain data as JSON that can stand inside a script element, whatever texts it holds; null for NaN and infinity."""
    text = json.dumps(spelled(data, null=True), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def href(path: Path, folder: Path) -> str:
    """The address of a file on a page in a folder, relative and of no scheme, whatever names lie between."""
    return "./" + quote(os.fsencode(Path(relpath(path, folder)).as_posix()))


def policy(*scripts: str) -> str:
    """What a page may load and run (Content Security Policy): these scripts, styles and pictures that stand in it."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    run = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {run}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
