"""What `tests/fixtures/` holds: tiny models of released code and what it computes. `fixtures/make.py` makes them."""

import json
from pathlib import Path

from safetensors import safe_open

FIXTURES = Path(__file__).parent / "fixtures"


def released(name):
    """A fixture's configuration and tensors: "weight/" and the released names, inputs, outputs; numbers in float32."""
    with safe_open(str(FIXTURES / f"{name}_tiny.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        floats = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
        return json.loads(file.metadata()["config"]), floats


def weights_of(tensors):
    """The weights among a fixture's tensors, under their released names."""
    return {name.removeprefix("weight/"): x for name, x in tensors.items() if name.startswith("weight/")}
