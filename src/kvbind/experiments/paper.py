"""The paper's published numbers (arXiv 2602.21204, tables 1 and 2), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row of the paper's tables; None where it has no entry.

    Attributes:
        language: perplexity of the LaCT language model, lower is better.
        views: PSNR of LaCT view synthesis in dB, higher is better.
        images: top-1 accuracy of ViTTT in percent, higher is better.
        recurrent: throughput of the recurrent form, millions of tokens per second.
        parallel: throughput of the parallel form, millions of tokens per second.
    """

    language: float | None = None
    views: float | None = None
    images: float | None = None
    recurrent: float | None = None
    parallel: float | None = None


PUBLISHED = {
    "rung0": Published(16.43, 25.94, 79.34, 4.30, None),
    "rung1": Published(15.93, 25.97, 79.63, 10.60, None),
    "rung2": Published(16.31, 25.93, None, 11.02, 30.18),
    "rung3": Published(16.23, 25.71, 79.39, 12.95, 49.69),
    "rung4": Published(16.12, None, None, 13.31, 53.99),
    "rung5": Published(15.97, None, None, 14.40, 57.28),
    "rung6": Published(16.80, 25.73, 79.54, 89.67, 124.6),
    "ascent": Published(16.19, 25.85, 79.61),
    "key_for_query": Published(16.18, 25.95, 79.18),
}
"""By the names that `kvbind.systems.ladder` and `kvbind.experiments.table2.variants` give."""
