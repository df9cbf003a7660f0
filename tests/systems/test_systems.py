"""The library's systems are the loops: outputs, states and the gradients of all operands, in every form."""

import re

import pytest
from by_kvbind import FORMS, adapter
from comparing import difference
from loops import SYSTEMS, Source, System

OUTPUT, GRADIENTS = 1e-10, 1e-8
"""Relative, in float64."""

UNTOLD = re.compile(r"knows nothing of it yet|unexpected keyword argument|update_tokens must be None for linearize")
"""What `linearize` says of a field that it has not learned; anything else that it says is a failure."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_system_is_its_loop(system: System, form: str) -> None:
    run = adapter(system)
    missing = run.missing()
    if missing:
        pytest.skip(missing)
    try:
        found = difference(run.run(system, form=form), system.run, system.draw(Source(3)))
    except (TypeError, ValueError) as error:
        if form == "linearize" and UNTOLD.search(str(error)):
            pytest.skip(f"linearize refuses it: {error}")
        raise
    assert max(found.output, found.state or 0.0) <= OUTPUT, found
    assert found.gradients <= GRADIENTS, found
