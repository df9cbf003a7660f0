"""Table 2: the ladder from the full system down to standard linear attention, Table 1's two controls, and baselines.

Every row is the same model, trained from scratch on the same data in the same order from the same seed; only the inner loop
differs. Baselines, which the paper does not have, are that model with softmax attention in place of fast weights. Each is
evaluated on data that it has not seen, and throughput stands beside quality.
"""

from __future__ import annotations

from functools import partial

from kvbind.experiments.outcomes.table import Table
from kvbind.experiments.subjects.rows import BASELINES
from kvbind.experiments.tables.reproduce import reproduce_table
from kvbind.experiments.training import plans
from kvbind.inner.systems import RUNGS

TABLE = Table(
    name="table2",
    title="Table 2",
    rows=(*RUNGS, "ascent", "key_for_query", *BASELINES),
    rungs=len(RUNGS),
    speed=True,
    about=f"Each rung keeps the changes above it; rung {len(RUNGS) - 1} is standard linear attention. Of the rows below the "
    "ladder, gradient ascent and key for query change the full system; the others are models of the same size "
    "without fast weights.",
)

reproduce = partial(reproduce_table, TABLE)
planned_jobs = partial(plans.planned_jobs, TABLE.name, TABLE.rows)
