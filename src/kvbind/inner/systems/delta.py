"""The delta rule: one matrix under squared error, one write per token."""

from __future__ import annotations

from kvbind.inner.networks import Linear
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

DELTA_NET = Source(
    "2406.06484", "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "Yang, Songlin and others"
)
GATED_DELTA_NET = Source(
    "2412.06464",
    "Gated Delta Networks: Improving Mamba2 with Delta Rule",
    "Yang, Songlin and Kautz, Jan and Hatamizadeh, Ali",
)


@system(DELTA_NET)
def delta_net(chunk: int = 1) -> InnerLoop:
    """DeltaNet (arXiv 2406.06484): one step of squared error per token; `lr` is its beta."""
    return InnerLoop(network=Linear(), loss="squared", chunk=chunk, visibility="token")


@system(GATED_DELTA_NET)
def gated_delta_net(chunk: int = 1) -> InnerLoop:
    """DeltaNet whose state is multiplied by `retention` at every step.

    The gradient is taken before the decay, as the update rule has it; the published Gated DeltaNet (arXiv 2412.06464)
    takes it after, which is this system with values divided by the gate and the rate multiplied by it.
    """
    return delta_net(chunk).replace(retention=True)
