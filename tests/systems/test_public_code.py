"""Loops are what others' code computes, where its packages are installed: outputs, states, gradients of all operands."""

import pytest
from comparing import difference
from loops import Source
from public_code import COMPARISONS, Comparison

BOUND = 1e-10
"""Relative, in float64; Newton-Schulz magnifies rounding some hundred times."""


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: f"{c.name}: {c.function}")
def test_loop_is_the_public_code(comparison: Comparison) -> None:
    missing = comparison.missing()
    if missing:
        pytest.skip(missing)
    found = difference(comparison.theirs, comparison.ours, comparison.draw(Source(3)))
    assert found.largest <= BOUND, found
