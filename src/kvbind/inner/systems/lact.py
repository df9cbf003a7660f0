"""LaCT and its descendants: large chunks, Muon and weight normalization."""

from __future__ import annotations

from kvbind.inner.fields import Anchor
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
    """The fast weights of LaCT view synthesis (arXiv 2505.23884): one update from all input views, no momentum.

    As in the released code, the norms that weights start with carry no gradient of the outer loop.
    """
    return InnerLoop(
        network=SwiGLU(),
        orthogonalize=NewtonSchulz(VIEWS_COEFFICIENTS),
        normalize=True,
        visibility="full",
        detach_norms=True,
    )


ZIPMAP = Source(
    "2603.04385", "ZipMap: Linear-Time Stateful 3D Reconstruction with Test-Time Training", "Jin, Haian and others"
)
TTTLRM = Source(
    "2602.20160", "tttLRM: Test-Time Training for Long Context and Autoregressive 3D Reconstruction", "Wang, Chen and others"
)
ELASTIC = Source("2604.07350", "Fast Spatial Memory with Elastic Test-Time Training", "Ma, Ziqiao and others")
IN_PLACE = Source("2604.06169", "In-Place Test-Time Training", "Feng, Guhao and others")


@system(LACT)
def lact_video(chunk: int = 9360) -> InnerLoop:
    """The fast weights of LaCT's autoregressive video model (arXiv 2505.23884): blocks whose tokens all see their block.

    The clean tokens of a block write, which `update_tokens` says.
    """
    return InnerLoop(network=SwiGLU(), normalize=True, chunk=chunk, visibility="chunk")


@system(ZIPMAP, LACT)
def zipmap() -> InnerLoop:
    """ZipMap (arXiv 2603.04385): one update from all tokens; to stream frames, `replace(visibility="chunk", chunk=..)`."""
    return lact_nvs()


@system(TTTLRM, LACT)
def tttlrm(chunk: int | None = None) -> InnerLoop:
    """The fast weights of tttLRM (arXiv 2602.20160): updates in chunks of tokens (its autoregressive scan), then all reads.

    With None one update from all tokens. The paper's elastic variant has
    `Anchor("square", "rest", follow=0.8, strength=0.05, peak="batch", detach=("importance", "follow"))`.
    """
    return lact_nvs().replace(chunk=chunk)


@system(ELASTIC, LACT)
def elastic_lact(chunk: int = 2048) -> InnerLoop:
    """Elastic TTT (arXiv 2604.07350): LaCT whose weights are drawn back to an anchor, as far as they have been important.

    Updates in chunks, then all tokens are read; other models read before ("past") or after ("chunk") each update.
    """
    return lact_nvs().replace(chunk=chunk, anchor=Anchor(start=1e-6, detach=("importance", "start")))


@system(IN_PLACE)
def in_place_ttt(chunk: int = 4096) -> InnerLoop:
    """In-Place TTT (arXiv 2604.06169): the last layer of a transformer's MLP, written chunk by chunk at a constant rate.

    Queries and keys are the MLP's input.
    """
    return InnerLoop(network=SwiGLU(), update="last", chunk=chunk, visibility="past", token_lr=False)
