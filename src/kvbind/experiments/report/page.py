"""Pages on what experiments found: a plain one beside each result, and that of `kvbind report`, with interactive charts.

Both are single files that need no network. Experiments are read from their `results.json`, so that a page can be made
wherever these are.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from kvbind.experiments import EXPERIMENTS
from kvbind.experiments.report.checks import check_results, read_model
from kvbind.experiments.report.contents import STATES, PagePart
from kvbind.experiments.report.finding_contents import findings_part
from kvbind.experiments.report.table_contents import read_outcome, table_part
from kvbind.experiments.subjects import SUBJECTS
from kvbind.files import blaming, inside
from kvbind.train.files import read_json, restored, spelled, write_text

RESULTS, EXPLORER = "results.json", "explorer"

_ASSETS = files("kvbind.experiments.report") / "assets"


def write_index(folder: Path, part: PagePart, links: Mapping[str, Path] | None = None) -> None:
    """Write the plain page on one result, `index.html`, with pictures and without any script.

    Args:
        folder: of the result.
        part: what came out.
        links: further pages, by name.
    """
    places = {name: href(path, folder) for name, path in (links or {}).items()}
    write_text(
        folder / "index.html", template("index.html").render(part=part, links=places, css=asset("page.css"), policy=policy())
    )


def write_page(
    path: Path, parts: Sequence[PagePart], explorer: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> None:
    """Write the interactive page on many results.

    Args:
        path: of the HTML file.
        parts: what came out.
        explorer: models to look into, as `kvbind.experiments.report.explorer` makes them.
        versions: of the packages that made the page.

    Raises:
        ImportError: plotly is not installed.
    """
    drawn = {f"{i}-{name}-{j}": chart for i, part in enumerate(parts)
             for name, found in part.charts.items() for j, chart in enumerate(found)}  # fmt: skip
    script, library = asset("page.js"), plotly()
    states = [part.state(verdict) for part in parts for verdict in part.verdicts]
    page = template("page.html").render(
        parts=list(enumerate(parts)),
        counts={state: states.count(state) for state in STATES.values()},
        links={i: href(part.place / RESULTS, path.parent) for i, part in enumerate(parts)},
        places={i: shown(relpath(part.place / RESULTS, path.parent)) for i, part in enumerate(parts)},
        data=as_script({"charts": drawn, "explorer": list(explorer)}),
        css=asset("page.css"),
        script=script,
        library=packed(library),
        policy=policy(script, library),
        versions=versions,
    )
    write_text(path, page)


def find_parts(folders: Sequence[Path]) -> tuple[list[PagePart], list[dict[str, Any]]]:
    """The results below some folders, and the models that were prepared there to be looked into.

    Args:
        folders: each holds `results.json`, or folders that do, at any depth.

    Raises:
        ValueError: a folder that is none, a file that is no result, or one that names files outside its folder.
    """
    found = {place: results for folder in folders for place, results in find_results(folder)}
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
    environment.filters["kind"] = dict(zip(STATES.values(), ("yes", "no", "open"), strict=True)).get
    return environment.get_template(name)


def asset(name: str) -> str:
    """A style sheet or script, as it stands in a page."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def as_script(data: Any) -> str:
    """Plain data as JSON that can stand inside a script element, whatever texts it holds; null for NaN and infinity."""
    text = json.dumps(spelled(data, null=True), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def href(path: Path, folder: Path) -> str:
    """The address of a file on a page in a folder, relative and of no scheme, whatever names lie between."""
    return "./" + quote(os.fsencode(Path(relpath(path, folder)).as_posix()))


def shown(path: str) -> str:
    """A path as text: bytes that are none are replaced."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def policy(*scripts: str) -> str:
    """What a page may load and run (Content Security Policy): these scripts, styles and pictures that stand in it."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    run = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {run}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def packed(library: str) -> str:
    """A script, compressed, in base64: a third of its size, and no sign in it that HTML could take for its own."""
    return base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode()


def plotly() -> str:
    """Plotly's script.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("kvbind report needs plotly: pip install plotly") from error
    library: str = get_plotlyjs()
    return library
