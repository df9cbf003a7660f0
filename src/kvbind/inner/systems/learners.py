"""Test-time training on mini-batches: TTT-Linear and TTT-MLP."""

from __future__ import annotations

from kvbind.inner.networks import MLP, Linear
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

TTT = Source("2407.04620", "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", "Sun, Yu and others")


@system(TTT)
def ttt_linear(chunk: int = 16) -> InnerLoop:
    """TTT-Linear (arXiv 2407.04620) in mini-batches of `chunk`, without the residual and LayerNorm inside its network."""
    return InnerLoop(network=Linear(), loss="squared", chunk=chunk, visibility="token")


@system(TTT)
def ttt_mlp(chunk: int = 16) -> InnerLoop:
    """TTT-MLP (arXiv 2407.04620) in mini-batches of `chunk`, without the residual and LayerNorm inside its network."""
    return ttt_linear(chunk).replace(network=MLP(activation="gelu_tanh"))
