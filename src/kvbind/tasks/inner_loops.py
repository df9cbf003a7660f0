"""Inner loops as configurations write them: edits of one that is known."""

from __future__ import annotations

from collections.abc import Mapping
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
