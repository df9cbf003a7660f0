"""Inner loops as configurations write them: edits of one that is known, and the rows of the paper's tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kvbind.inner import InnerLoop, systems


def edited(start: InnerLoop, edits: Mapping[str, Any]) -> InnerLoop:
    """An inner loop with some fields changed, as plain data.

    Args:
        start: what is edited.
        edits: values by field name; "system" names another inner loop to start from. A value that is itself a mapping edits
            the field's own fields, unless it is of another kind: `{"orthogonalize": {"dtype": "float32"}}`.

    Raises:
        ValueError, TypeError: an unknown system or field (the message gives the nearest known one), or a value that does not
            fit.
    """
    changes = dict(edits)
    whole = (systems.named(changes.pop("system")) if "system" in changes else start).to_dict()
    for name, value in changes.items():
        old = whole.get(name)
        same_kind = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        )
        whole[name] = old | value if same_kind else value
    return InnerLoop.from_dict(whole)


def table_rows(full: InnerLoop, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The rows of the paper's tables 1 and 2 for a model with one inner loop, as plain data.

    Args:
        full: the full system's.
        without: rungs that do not apply.

    Returns:
        By name: "rung0" to "rung6", the ladder; "ascent" and "key_for_query", each one change of the full system.
    """
    rungs = {name: rung for name, rung in systems.ladder(full).items() if name not in without}
    controls = {"ascent": full.replace(direction="ascent"), "key_for_query": full.replace(query="key")}
    return {name: inner.to_dict() for name, inner in (rungs | controls).items()}
