"""Table 1: what an inner loop that memorizes could not bear.

If fast weights were a memory of keys and values, writing it by gradient ascent would unlearn each binding, and reading it at
the key would ask a question whose answer is known already. Each is trained from scratch beside the full system: neither
costs what it should, says the paper.
"""

from __future__ import annotations

from functools import partial

from kvbind.experiments.outcomes.table import Table
from kvbind.experiments.tables.reproduce import reproduce_table
from kvbind.experiments.training import plans

TABLE = Table(
    name="table1",
    title="Table 1",
    rows=("rung0", "ascent", "key_for_query"),
    rungs=0,
    speed=False,
    about="Ascent climbs the inner loss in place of descending it; key for query reads the fast weights at the key.",
)

reproduce = partial(reproduce_table, TABLE)
planned_jobs = partial(plans.planned_jobs, TABLE.name, TABLE.rows)
