"""The paper's published numbers (arXiv 2602.21204, tables 1 and 2), to stand beside ours, by task and row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What the paper has in one row for one task.

    Attributes:
        value: in the task's metric.
        applies: False for a figure in brackets: the row's change is none for this task; the figure is
            about the row's above.
    """

    value: float
    applies: bool = True

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.applies else f"({self.value:.2f})"


def _rows(ladder: Mapping[int, float], brackets: Mapping[int, float], ascent: float, key: float) -> dict[str, Published]:
    rungs = {i: Published(x) for i, x in ladder.items()} | {i: Published(x, applies=False) for i, x in brackets.items()}
    named = {f"rung{i}": rungs[i] for i in sorted(rungs)}
    return named | {"ascent": Published(ascent), "key_for_query": Published(key)}


LANGUAGE = _rows(
    {0: 16.43, 1: 15.93, 2: 16.31, 3: 16.23, 4: 16.12, 5: 15.97, 6: 16.80}, {}, ascent=16.19, key=16.18
)  # fmt: skip
"""Perplexity of the LaCT language model, lower is better."""

VIEWS = _rows({0: 25.94, 1: 25.97, 2: 25.93, 3: 25.71, 6: 25.73}, {4: 25.70, 5: 25.70}, ascent=25.85, key=25.95)
"""PSNR of LaCT view synthesis in dB, higher is better."""

IMAGES = _rows({0: 79.34, 1: 79.63, 3: 79.39, 6: 79.54}, {2: 79.63, 4: 79.39, 5: 79.39}, ascent=79.61, key=79.18)
"""Top-1 accuracy of ViTTT in percent, higher is better."""

INNER_LOOP_SPEED: dict[str, dict[str, float]] = {
    "rung0": {"recurrent": 4.30},
    "rung1": {"recurrent": 10.60},
    "rung2": {"recurrent": 11.02, "parallel": 30.18},
    "rung3": {"recurrent": 12.95, "parallel": 49.69},
    "rung4": {"recurrent": 13.31, "parallel": 53.99},
    "rung5": {"recurrent": 14.40, "parallel": 57.28},
    "rung6": {"recurrent": 89.67, "parallel": 124.6},
}
"""Throughput of the language model's inner loop by form, in millions of tokens times heads per second.

The paper's benchmark runs 4 heads of 384 over 32,768 tokens in chunks of 2048, forward without gradients; a quarter of these
numbers is millions of tokens per second.
"""
