"""The library's systems are the loops: outputs, states and the gradients of all operands, in every form."""

import pytest
from by_kvbind import FORMS, adapter
from comparing import difference
from loops import SYSTEMS, Source, System

OUTPUT, GRADIENTS = 1e-10, 1e-8
"""Relative, in float64."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_system_is_its_loop(system: System, form: str) -> None:
    run = adapter(system)
    missing = run.missing()
    if missing:
        pytest.skip(missing)
    found = difference(run.run(system, form=form), system.run, system.draw(Source(3)))
    assert max(found.output, found.state or 0.0) <= OUTPUT, found
    assert found.gradients <= GRADIENTS, found
