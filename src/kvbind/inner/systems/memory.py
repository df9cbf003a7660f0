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
    """The neural memory of Titans (arXiv 2501.00663), section 3: an MLP under squared error, with momentum and retention.

    Every token writes, at gates of its own; gradients are taken at the weights before each `chunk` tokens. The paper's loss
    has no factor 1/2: `lr` is twice its theta, `momentum` its eta, `retention` 1 - alpha.
    """
    return InnerLoop(
        network=MLP(activation="silu", depth=depth),
        loss="squared",
        momentum=True,
        retention=True,
        chunk=1,
        refresh=chunk,
        visibility="token",
    )


@system(ATLAS)
def atlas(chunk: int = 16, depth: int = 1, window: int = 16) -> InnerLoop:
    """Atlas (arXiv 2505.23735), as notes on it have its equations: Titans over a sliding window, with Muon.

    `M = retention M - step_rate NewtonSchulz(S)`, `S = momentum S + gradient over the last window tokens`. Polynomial
    features of queries and keys are the layer's.
    """
    return titans(chunk, depth).replace(orthogonalize=NewtonSchulz(), step_rate=True, window=window)
