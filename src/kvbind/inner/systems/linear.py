"""Linear attention: one matrix under the dot-product loss, one write per token."""

from __future__ import annotations

from kvbind.inner.networks import Linear
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

LINEAR_ATTENTION = Source(
    "2006.16236",
    "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    "Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, Fran{\\c{c}}ois",
)


@system(LINEAR_ATTENTION)
def linear_attention(chunk: int = 1) -> InnerLoop:
    """Causal linear attention, `o_t = q_t (S_0 + sum_{i<=t} k_i^T v_i)` (arXiv 2006.16236); `chunk` changes nothing."""
    return InnerLoop(network=Linear(), chunk=chunk, visibility="token", token_lr=False)
