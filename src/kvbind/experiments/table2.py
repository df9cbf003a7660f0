"""Table 2: the ladder from the full system down to standard linear attention, and Table 1's two controls.

Every row is the same model, trained from scratch on the same data in the same order from the same seed; only the inner loop
differs. Each is evaluated on data that it has not seen, and throughput stands beside quality.
"""

from __future__ import annotations

from functools import partial

from kvbind.experiments.reproduce import reproduce_table
from kvbind.experiments.tables import Table
from kvbind.inner.systems import RUNGS

TABLE = Table(
    name="table2",
    title="Table 2",
    rows=(*RUNGS, "ascent", "key_for_query"),
    rungs=len(RUNGS),
    speed=True,
    about=f"Each rung keeps the changes above it; rung {len(RUNGS) - 1} is standard linear attention. The rows below the "
    "ladder change the full system.",
)

reproduce = partial(reproduce_table, TABLE)
