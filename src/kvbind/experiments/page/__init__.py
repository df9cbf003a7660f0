"""Pages on what experiments found: a plain one beside each result, and that of `kvbind report`, with interactive charts.

Both are single files that need no network. Experiments are read from their `results.json`, so that a page can be made
wherever these are.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from os.path import relpath
from pathlib import Path
from typing import Any

import jinja2

from kvbind.experiments import EXPERIMENTS
from kvbind.experiments.page.findings import findings_part
from kvbind.experiments.page.parts import STATES, Grid, Part, Picture
from kvbind.experiments.page.tables import read_outcome, table_part
from kvbind.experiments.subjects import SUBJECTS
from kvbind.train.checkpoint import write_text

__all__ = ["Grid", "Part", "Picture", "find_parts", "table_part", "write_index", "write_page"]

RESULTS, EXPLORER = "results.json", "explorer"

_ASSETS = files("kvbind.experiments.page") / "assets"


def write_index(folder: Path, part: Part, links: Mapping[str, Path] | None = None) -> None:
    """Write the plain page on one result, `index.html`, with pictures and without any script.

    Args:
        folder: of the result.
        part: what came out.
        links: further pages, by name.
    """
    places = {name: Path(relpath(path, folder)).as_posix() for name, path in (links or {}).items()}
    write_text(folder / "index.html", template("index.html").render(part=part, links=places, css=asset("page.css")))


def write_page(
    path: Path, parts: Sequence[Part], explorer: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> None:
    """Write the interactive page on many results.

    Args:
        path: where to.
        parts: what came out.
        explorer: models to look into, as `kvbind.experiments.explorer` makes them.
        versions: of the packages that made the page.

    Raises:
        ImportError: plotly is not installed.
    """
    drawn = {f"{i}-{name}-{j}": chart for i, part in enumerate(parts)
             for name, found in part.charts.items() for j, chart in enumerate(found)}  # fmt: skip
    states = [part.state(verdict) for part in parts for verdict in part.verdicts]
    page = template("page.html").render(
        parts=list(enumerate(parts)),
        counts={state: states.count(state) for state in STATES.values()},
        links={i: Path(relpath(part.place, path.parent)).as_posix() for i, part in enumerate(parts)},
        data=as_script({"charts": drawn, "explorer": list(explorer)}),
        css=asset("page.css"),
        script=asset("page.js"),
        library=packed_library(),
        versions=versions,
    )
    write_text(path, page)


def find_parts(folders: Sequence[Path]) -> tuple[list[Part], list[dict[str, Any]]]:
    """The results below some folders, and the models that were prepared there to be looked into.

    Args:
        folders: each holds `results.json`, or folders that do, at any depth.

    Raises:
        ValueError: a folder that is none, or a file that is no result.
    """
    found = {place: results for folder in folders for place, results in find_results(folder)}
    ordered = sorted(found, key=lambda place: rank(found[place], place))
    parts, models = [], []
    for place in ordered:
        results = found[place]
        if results["experiment"] == EXPLORER:
            models.append(json.loads((place / results["models"]).read_text(encoding="utf-8")))
        elif "rows" in results and results["experiment"].startswith("table"):
            parts.append(table_part(read_outcome(results), place))
        else:
            parts.append(findings_part(results, place))
    return parts, models


def find_results(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folders below `folder`, itself among them, that hold an experiment's results, and these."""
    if not folder.is_dir():
        raise ValueError(f"folder must be a folder with results of kvbind reproduce; there is no {str(folder)!r}")
    for file in sorted(folder.rglob(RESULTS)):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} must be JSON, as kvbind reproduce writes it; {error}") from error
        # an overview over several tasks holds the results of others, which have folders of their own
        if isinstance(results, dict) and "experiment" in results:
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
    loader = jinja2.PackageLoader("kvbind.experiments.page", "assets")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["kind"] = dict(zip(STATES.values(), ("yes", "no", "open"), strict=True)).get
    return environment.get_template(name)


def asset(name: str) -> str:
    """A style sheet or script, as it stands in a page."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def as_script(data: Any) -> str:
    """Plain data as JSON that can stand inside a script element, whatever texts it holds."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed_library() -> str:
    """Plotly's script, compressed, in base64: a third of its size, and no sign in it that HTML could take for its own.

    Raises:
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("kvbind report needs plotly: pip install plotly") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()
