"""Inner loops as configurations write them: edits of one that is known, and the rows of the paper's tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from kvbind.inner import InnerLoop, systems
from kvbind.inner.orthogonalize import NewtonSchulz


def edited(start: InnerLoop, edits: Mapping[str, Any], fits: Callable[[InnerLoop], None] | None = None) -> InnerLoop:
    """An inner loop with some fields changed, as plain data.

    Args:
        start: what is edited.
        edits: values by field name; "system" names another inner loop to start from, with its published settings; the
            system that `start` is already is taken with `start`'s chunk. A value that is itself a mapping edits the field's
            own fields, unless it is of another kind: `{"orthogonalize": {"dtype": "float32"}}`. Where the field is None
            there is nothing to edit: a kind (`"NewtonSchulz"`), or a mapping with one, gives it a value.
        fits: raises where the model cannot run an inner loop; its message gets the system's name.

    Raises:
        ValueError, TypeError: an unknown system or field (the message gives the nearest known one), a value that does not
            fit, or an edit of a part that is not there.
    """
    changes = dict(edits)
    name = changes.pop("system", None)
    if "system" in edits:
        start = _named_from(name, start)
    whole = start.to_dict()
    for field, value in changes.items():
        old = whole.get(field)
        if old is None and isinstance(value, dict) and field in PARTS:
            _check_whole(field, value, "the inner loop" if name is None else f"system {name!r}")
        same_kind = (
            isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        )
        whole[field] = old | value if same_kind else value
    inner = InnerLoop.from_dict(whole)
    if fits is not None:
        try:
            fits(inner)
        except ValueError as error:
            if name is None:
                raise
            raise ValueError(f"system {name!r} does not run in this model: {error}") from error
    return inner


PARTS = {"orthogonalize": NewtonSchulz}
"""The fields that hold a value with fields of its own, or None."""


def _named_from(name: str, start: InnerLoop) -> InnerLoop:
    """The system of that name, or `start` where it is that system with another chunk or other spans."""
    system = systems.named(name)
    same = (system.chunk is None) == (start.chunk is None) and set(start.differing(system)) <= {"chunk", "refresh"}
    return start if same else system


def _check_whole(field: str, value: dict[str, Any], where: str) -> None:
    """Raise `ValueError` unless `value` says all of a part that is not there yet."""
    kind = PARTS[field]
    if "kind" not in value and not set(kind.field_names()) <= set(value):
        raise ValueError(
            f"{field} must not be edited by {', '.join(value) or 'nothing'} alone: {where} has {field}=None; {field}="
            f"{kind.__name__}, or a mapping with kind: {kind.__name__}, would add it"
        )


def beneath(file: Any, edits: Any, branches: Collection[str] = ()) -> Any:
    """What is left of a configuration file under further edits: its edits of an inner loop as `edits_beneath` has them.

    Args:
        file: the file's keys, as plain data; inner loops are at `model.inner`.
        edits: the further ones.
        branches: where a model has several inner loops, their keys in `model.inner`.
    """
    below, above = (tree.get("model") if isinstance(tree, dict) else None for tree in (file, edits))
    below, above = (tree.get("inner") if isinstance(tree, dict) else None for tree in (below, above))
    if not isinstance(below, dict) or not isinstance(above, dict):
        return file
    if branches:
        left = below | {key: edits_beneath(below[key], above.get(key)) for key in branches if key in below}
    else:
        left = edits_beneath(below, above)
    return {**file, "model": {**file["model"], "inner": left}}


def edits_beneath(below: Any, above: Any) -> Any:
    """What is left of a file's edits of an inner loop under further edits.

    Where those name another system, the file's edits were of an inner loop that is gone. All that stays is the precision of
    its orthogonalization, which is the machine's matter, if the named system has one. Likewise another network's fields go
    where a network of another kind is named.

    Args:
        below: the file's edits, as `edited` takes them.
        above: the further ones. Whatever is no mapping on either side is left to later checks.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return below
    if "system" in above and above["system"] != below.get("system"):
        part = below.get("orthogonalize")
        kept = {"dtype": part["dtype"]} if isinstance(part, dict) and "dtype" in part else {}
        return {"orthogonalize": kept} if kept and systems.named(above["system"]).orthogonalize is not None else {}
    named = _kind(above.get("network"))
    if named is not None and named != _kind(below.get("network")):
        return {name: value for name, value in below.items() if name != "network"}
    return below


def _kind(network: Any) -> Any:
    return network.get("kind") if isinstance(network, dict) else network


WINDOW, SOFTMAX = "window", "softmax"
"""Rows beside the paper's: a model without fast weights, of window attention alone; and with full softmax attention in
their place. Each task's `baselines` gives those that it has, as edits of `model.fields`."""


UNIT = 8
"""Widths of matrices are multiples of it, as GPUs like them."""


def more_hidden(kind: Callable[[Any], nn.Module], full: Any, without: Any, entries: int) -> int:
    """How many more hidden units an MLP gets for what a block lacks in parameters, a multiple of `UNIT`.

    Args:
        kind: makes a block of a configuration.
        full: the full system's.
        without: that of the same without fast weights.
        entries: parameters of a hidden unit.
    """
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in kind(config).parameters()) for config in (full, without)]
    return UNIT * round((sizes[0] - sizes[1]) / (UNIT * entries))


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
