"""ViTTT: one clipped step over all tokens of an image, in two branches."""

from __future__ import annotations

from typing import Literal

from kvbind.inner.networks import GLU, DepthwiseConv
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

VITTT = Source("2512.01643", "ViT$^3$: Unlocking Test-Time Training in Vision", "Han, Dongchen and others")


@system(VITTT)
def vittt(branch: Literal["glu", "conv"] = "glu", grid: tuple[int, int] | None = None) -> InnerLoop:
    """One of ViTTT's two branches (arXiv 2512.01643): the GLU heads, or the depthwise-convolution head.

    Both are one clipped step at learning rate 1 over all tokens of an image. The layer around them scales the values by
    `1 / (3 T)`.

    Args:
        branch: "glu" or "conv".
        grid: height and width of the image in tokens, for the conv branch; None for a square one.

    Raises:
        ValueError: another branch, or a grid given to the GLU branch.
    """
    if branch not in ("glu", "conv"):
        raise ValueError(f"branch must be 'glu' or 'conv'; got {branch!r}")
    if branch == "glu" and grid is not None:
        raise ValueError(f"grid belongs to the conv branch; got grid={grid!r} with branch='glu'")
    network = GLU() if branch == "glu" else DepthwiseConv(grid)
    return InnerLoop(network=network, clip=True, visibility="full", token_lr=False)


@system(VITTT)
def vittt_conv(grid: tuple[int, int] | None = None) -> InnerLoop:
    """ViTTT's second branch (arXiv 2512.01643): `vittt("conv", grid)`."""
    return vittt("conv", grid)
