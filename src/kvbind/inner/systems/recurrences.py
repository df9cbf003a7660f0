"""Linear recurrences: one matrix, one write per token, with and without decay. Linear attention, then the delta rule.

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
    """Gated DeltaNet (arXiv 2412.06464): `S' = a S; S = S' + beta k^T (v - k S')`, the decay before the residual."""
    return delta_net(chunk).replace(retention=Retention(order="before"))


DELTA_PRODUCT = Source(
    "2502.10297",
    "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    "Siems, Julien and others",
)
KDA = Source("2510.26692", "Kimi Linear: An Expressive, Efficient Attention Architecture", "{Kimi Team}")
GDN2 = Source(
    "2605.22791",
    "Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention",
    "Hatamizadeh, Ali and Choi, Yejin and Kautz, Jan",
)
COMBA = Source("2506.02475", "Comba: Improving Bilinear RNNs with Closed-loop Control", "Hu, Jiaxi and others")
RWKV7 = Source("2503.14456", 'RWKV-7 "Goose" with Expressive Dynamic State Evolution', "Peng, Bo and others")


@system(DELTA_PRODUCT)
def delta_product(writes: int = 2) -> InnerLoop:
    """Gated DeltaProduct (arXiv 2502.10297): `writes` steps of the delta rule per token, the decay before the first."""
    return gated_delta_net().replace(writes=writes)


@system(KDA)
def kda() -> InnerLoop:
    """Kimi delta attention (arXiv 2510.26692): `S' = a o S; S = S' + beta k^T (v - k S')`, a decay for each key channel.

    Also the linear attention of HorizonStream (arXiv 2605.23889).
    """
    return delta_net().replace(retention=Retention(per="key", order="before"))


@system(GDN2)
def gdn2() -> InnerLoop:
    """GDN-2 (arXiv 2605.22791): `S' = a o S; S = S' + k^T (w o v - (b o k) S')`.

    `erase` is b o k, and values come as w o v.
    """
    return kda().replace(erase=True, token_lr=False)


@system(COMBA)
def comba() -> InnerLoop:
    """Comba (arXiv 2506.02475): `S = a S + beta k^T (v - p S)`, the decay after the residual; `erase` is p."""
    return delta_net().replace(retention=True, erase=True)


@system(RWKV7)
def rwkv7() -> InnerLoop:
    """RWKV-7 (arXiv 2503.14456): `S = w o S - (r o x)^T (r S) + y^T v`, in two writes of each token.

    The first has the key r o x, `erase` r, the value 0, and the decay w; the second the key y, `erase` 0 and the value v.
    """
    return delta_net().replace(retention=Retention(per="key"), erase=True, writes=2, token_lr=False)
