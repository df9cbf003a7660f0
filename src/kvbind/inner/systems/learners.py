"""Test-time training on mini-batches: TTT-Linear and TTT-MLP."""

from __future__ import annotations

from kvbind.inner.head import LayerNormHead
from kvbind.inner.networks import MLP, Linear
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

TTT = Source("2407.04620", "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", "Sun, Yu and others")


@system(TTT)
def ttt_linear(chunk: int = 16) -> InnerLoop:
    """TTT-Linear (arXiv 2407.04620): `f(x) = x + LN(x W + b)` under squared error, in mini-batches of `chunk` tokens.

    Gradients are taken at a mini-batch's start; a token sees `read_rate` times the sum of its mini-batch's steps up to it.
    The layer's rates are `lr_i = base sig(..) / D`, and `read_rate` `max(0, 1 / (t mod chunk + 1) + theta)`.
    """
    return InnerLoop(
        network=Linear(bias=True, head=LayerNormHead()),
        loss="squared",
        chunk=1,
        refresh=chunk,
        visibility="token",
        read_rate=True,
    )


@system(TTT)
def ttt_mlp(chunk: int = 16) -> InnerLoop:
    """TTT-MLP (arXiv 2407.04620): `ttt_linear` with a hidden layer, `f(x) = x + LN(gelu_tanh(x W1 + b1) W2 + b2)`."""
    return ttt_linear(chunk).replace(network=MLP("gelu_tanh", bias=True, head=LayerNormHead()))
