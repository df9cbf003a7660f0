"""The paper's ladder (arXiv 2602.21204, section 6.1) over any system."""

from __future__ import annotations

from kvbind.inner.networks import DepthwiseConv, Linear
from kvbind.inner.spec import InnerLoop

RUNGS: dict[str, str] = {
    "rung0": "the full system",
    "rung1": "update only the last layer",
    "rung2": "remove weight normalization",
    "rung3": "the network becomes one linear layer",
    "rung4": "remove the per-token learning rate",
    "rung5": "remove momentum",
    "rung6": "remove orthogonalization or clipping",
}
"""The rungs of the ladder and what each changes against the one above (arXiv 2602.21204, section 6.1)."""


def ladder(system: InnerLoop) -> dict[str, InnerLoop]:
    """The seven rungs from `system` down to standard linear attention, by the names of `RUNGS`.

    A change that `system` does not need leaves the rung equal to the one above. A depthwise convolution is linear in its
    kernel already and stays.
    """
    network = system.network if isinstance(system.network, DepthwiseConv) else Linear()
    changes: list[dict[str, object]] = [
        {},
        {"update": "last"},
        {"normalize": False},
        {"network": network},
        {"token_lr": False},
        {"momentum": False},
        {"orthogonalize": None, "clip": False},
    ]
    rungs: dict[str, InnerLoop] = {}
    for name, change in zip(RUNGS, changes, strict=True):
        system = system.replace(**change)
        rungs[name] = system
    return rungs
