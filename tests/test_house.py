"""What CONTRIBUTING says of the house: no circles, no class name twice, docstrings that say something."""

import ast
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
REGISTRIES = ("kvbind.models.families", "kvbind.models.opening")
"""What opens one of several models: functions import each where it is asked for, which is not counted."""

EMPTY = frozenset(
    "a above an as below both each for from how in is it its likewise of on one other said same that the them there "  # noqa: SIM905
    "this those to what where which with".split()
)
"""Words that alone tell nothing of an argument."""

ELSEWHERE = re.compile(r"\b(MATH|SYSTEMS|TARGETS|ARCHITECTURE|STYLE)\b(\.md| section)")
"""Documents that are not in the repository."""


@cache
def modules() -> dict[str, ast.Module]:
    """The library's modules by dotted name, parsed."""
    found = {}
    for path in sorted((SOURCE / "kvbind").rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def documented(name: str, module: ast.Module):
    """The docstrings of a module: where, and the text."""
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield f"{name}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', '')}", text


def test_every_docstring_says_something():
    empty = []
    for name, module in modules().items():
        for where, text in documented(name, module):
            if len(text.split()) < 3:
                empty.append(f"{where}: {text}")
            for argument, said in re.findall(r"^ {4,8}(\w+): (.+)$", text, re.MULTILINE):
                if set(re.findall(r"[\w`]+", said.lower())) <= EMPTY and "\n" + " " * 12 not in text.partition(said)[2][:13]:
                    empty.append(f"{where}, {argument}: {said}")
    assert not empty, "\n".join(empty)


def test_no_docstring_points_to_what_is_not_in_the_repository():
    found = [
        f"{where}: {ELSEWHERE.search(text)[0]}"
        for name, module in modules().items()
        for where, text in documented(name, module)
        if ELSEWHERE.search(text)
    ]
    assert not found, "\n".join(found)


def test_no_class_name_stands_twice():
    places = defaultdict(list)
    for name, module in modules().items():
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    twice = [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]
    assert not twice, "\n".join(twice)


def imports(name: str, module: ast.AST) -> set[str]:
    """The library's modules that a module imports, anywhere in it but for a type checker alone."""
    found = set()
    for node in ast.iter_child_nodes(module):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if name in REGISTRIES and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & modules().keys()) or {node.module}
        found |= imports(name, node)
    return found & modules().keys() - {name}


def test_no_two_modules_import_each_other():
    graph = {name: imports(name, module) for name, module in modules().items()}

    def reached(start: str) -> set[str]:
        seen, rest = set(), [start]
        while rest:
            new = graph[rest.pop()] - seen
            seen |= new
            rest += new
        return seen

    circles = [name for name in graph if name in reached(name)]
    assert not circles, f"each imports itself through others: {', '.join(circles)}"


def test_no_two_modules_of_experiments_have_one_name():
    leaves = [name.rpartition(".")[2] for name in modules() if name.startswith("kvbind.experiments.")]
    assert sorted(leaves) == sorted(set(leaves))


TREE, FILE = 10_000_000, 700_000
"""Bytes that a clone's files may have, all together and each."""


def test_a_clone_is_small():
    root = SOURCE.parent
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no clone")
    sizes = {name: path.stat().st_size for name in listed.stdout.split("\0") if name and (path := root / name).is_file()}
    assert sizes
    largest = "; the largest:\n" + "\n".join(f"{sizes[name]:9,} {name}" for name in sorted(sizes, key=sizes.get)[:-11:-1])
    how = (
        "leave out results that a command makes again on a CPU, write JSON by `laid_out` and `save`, draw pictures by "
        "`experiments/plotting.py`, and make fixtures at the smallest size that still says something"
    )
    too_large = [name for name, size in sizes.items() if size > FILE]
    assert not too_large, f"{', '.join(too_large)}: a file has at most {FILE:,} bytes; {how}{largest}"
    assert sum(sizes.values()) < TREE, f"{sum(sizes.values()):,} bytes of files, at most {TREE:,}; {how}{largest}"
