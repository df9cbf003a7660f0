"""Neural memories: an MLP under squared error with momentum and retention."""

from __future__ import annotations

from kvbind.inner.networks import MLP
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

TITANS = Source(
    "2501.00663",
    "Titans: Learning to Memorize at Test Time",
    "Behrouz, Ali and Zhong, Peilin and Mirrokni, Vahab",
)
ATLAS = Source("2505.23735", "ATLAS: Learning to Optimally Memorize the Context at Test Time", "Behrouz, Ali and others")


@system(TITANS)
def titans(chunk: int = 16, depth: int = 1) -> InnerLoop:
    """The neural memory of Titans (arXiv 2501.00663): an MLP under squared error, momentum and retention."""
    return InnerLoop(
        network=MLP(activation="silu", depth=depth),
        loss="squared",
        momentum=True,
        retention=True,
        chunk=chunk,
        visibility="past",
    )


@system(ATLAS)
def atlas(chunk: int = 16, depth: int = 1) -> InnerLoop:
    """Atlas (arXiv 2505.23735): Titans with Muon; its sliding window is here a chunk, its feature map the layer's."""
    return titans(chunk, depth).replace(orthogonalize=NewtonSchulz())
