"""Docstrings of the rooms below `tasks/`: what they point to exists, and they say what a reader would search for."""

import ast
import importlib
import importlib.util
import io
import re
import tokenize
from pathlib import Path

import pytest

import kvbind

HOUSE = Path(kvbind.__file__).parent
ROOMS = ("kernels", "forms", "layers", "models", "inner", "sequence")
FILES = [path for room in ROOMS for path in sorted((HOUSE / room).rglob("*.py"))]

ELSEWHERE = re.compile(r"\b(MATH|TARGETS|ARCHITECTURE|STYLE|SERVING)\b|(?<![`.])\bSYSTEMS\b")
"""Documents that are not in the repository; the specification is `docs/specification.md`."""

EMPTY = re.compile(r"^\s*\w+: (as said|see above|kept: as said|the same|as above)\.?$", re.MULTILINE)
"""Arguments of which nothing is said."""

WORDS = {
    "twin": "reference implementation",
    "twins": "reference implementations",
    "bank": "packed weights",
    "banks": "packed weights",
    "sweep": "pass, or scan",
    "sweeps": "passes, or scans",
    "rehearsal": "warm-up",
    "rehearsed": "warmed up",
}
"""Words of this library alone, and those of the field."""


def texts(path):
    """Docstrings and comments of a file, with their lines."""
    source = path.read_text()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def found(pattern):
    """Where a pattern is in docstrings and comments of these rooms."""
    return [
        f"{path.relative_to(HOUSE)}:{line}: {match.group()}"
        for path in FILES
        for line, text in texts(path)
        for match in re.finditer(pattern, text)
    ]


def exists(name):
    """Whether a dotted name is a module of the library, or something in one."""
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        module = ".".join(parts[:stop])
        try:
            there = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            there = False
        if there:
            thing = importlib.import_module(module) if parts[stop:] else None
            for part in parts[stop:]:
                fields = getattr(thing, "__dataclass_fields__", {}) | getattr(thing, "__annotations__", {})
                if not hasattr(thing, part):
                    return part in fields
                thing = getattr(thing, part)
            return True
    return False


def test_nothing_points_to_what_is_not_in_the_repository():
    assert found(ELSEWHERE) == []


def test_every_argument_is_described():
    assert found(EMPTY) == []


@pytest.mark.parametrize("word", WORDS)
def test_words_are_those_of_the_field(word):
    assert found(rf"(?i)\b{word}\b") == [], f"say {WORDS[word]}"


def test_what_is_named_exists():
    pytest.importorskip("triton")
    names = {}
    for path in FILES:
        for line, text in texts(path):
            for match in re.finditer(r"`(kvbind(?:\.\w+)+)", text):
                names.setdefault(match.group(1), f"{path.relative_to(HOUSE)}:{line}")
    assert len(names) > 50
    assert {name: place for name, place in names.items() if not exists(name)} == {}
