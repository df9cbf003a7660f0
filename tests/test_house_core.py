"""The rooms of the library below `tasks/`: no two classes of one name, and no circles of imports."""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import pytest

import kvbind

HOUSE = Path(kvbind.__file__).parent
ROOMS = ("kernels", "forms", "layers", "models", "inner", "sequence")
MODULES = {
    ".".join(("kvbind", *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sorted((HOUSE / room).rglob("*.py"))
}


REGISTRIES = {"kvbind.models.families", "kvbind.models.opening"}
"""What opens one of several models: each is imported where it is asked for, and not counted."""


def imported(module):
    """The modules of these rooms that a module imports, wherever in it, but for those that types alone need."""
    tree, found = ast.parse(MODULES[module].read_text()), set()
    if module in REGISTRIES:
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # a name of a package may be a module of its own
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return found & MODULES.keys() - {module}


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_modules_import_each_other():
    try:
        order = list(graphlib.TopologicalSorter({name: imported(name) for name in MODULES}).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) == len(MODULES)
