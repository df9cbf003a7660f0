"""What an experiment leaves behind: JSON, CSV, pictures, and one page that holds everything."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbind.train.checkpoint import write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 66rem; margin: 2.5rem auto; padding: 0 1.2rem }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem }}
.lead {{ color: #57606a; margin-top: 0 }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }}
th, td {{ padding: .3rem .5rem; text-align: right; white-space: pre; border-bottom: 1px solid #e3e6ea }}
th {{ color: #57606a; font-weight: 600; vertical-align: bottom }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100%; height: auto }}
pre {{ background: #f6f8fa; padding: .8rem 1rem; font-size: .82rem; line-height: 1.4 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere }}
summary {{ cursor: pointer }}
</style></head><body>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{body}
</body></html>
"""


def write_json(path: Path, data: Any) -> None:
    """Write plain data."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the union of their keys, in the order in which keys first appear."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(header, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def html_image(path: Path, description: str) -> str:
    """A PNG inside the page itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def html_details(title: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def write_page(path: Path, title: str, lead: str, sections: Mapping[str, str]) -> None:
    """Write a page that needs no other file.

    Args:
        path: where to.
        title: of the page.
        lead: one sentence below it.
        sections: HTML by heading.
    """
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections.items())
    write_text(path, _PAGE.format(title=html.escape(title), lead=html.escape(lead), body=body))
