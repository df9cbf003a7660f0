"""LaCT: large chunks, Muon and weight normalization."""

from __future__ import annotations

from kvbind.inner.networks import SwiGLU
from kvbind.inner.orthogonalize import VIEWS_COEFFICIENTS, NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

LACT = Source("2505.23884", "Test-Time Training Done Right", "Zhang, Tianyuan and others")


@system(LACT)
def lact_llm(chunk: int = 2048) -> InnerLoop:
    """The fast weights of the LaCT language model (arXiv 2505.23884): SwiGLU, momentum, Muon, weight normalization."""
    return InnerLoop(
        network=SwiGLU(), momentum=True, orthogonalize=NewtonSchulz(), normalize=True, chunk=chunk, visibility="past"
    )


@system(LACT)
def lact_nvs() -> InnerLoop:
    """The fast weights of LaCT view synthesis (arXiv 2505.23884): one update from all input views, no momentum."""
    return InnerLoop(network=SwiGLU(), orthogonalize=NewtonSchulz(VIEWS_COEFFICIENTS), normalize=True, visibility="full")
