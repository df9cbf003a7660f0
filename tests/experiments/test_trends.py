"""Gaps along a scale: the line, its error, and the verdict by rule."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbind.experiments.studies.trends import Trend, cells, direction, fit, judge, worse_by
from kvbind.experiments.subjects import NONE, Metric

PPL = Metric("perplexity", "ppl", "perplexity", "lower", change="ratio", margin=2.5)
PSNR = Metric("psnr", "PSNR", "PSNR (dB)", "higher", margin=0.25)
PLACES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def gaps(slopes, start=2.0, noise=0.0):
    """A gap that starts at 1/16 and changes by a slope per doubling, of each seed."""
    return {
        place: {seed: start + slope * i + noise * (-1) ** (i + seed) for seed, slope in enumerate(slopes)}
        for i, place in enumerate(PLACES)
    }


def test_worse_is_positive_whichever_way_a_metric_points():
    assert worse_by(11.0, 10.0, PPL) == pytest.approx(10.0)
    assert worse_by(21.0, 22.5, PSNR) == pytest.approx(1.5)
    assert worse_by(9.0, 10.0, PPL) < 0 > worse_by(23.0, 22.5, PSNR)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(-5, 5))
def test_the_line_is_the_mean_of_the_seeds_own_lines(slopes, start):
    found = fit(gaps(slopes, start))
    assert found.slope == pytest.approx(statistics.fmean(slopes), abs=1e-9)
    assert found.error == pytest.approx(statistics.stdev(slopes) / math.sqrt(len(slopes)), abs=1e-9)
    assert found.start == pytest.approx(start, abs=1e-8)
    assert found.end == pytest.approx(start + 4 * statistics.fmean(slopes), abs=1e-8)
    assert found.doublings == 4
    assert found.seeds == tuple(range(len(slopes)))


def test_a_seed_without_all_places_is_left_out_and_too_few_places_are_no_line():
    some = gaps([-0.5, -0.4, -0.45])
    some[1 / 8] = {0: some[1 / 8][0], 2: some[1 / 8][2]}
    assert fit(some).seeds == (0, 2)
    assert fit({place: some[place] for place in (1 / 4, 1.0)}) is None
    assert fit({place: {i: 1.0} for i, place in enumerate(PLACES)}) is None
    assert fit({}) is None


@pytest.mark.parametrize(
    ("slopes", "start", "word", "holds"),
    [
        ([-0.5, -0.4, -0.45], 2.0, "closes", True),
        ([0.5, 0.4, 0.45], 2.0, "grows", False),
        # a row that is better than the full system: its lead shrinks, or grows
        ([0.4, 0.5, 0.45], -2.5, "closes", True),
        ([-0.4, -0.5, -0.45], -1.0, "grows", False),
        # beyond no gap and further away than it began
        ([-1.0, -1.1, -1.2], 1.0, "grows", False),
        ([0.02, -0.02, 0.01], 2.0, "stays", False),
        ([0.9, -0.8, 0.1], 2.0, None, None),
        ([-0.5], 2.0, None, None),
    ],
)
def test_the_verdict_follows_the_rule(slopes, start, word, holds):
    trend = fit(gaps(slopes, start, noise=0.01))
    assert direction(trend, PPL.margin) == word
    verdict = judge("rung", trend, PPL, "with more training")
    assert verdict.holds is holds
    assert verdict.found.startswith((word or "not decided") + ": worse by ")
    assert f"{len(slopes)} seed(s)" in verdict.found
    assert verdict.claim == "the gap of rung to the full system closes with more training"


def test_two_standard_errors_decide_and_less_does_not():
    assert direction(Trend(-0.2, 0.1, 1.0, 0.2, 4, (0, 1)), 0.25) == "closes"
    assert direction(Trend(-0.2, 0.101, 1.0, 0.2, 4, (0, 1)), 0.25) is None
    assert direction(Trend(0.01, 0.02, 1.0, 1.04, 4, (0, 1)), 0.25) == "stays"
    assert direction(Trend(0.01, 0.03, 1.0, 1.04, 4, (0, 1)), 0.25) is None
    assert direction(Trend(0.0, 0.0, 1.0, 1.0, 4, (0, 1)), 0.25) == "stays"


def test_without_a_line_nothing_is_decided():
    verdict = judge("rung", None, PSNR, "with larger models")
    assert verdict.holds is None
    assert "fewer than 3 places" in verdict.found


def test_cells_have_a_mean_and_its_error():
    some = {0.5: {0: 1.0, 1: 2.0}, 1.0: {0: -0.25}}
    assert cells(some, [0.25, 0.5, 1.0], PPL) == [NONE, "+1.50 ± 0.50%", "-0.25%"]
