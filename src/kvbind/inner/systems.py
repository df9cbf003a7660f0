"""Named systems: published inner loops, each a value, and the paper's ladder over any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from kvbind.inner.networks import GLU, MLP, DepthwiseConv, Linear, SwiGLU
from kvbind.inner.orthogonalize import VIEWS_COEFFICIENTS, NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import nearest


def lact_llm(chunk: int = 2048) -> InnerLoop:
    """The fast weights of the LaCT language model (arXiv 2505.23884): SwiGLU, momentum, Muon, weight normalization."""
    return InnerLoop(
        network=SwiGLU(), momentum=True, orthogonalize=NewtonSchulz(), normalize=True, chunk=chunk, visibility="past"
    )


def lact_nvs() -> InnerLoop:
    """The fast weights of LaCT view synthesis (arXiv 2505.23884): one update from all input views, no momentum."""
    return InnerLoop(network=SwiGLU(), orthogonalize=NewtonSchulz(VIEWS_COEFFICIENTS), normalize=True, visibility="full")


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


def linear_attention(chunk: int = 1) -> InnerLoop:
    """Causal linear attention, `o_t = q_t (S_0 + sum_{i<=t} k_i^T v_i)` (arXiv 2006.16236); `chunk` changes nothing."""
    return InnerLoop(network=Linear(), chunk=chunk, visibility="token", token_lr=False)


def delta_net(chunk: int = 1) -> InnerLoop:
    """DeltaNet (arXiv 2406.06484): one step of squared error per token; `lr` is its beta."""
    return InnerLoop(network=Linear(), loss="squared", chunk=chunk, visibility="token")


def gated_delta_net(chunk: int = 1) -> InnerLoop:
    """DeltaNet whose state is multiplied by `retention` at every step.

    The gradient is taken before the decay, as the update rule has it; the published Gated DeltaNet (arXiv 2412.06464)
    takes it after, which is this system with values divided by the gate and the rate multiplied by it.
    """
    return delta_net(chunk).replace(retention=True)


def ttt_linear(chunk: int = 16) -> InnerLoop:
    """TTT-Linear (arXiv 2407.04620) in mini-batches of `chunk`, without the residual and LayerNorm inside its network."""
    return InnerLoop(network=Linear(), loss="squared", chunk=chunk, visibility="token")


def ttt_mlp(chunk: int = 16) -> InnerLoop:
    """TTT-MLP (arXiv 2407.04620) in mini-batches of `chunk`, without the residual and LayerNorm inside its network."""
    return ttt_linear(chunk).replace(network=MLP(activation="gelu_tanh"))


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


def atlas(chunk: int = 16, depth: int = 1) -> InnerLoop:
    """Atlas (arXiv 2505.23735): Titans with Muon; its sliding window is here a chunk, its feature map the layer's."""
    return titans(chunk, depth).replace(orthogonalize=NewtonSchulz())


SYSTEMS: dict[str, Callable[[], InnerLoop]] = {
    "lact_llm": lact_llm,
    "lact_nvs": lact_nvs,
    "vittt": vittt,
    "vittt_conv": lambda: vittt("conv"),
    "linear_attention": linear_attention,
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "ttt_linear": ttt_linear,
    "ttt_mlp": ttt_mlp,
    "titans": titans,
    "atlas": atlas,
}
"""Every named system, with its published settings."""


def named(name: str) -> InnerLoop:
    """The system of that name.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    if name not in SYSTEMS:
        raise ValueError(f"no system is named {name!r}{nearest(name, SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]()


RUNGS: dict[str, str] = {
    "rung0": "the full system",
    "rung1": "update only the last layer",
    "rung2": "remove weight normalization",
    "rung3": "the network becomes one linear layer",
    "rung4": "remove the per-token learning rate",
    "rung5": "remove momentum",
    "rung6": "remove orthogonalization or clipping",
}
"""The rungs of the ladder and what each changes against the one above (arXiv 2602.21204, section 6.1)."""


def ladder(system: InnerLoop) -> dict[str, InnerLoop]:
    """The seven rungs from `system` down to standard linear attention, by the names of `RUNGS`.

    A change that `system` does not need leaves the rung equal to the one above. A depthwise convolution is linear in its
    kernel already and stays.
    """
    network = system.network if isinstance(system.network, DepthwiseConv) else Linear()
    changes: list[dict[str, object]] = [
        {},
        {"update": "last"},
        {"normalize": False},
        {"network": network},
        {"token_lr": False},
        {"momentum": False},
        {"orthogonalize": None, "clip": False},
    ]
    rungs: dict[str, InnerLoop] = {}
    for name, change in zip(RUNGS, changes, strict=True):
        system = system.replace(**change)
        rungs[name] = system
    return rungs
