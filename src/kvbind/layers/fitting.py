"""Whether an inner loop fits a layer: what its tokens see, and the fast matrices that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop


def check_sees_everything(argument: str, inner: InnerLoop) -> None:
    """Refuse an inner loop that such a layer cannot run.

    Args:
        argument: the name by which messages call the inner loop.
        inner: the inner loop.

    Raises:
        TypeError: no InnerLoop.
        ValueError: a visibility other than "full", or gates, which these layers do not make.
    """
    if not isinstance(inner, InnerLoop):
        raise TypeError(f"{argument} must be a kvbind.InnerLoop; got {type(inner).__name__}")
    if inner.visibility != "full":
        raise ValueError(
            f"{argument}'s visibility must be 'full', as all tokens see what was written; got {inner.visibility!r}"
        )
    for gate in inner.gates:
        raise ValueError(f"{argument} must have {gate}=False: this layer has no {gate} gate")
    if inner.network.vectors:
        raise ValueError(f"{argument}'s network must have neither bias nor head in this layer; got {inner.network!r}")


def check_built(
    argument: str, inner: InnerLoop, needed: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse an inner loop whose network needs fast matrices that a layer was built without.

    Args:
        argument: the name by which messages call the inner loop.
        inner: the inner loop.
        needed: shapes of its matrices by name, without heads.
        built: shapes of the layer's.

    Raises:
        ValueError: a matrix that is missing or of another shape.
    """
    kind = type(inner.network).__name__
    for name, shape in needed.items():
        has = built.get(name)
        if has != shape:
            what = "has none of that name" if has is None else f"has it as {list(has)}"
            raise ValueError(
                f"{argument}'s network {kind} needs a fast matrix {name!r} of shape {list(shape)}; this layer {what} "
                f"(built: {', '.join(built)})"
            )


def check_fits_causal_layer(inner: InnerLoop) -> None:
    """Refuse an inner loop that shows tokens their future, or whose network reads a grid.

    Raises:
        TypeError: no InnerLoop.
        ValueError: visibility "full", "chunk" over more than one token, or a depthwise convolution.
    """
    if not isinstance(inner, InnerLoop):
        raise TypeError(f"inner must be a kvbind.InnerLoop; got {type(inner).__name__}")
    if isinstance(inner.network, DepthwiseConv):
        raise ValueError("inner's network must read single tokens; DepthwiseConv reads a grid of them")
    if inner.visibility == "full" or (inner.visibility == "chunk" and inner.chunk != 1):
        raise ValueError(
            f"inner's visibility must be 'past' or 'token' in a causal layer ('chunk' with chunk=1 alone); got "
            f"{inner.visibility!r} with chunk={inner.chunk}, under which tokens see later ones"
        )


def check_rates_built(inner: InnerLoop, needed: Iterable[str], built: tuple[str, ...]) -> None:
    """Refuse an inner loop that learns rates of matrices for which a layer was built without.

    Args:
        inner: the inner loop.
        needed: the matrices that it updates.
        built: those whose rates the layer learns.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in needed if name not in built]
    if inner.token_lr and missing:
        raise ValueError(
            f"inner has token_lr=True and updates {missing[0]!r}, but this layer was built with learned rates for "
            f"{', '.join(built) or 'no matrix'}"
        )
