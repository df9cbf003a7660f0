"""Hooks of the documentation site: the repository's own pages as part of it, and equations as MathML, without scripts."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PROJECT = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
"""Pages at the repository's root, and where the site has them."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages."""
    for name, target in PROJECT.items():
        if target not in files.src_uris:
            text = linked((ROOT / name).read_text(encoding="utf-8"), ROOT, files)
            files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them."""
    if page.file.generated_by is not None or "/" in page.file.src_uri:
        return markdown
    return linked(markdown, ROOT / "docs", files)


def linked(markdown: str, folder: Path, files: Files) -> str:
    """Links from a page in `folder` to a page or picture of the site; to another file of the repository as its name alone.

    A link to what is nowhere stays, for the build to refuse.
    """

    def target(found: re.Match[str]) -> str:
        picture, words, path, anchor = found.groups()
        if "://" in path or path.startswith("mailto:"):
            return found[0]
        place = (folder / path).resolve()
        if not place.exists() or not place.is_relative_to(ROOT):
            return found[0]
        name = str(place.relative_to(ROOT))
        inside = PROJECT.get(name, name.removeprefix("docs/"))
        if name in PROJECT or picture or (name.startswith("docs/") and inside in files.src_uris):
            return f"{picture}[{words}]({inside}{anchor or ''})"
        return words if words.startswith("`") or words != name else f"`{name}`"

    return LINK.sub(target, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations as MathML."""

    def typeset(found: re.Match[str]) -> str:
        written = html.unescape(found[2]).strip()
        return convert(written[2:-2].strip(), display="block" if found[1] == "div" else "inline")

    return EQUATION.sub(typeset, content)
