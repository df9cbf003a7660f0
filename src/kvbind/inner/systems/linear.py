"""Linear attention: one matrix under the dot-product loss, one write per token, with and without decay.

Public implementations scale queries by `Dk^-1/2` and start from zero weights; queries and weights come as they are here.
"""

from __future__ import annotations

from kvbind.inner.fields import Retention
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


RETNET = Source(
    "2307.08621", "Retentive Network: A Successor to Transformer for Large Language Models", "Sun, Yutao and others"
)
MAMBA2 = Source(
    "2405.21060",
    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    "Dao, Tri and Gu, Albert",
)
GLA = Source(
    "2312.06635", "Gated Linear Attention Transformers with Hardware-Efficient Training", "Yang, Songlin and others"
)


@system(GLA)
def simple_gla() -> InnerLoop:
    """Linear attention with a decay per head, `S = a S + k^T v`: `retention` is a (flash-linear-attention's simple GLA)."""
    return linear_attention().replace(retention=True)


@system(RETNET)
def retnet() -> InnerLoop:
    """RetNet's retention (arXiv 2307.08621): `simple_gla` with the constant `a = 1 - 2^(-5 - h)` for head h."""
    return simple_gla()


@system(MAMBA2)
def mamba2() -> InnerLoop:
    """Mamba-2 (arXiv 2405.21060): `simple_gla` whose layer gives `C` for queries, `B` for keys and `dt x` for values."""
    return simple_gla()


@system(GLA)
def gla() -> InnerLoop:
    """Gated linear attention (arXiv 2312.06635): `S = a o S + k^T v`, a decay for each key channel."""
    return linear_attention().replace(retention=Retention(per="key"))
