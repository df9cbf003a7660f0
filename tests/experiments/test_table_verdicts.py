import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbind.experiments.outcomes.table import TableRow
from kvbind.experiments.outcomes.verdicts import beyond, judge, speeds_up, worsening
from kvbind.experiments.subjects import SUBJECTS
from kvbind.experiments.subjects.published import Published
from kvbind.experiments.tables.table1 import TABLE as TABLE1
from kvbind.experiments.tables.table2 import TABLE as TABLE2
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.trained_rows import unfinished

LANGUAGE, IMAGES, VIEWS = (SUBJECTS[name] for name in ("language", "images", "views"))


def row(name, subject, values, speeds=None, applies=True):
    runs = tuple(Run(Path(name), {"held_out": {subject.metric.name: x}}, reused=True) for x in values)
    inner = {"kind": name} if applies else None
    return TableRow(
        name, name, subject.paper.get(name, Published(1.0)), inner, runs, speeds or {}, {}, tuple(range(len(runs)))
    )


def verdicts(subject, full, ascent, key=(1.0,)):
    rows = [row("rung0", subject, full), row("ascent", subject, ascent), row("key_for_query", subject, key)]
    return judge(TABLE1, subject, rows)


@pytest.mark.parametrize(
    ("ascent", "holds"),
    [
        ((9.99, 10.0, 10.01), True),  # the same
        ((9.0, 9.01, 9.02), True),  # better
        ((10.99, 11.0, 11.01), False),  # a tenth worse
        ((10.26, 10.25, 10.24), None),  # on the limit of 2.5%
        ((9.0, 10.0, 11.0), None),  # too far apart
        ((10.0,), None),
        ((), None),
    ],
)
def test_a_cost_is_ruled_out_by_two_standard_errors_or_it_is_not_decided(ascent, holds):
    found = verdicts(LANGUAGE, (9.99, 10.0, 10.01), ascent)
    assert len(found) == 2
    assert found[0].holds is holds
    assert "2.5%" in found[0].claim
    assert "2 standard errors" in found[0].rule
    assert "paper -1.5%" in found[0].found


@pytest.mark.parametrize("subject", [IMAGES, VIEWS])
def test_higher_is_better_where_it_is(subject):
    for change, holds in ((1.0, True), (-1.0, False)):
        found = verdicts(subject, (30.0, 30.01), (30.0 + change, 30.01 + change))
        assert found[0].holds is holds
        assert f"here {change:+.2f}" in found[0].found


def test_one_seed_decides_nothing_and_its_numbers_are_told():
    for full, other in (((10.0,), (9.0, 9.01)), ((10.0, 10.01), (9.0,)), ((), (9.0, 9.01))):
        assert verdicts(LANGUAGE, full, other)[0].holds is None
    assert "here -10.00%, 1 seed;" in verdicts(LANGUAGE, (10.0,), (9.0,))[0].found


def test_rows_that_do_not_apply_get_no_verdict():
    rows = [row(name, VIEWS, (20.0, 20.1), applies=name not in ("rung4", "rung5")) for name in TABLE2.rows]
    claims = [verdict.claim for verdict in judge(TABLE2, VIEWS, rows)]
    assert len(claims) == 6 + 1
    assert not any(claim.startswith(("rung4", "rung5")) for claim in claims)


@given(st.floats(-5, 5), st.floats(0.01, 2))
def test_a_distance_is_decided_where_it_is_two_spreads_away(distance, spread):
    decided = beyond(distance, spread)
    assert (decided is None) == (abs(distance) < 2 * spread)
    assert decided is None or decided == (distance > 0)


@given(st.lists(st.floats(1, 50), min_size=2, max_size=5), st.lists(st.floats(1, 50), min_size=2, max_size=5))
def test_to_be_worse_one_way_is_to_be_better_the_other(one, other):
    a, b = row("rung0", VIEWS, one), row("ascent", VIEWS, other)
    there, back = worsening(b, a, VIEWS.metric), worsening(a, b, VIEWS.metric)
    assert there[0] == pytest.approx(-back[0], abs=1e-9)
    assert there[1] == pytest.approx(back[1])
    assert there[2] == back[2] == min(len(one), len(other))


def test_runs_are_compared_seed_by_seed():
    full = replace(row("rung0", VIEWS, (10.0, 20.0, 30.0)), seeds=(0, 1, 2))
    mine = replace(row("ascent", VIEWS, (29.0, 19.5)), seeds=(2, 1))
    worse, error, seeds = worsening(mine, full, VIEWS.metric)
    assert (worse, seeds) == (0.75, 2)
    assert error == pytest.approx(0.25)
    other = worsening(replace(mine, runs=(), seeds=()), full, VIEWS.metric)
    assert (math.isnan(other[0]), *other[1:]) == (True, None, 0)


def ladder(means, spread=0.01):
    # what one seed does to rung 1 it does the other way to the others
    rows = [row(f"rung{i}", VIEWS, (x - sign * spread, x + sign * spread))
            for i, (x, sign) in enumerate(zip(means, (1, -1, 1, 1, 1, 1, 1), strict=True))]  # fmt: skip
    return judge(TABLE2, VIEWS, [*rows, *(row(name, VIEWS, (1.0, 1.1)) for name in ("ascent", "key_for_query"))])


@pytest.mark.parametrize(
    ("means", "spread", "holds"),
    [
        ((20, 21, 20, 20, 20, 20, 20), 0.01, True),
        ((20, 21, 20, 20, 20, 20, 22), 0.01, False),
        ((20, 21, 20, 20, 20, 20, 21.001), 0.01, None),
        ((20, 21, 20, 20, 20, 20, 20), 2.0, None),
    ],
)
def test_the_best_rung_is_the_one_that_all_others_are_clearly_worse_than(means, spread, holds):
    (verdict,) = [x for x in ladder(means, spread) if "best rung" in x.claim]
    assert verdict.holds is holds
    best = max(range(7), key=means.__getitem__)
    assert f"best to worst: rung{best} {means[best]:.2f}" in verdict.found


@pytest.mark.parametrize(("ratio", "holds"), [(1.5, True), (1.02, None), (0.9, False)])
def test_forms_are_compared_by_the_rung_that_gains_least(ratio, holds):
    rows = [
        row("rung0", LANGUAGE, (1.0,), {"recurrent": 10.0, "parallel": None}),
        row("rung2", LANGUAGE, (1.0,), {"recurrent": 20.0, "parallel": 20.0 * ratio}),
        row("rung6", LANGUAGE, (1.0,), {"recurrent": 30.0, "parallel": 90.0}),
    ]
    forms, end = speeds_up(rows)
    assert forms.holds is holds
    assert f"{ratio:.2f} (rung2) to 3.00 (rung6)" in forms.found
    assert end.holds
    assert end.found == "9.0 times as fast"


def test_missing_seeds_are_named():
    assert unfinished({"a": ([0, 1, 2], [1]), "b": ([0], [0]), "c": ([0], [])}) == "a (seeds 0, 2), c (seed 0)"
