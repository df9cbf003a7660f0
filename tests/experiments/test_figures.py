import pytest

from kvbind.experiments.plotting import pooled, smoothed


def test_smoothing_starts_without_bias_and_leaves_gaps_out():
    points = smoothed([4.0, None, 4.0, 8.0], 0.5)
    assert [i for i, _ in points] == [1, 3, 4]
    assert [x for _, x in points] == pytest.approx([4.0, 4.0, (4 * 0.125 + 4 * 0.25 + 8 * 0.5) / 0.875])


def test_no_smoothing_gives_the_values_back():
    assert smoothed([3.0, 1.0], 0.0) == [(1, 3.0), (2, 1.0)]


def test_neighbouring_points_are_pooled():
    assert pooled([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], 2) == [(0.5, 2.0), (2.0, 5.0)]
    assert pooled([(0.0, 1.0), (1.0, 3.0)], 5) == [(0.0, 1.0), (1.0, 3.0)]
