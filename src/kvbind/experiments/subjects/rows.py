"""The rows of the paper's tables, and what each changes."""

from __future__ import annotations

from collections.abc import Sequence

from kvbind.experiments.subjects import Subject
from kvbind.tasks.inner_loops import SOFTMAX, WINDOW

LABELS = {
    "rung0": "the full system",
    "rung1": "last layer alone updated",
    "rung2": "no weight normalization",
    "rung3": "one linear layer",
    "rung4": "no per-token rate",
    "rung5": "no momentum",
    "rung6": "no orthogonalization",
    "ascent": "gradient ascent",
    "key_for_query": "key for query",
    WINDOW: "window attention alone",
    SOFTMAX: "full softmax attention",
}
"""What each row changes: each rung keeps the changes above it, the next two change the full system, and the last two are
`BASELINES`."""

BASELINES = (WINDOW, SOFTMAX)
"""Rows that the paper does not have: models of the same size without fast weights."""

NO_FAST_WEIGHTS = {"fast_weights": False}
"""In the place of a baseline's inner loop."""


def row_labels(names: Sequence[str], subject: Subject) -> dict[str, str]:
    """What each row changes, in the task's words."""
    return {name: subject.labels.get(name, LABELS[name]) for name in names}
