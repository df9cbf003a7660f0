"""What a page asks of results that others may have written, before it shows anything of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbind.files import read_json, shortened

PNG = "data:image/png;base64,"


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _rows(value: object) -> bool:
    return isinstance(value, list) and all(map(_texts, value))


def _verdict(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _number(value: object) -> bool:
    """A number, or None for one without bound."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _pair(value: Any) -> bool:
    return _numbers(value) and len(value) == 2


def _places(value: object) -> bool:
    """Two components of points."""
    return isinstance(value, list) and len(value) == 2 and all(map(_numbers, value)) and len(value[0]) == len(value[1])


def _filled(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _pairs(value: Any) -> bool:
    return _filled(value) and all(map(_pair, value))


Fields = Mapping[str, Callable[[object], bool]]

NEEDED: Fields = {"experiment": _text, "scale": _text}
KNOWN: Fields = {"task": lambda x: x is None or _text(x), "command": _text, "title": _text, "lead": _text}
LISTS: Mapping[str, Fields] = {
    "verdicts": {"claim": _text, "rule": _text, "found": _text, "holds": _verdict},
    "tables": {"heading": _text, "header": _texts, "rows": _rows},
    "pictures": {"heading": _text, "file": _text, "text": _text},
}

ROW: Fields = {"name": _text, "label": _text, "spec": _text, "obstacle": lambda x: x is None or _text(x), "layers": _filled}
LAYER: Fields = {"name": _text, "heads": _filled}
HEAD: Fields = {
    "name": _text, "size": lambda x: isinstance(x, int) and x > 0, "codes": _text, "most": _number, "q": _places,
    "k": _places, "k_at": _numbers, "shares": _pair, "before": _numbers, "after": _numbers, "steps": _pairs,
}  # fmt: skip
"""Of a model to look into, what the page's script reads without asking."""


def check_results(results: Mapping[str, Any], file: Path) -> None:
    """Refuse what `results.json` of an experiment cannot hold, of what pages show as it stands.

    Raises:
        ValueError: a field that is missing or of another type; the message names it and the file.
    """
    _check(results, NEEDED, str(file), KNOWN)
    for name, fields in LISTS.items():
        listed = results.get(name, [])
        if not isinstance(listed, list):
            raise ValueError(f"{file} must have a list of {name}; got {shortened(listed)}")
        for one in listed:
            _check(one, fields, f"{file}'s {name}")


def read_model(file: Path) -> dict[str, Any]:
    """A model to look into, as `kvbind reproduce explorer` writes it.

    Raises:
        ValueError: a file that holds none, or pictures that are not in it.
        OSError: a file that cannot be read.
    """
    model: dict[str, Any] = read_json(file)
    check_model(model, str(file))
    return model


def are_models(found: object) -> bool:
    """Whether plain data are a list of models to look into."""
    try:
        for model in found if isinstance(found, list) else [None]:
            check_model(model, "it")
    except ValueError:
        return False
    return True


def check_model(model: Any, where: str) -> None:
    """Refuse what is no model to look into.

    Args:
        model: plain data.
        where: they are from, for the message.

    Raises:
        ValueError: a field that is missing or of another type, or a picture that is not in it.
    """
    texts = dict.fromkeys(("title", "group", "about"), _text)
    _check(model, texts | {"rows": _filled}, where)
    _check_example(model, where)
    for i, row in enumerate(model["rows"]):
        _check(row, ROW, f"{where}'s row {i}", {"found": _text})
        for layer in row["layers"]:
            _check(layer, LAYER, f"{where}'s row {i}, in its layers,")
            for head in layer["heads"]:
                _check(head, HEAD, f"{where}'s row {i}, in its heads,")


def _check_example(model: Mapping[str, Any], where: str) -> None:
    example = model.get("example")
    if not isinstance(example, dict):
        raise ValueError(f"{where} must have an example; got {shortened(example)}")
    if example.get("kind") == "text":
        _check(example, {"tokens": _texts, "unit": _text}, f"{where}'s example")
        return
    panels = example.get("panels")
    if not isinstance(panels, list):
        raise ValueError(f"{where}'s example must have tokens or panels; got {shortened(panels)}")
    for panel in panels:
        _check(panel, {"caption": _text, "source": lambda x: isinstance(x, str) and x.startswith(PNG)}, f"{where}'s panels")


def _check(given: object, needed: Fields, where: str, known: Fields | None = None) -> None:
    """Of a mapping's fields, those that are needed, and those that are known where they are there."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must have fields; got {shortened(given)}")
    for name, fits in {**needed, **(known or {})}.items():
        if (name in needed and name not in given) or (name in given and not fits(given[name])):
            found = shortened(given[name]) if name in given else "none"
            raise ValueError(f"{where} must have {name} as kvbind reproduce writes it; got {found}")
