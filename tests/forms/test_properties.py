"""A few draws of what holds for every inner loop; `make test-nightly` makes ten thousand."""

import pytest
from hypothesis import given, settings

from properties import PROPERTIES, cases


@pytest.mark.parametrize("name", PROPERTIES)
def test_holds_for_every_inner_loop(name):
    settings(max_examples=60)(given(cases())(PROPERTIES[name]))()
