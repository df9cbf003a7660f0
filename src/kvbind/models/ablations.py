"""The paper's ablations by their released names: what each `ttt_loss_type` stands for (arXiv 2602.21204's public code).

The one place that reads meaning out of these names. A released checkpoint of any ablation holds the parameters of the full
system; `unused_parameters` says which of them its inner loop has no use for. Section 5 of the specification lists the names.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from kvbind.inner.networks import Linear
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import vittt
from kvbind.inner.value import nearest

logger = logging.getLogger(__name__)

Edits = dict[str, Any]

_LAST: Edits = {"update": "last"}
_STRAIGHT: Edits = {"update": "last", "network": Linear()}

SHARED: dict[str, Edits] = {
    "dot_product": {},
    "ga_dot_product": {"direction": "ascent"},
    "no_query_dot_product": {"query": "key"},
    "mse": {"loss": "squared"},
    "only_w1": _LAST,
    "only_w1_straight_qk": _STRAIGHT,
}
"""Names of the language model and of view synthesis, each as edits of the full system."""

CUTS: dict[str, Edits] = {
    "_no_wn_muon": {"normalize": False, "orthogonalize": None},
    "_no_muon": {"orthogonalize": None},
    "_no_wn": {"normalize": False},
    "_no_lr1": {"token_lr": False},
}
"""What further edits are called inside a name, wherever they stand in it. The language model's Muon is a separate field."""

LANGUAGE_CUTS = {"only_w1": ("_no_wn",), "only_w1_parallel": ("_no_wn",), "only_w1_straight_qk": ("_no_wn", "_no_lr1")}
VIEWS_CUTS = {"only_w1": ("_no_wn",), "only_w1_straight_qk": tuple(CUTS)}
"""Those that the released code takes, by the name that is left without them."""

_NO_RATES = "only_w1_straight_qk_no_lr1"
LANGUAGE_NAMES = (*SHARED, "only_w1_no_wn", "only_w1_straight_qk_no_wn", _NO_RATES, f"{_NO_RATES}_no_wn")
VIEWS_NAMES = (*LANGUAGE_NAMES, f"{_NO_RATES}_no_muon", f"{_NO_RATES}_no_wn_muon")
"""One name for each inner loop that has any, by family."""

LANGUAGE: dict[str, Edits] = SHARED | {"only_w1_parallel": {**_LAST, "normalize": False}}
"""As `SHARED`, with the parallel evaluation of rung 2, which is the same inner loop."""

_SIMPLIFIED = "its update is a hand-edited formula, the gradient of no loss"
REFUSED: dict[str, str] = {
    "only_w1_momentum_one": "its momentum gate is the constant 1, which no inner loop has",
    "only_w1_momentum_one_no_norm": "its momentum gate is the constant 1, which no inner loop has",
    "vp**2": "it minimizes the squared norm of the network's output, without values",
    "design1": "it averages the losses of keys and of queries",
    "design2": "it trains and reads at the mean of query and key",
    "unroll1": "it is dot_product written out, and no name of the later released code",
    **{f"simplify{i}": _SIMPLIFIED for i in range(1, 13)},
}
"""Released names that are known and not supported, and why."""

_HEADS, _CONV = vittt(), vittt("conv")

IMAGES: dict[str, tuple[InnerLoop, InnerLoop]] = {
    "dot_product": (_HEADS, _CONV),
    "ga_dot_product": (_HEADS.replace(direction="ascent"), _CONV),
    "no_query_dot_product": (_HEADS.replace(query="key"), _CONV.replace(query="key")),
    "only_w1": (_HEADS.replace(**_LAST), _CONV),
    "only_w1_no_muon": (_HEADS.replace(**_LAST, clip=False), _CONV),
    "only_w1_straight_qk": (_HEADS.replace(**_STRAIGHT), _CONV),
    "mse": (_HEADS.replace(loss="squared"), _CONV.replace(loss="squared")),
}
"""ViTTT's names: the inner loops of the heads and of the convolution, which the released code always clips."""

IMAGES_DIFFERING = frozenset({"only_w1_straight_qk", "mse"})
"""Those of them whose released update is not the gradient of the loss they state."""

IMAGES_REFUSED = {
    "design1": REFUSED["design1"],
    "design2": REFUSED["design2"],
    "only_w1_straight_qk_no_muon": "the released code itself has no computation of that name",
}


def language_ablation(
    full: InnerLoop, ttt_loss_type: str, *, use_muon: bool, use_momentum: bool, ttt_prenorm: bool, inter_multi: float = 1
) -> InnerLoop:
    """The inner loop of a released language model.

    Args:
        full: the full system's.
        ttt_loss_type: the ablation's name.
        use_muon: orthogonalization.
        use_momentum: momentum.
        ttt_prenorm: normalized weights are read while unnormalized ones accumulate.
        inter_multi: hidden width of the fast network over its head width.

    Raises:
        ValueError: a name that is unknown or not supported, or that the released code does not run with the other fields.
    """
    edits = _edits(ttt_loss_type, LANGUAGE, LANGUAGE_CUTS, (*LANGUAGE_NAMES, "only_w1_no_wn_parallel"))
    if ttt_prenorm and ttt_loss_type != "dot_product":
        raise ValueError(
            f"ttt_prenorm must be False with ttt_loss_type={ttt_loss_type!r}, which the released code then ignores; got True"
        )
    _check_width(ttt_loss_type, edits, inter_multi)
    if "parallel" in ttt_loss_type and use_momentum:
        logger.warning(
            "ttt_loss_type=%r: the released code divides by running products of the momentum gate, which loses digits from "
            "about 20 chunks on; this model does not",
            ttt_loss_type,
        )
    flags: Edits = {"momentum": use_momentum} | ({} if use_muon else {"orthogonalize": None})
    return full.replace(**(flags | ({"normalize": "read"} if ttt_prenorm else {}) | edits))


def views_ablation(
    full: InnerLoop, ttt_loss_type: str = "dot_product", *, no_query: bool = False, use_fused: bool = False,
    grad_calc_method: str = "mannual", inter_multi: float = 1,
) -> InnerLoop:  # fmt: skip
    """The inner loop of a released view synthesis model.

    Args:
        full: the full system's.
        ttt_loss_type: the ablation's name.
        no_query: outputs are read with keys; the released layer then has no queries.
        use_fused: the released code's other implementation, which reads less of the names.
        grad_calc_method: "mannual", as the released code spells it; other values are other updates.
        inter_multi: hidden width of the fast network over its head width.

    Raises:
        ValueError: as `language_ablation`.
    """
    edits = _edits(ttt_loss_type, SHARED, VIEWS_CUTS, VIEWS_NAMES)
    if grad_calc_method != "mannual":
        why = f": {REFUSED[grad_calc_method]}" if str(grad_calc_method) in REFUSED else ""
        raise ValueError(f"grad_calc_method must be 'mannual'; got {grad_calc_method!r}, which is not supported{why}")
    if use_fused and (ttt_loss_type not in SHARED or ttt_loss_type == "no_query_dot_product"):
        raise ValueError(
            f"use_fused must be False with ttt_loss_type={ttt_loss_type!r}, which the released fused code computes in part "
            "alone; got True"
        )
    if no_query and not use_fused and ttt_loss_type not in ("dot_product", "no_query_dot_product"):
        raise ValueError(
            f"no_query must be False with ttt_loss_type={ttt_loss_type!r}, which the released code does not run with it; "
            "got True"
        )
    _check_width(ttt_loss_type, edits, inter_multi)
    return full.replace(**(edits | ({"query": "key"} if no_query else {})))


def images_ablation(ttt_loss_type: str) -> tuple[InnerLoop, InnerLoop]:
    """The inner loops of the heads and of the convolution of a released ViTTT model.

    Warns where the released computation is another than the name says.

    Args:
        ttt_loss_type: the ablation's name.

    Raises:
        ValueError: a name that is unknown or not supported.
    """
    ttt_loss_type = str(ttt_loss_type)  # of a file, it may be anything
    if ttt_loss_type in IMAGES_REFUSED:
        raise ValueError(f"ttt_loss_type={ttt_loss_type!r} is not supported: {IMAGES_REFUSED[ttt_loss_type]}")
    if ttt_loss_type not in IMAGES:
        raise ValueError(
            f"ttt_loss_type must be one of {', '.join(IMAGES)}; got {ttt_loss_type!r}{nearest(ttt_loss_type, IMAGES)}"
        )
    if ttt_loss_type in IMAGES_DIFFERING:
        warnings.warn(
            f"ttt_loss_type={ttt_loss_type!r}: the released code's update is not the gradient of the loss that this name "
            "states; this model computes the gradient, so that its outputs differ from the released model's",
            UserWarning,
            stacklevel=3,
        )
    return IMAGES[ttt_loss_type]


def unused_parameters(inner: InnerLoop) -> tuple[str, ...]:
    """What a released checkpoint of this inner loop holds without a use for it, in words; empty for the full system."""
    unused = () if inner.network != Linear() else ("the matrices w0 and w2",)
    if not inner.token_lr:
        return (*unused, "the projection to learned rates")
    return (*unused, "the rates of w0 and w2") if inner.update == "last" else unused


def no_words_for(inner: InnerLoop, known: InnerLoop) -> str:
    """What to say of an inner loop that has no released name.

    Args:
        inner: the inner loop.
        known: the nearest one that has.
    """
    differing = ", ".join(f"{name}={getattr(inner, name)!r}" for name in inner.differing(known))
    return f"inner must be one that released configurations describe; they have no {differing}"


def check_all_used(ttt_loss_type: str, inner: InnerLoop, full: InnerLoop) -> None:
    """Refuse to release a model that was built without the parameters that its inner loop has no use for.

    Raises:
        ValueError: there are such parameters.
    """
    unused = unused_parameters(inner)
    if unused:
        differing = ", ".join(f"{name}={getattr(inner, name)!r}" for name in inner.differing(full))
        raise ValueError(
            f"released checkpoints of ttt_loss_type={ttt_loss_type!r} hold {' and '.join(unused)} without a use for them; "
            f"they have no form without, which is this model's: it was built with {differing}, not from a released "
            "configuration"
        )


def tell_unused(ttt_loss_type: str, inner: InnerLoop) -> None:
    """Say which parameters of a released checkpoint have no use."""
    unused = unused_parameters(inner)
    if unused:
        logger.warning(
            "ttt_loss_type=%r updates w1 alone: %s of a released checkpoint are loaded and not used",
            ttt_loss_type,
            " and ".join(unused),
        )


def _edits(name: str, bases: Mapping[str, Edits], cuts: Mapping[str, tuple[str, ...]], known: tuple[str, ...]) -> Edits:
    """A name as edits of the full system; `known` are those that a message lists.

    Raises:
        ValueError: a name that is unknown or not supported; the message says why, or gives the nearest known one.
    """
    rest, edits = str(name), Edits()
    found: list[str] = []
    for cut, change in CUTS.items():
        if cut in rest and any(cut in taken for taken in cuts.values()):
            rest, edits, found = rest.replace(cut, ""), edits | change, [*found, cut]
    if rest in REFUSED:
        raise ValueError(f"ttt_loss_type={name!r} is not supported: {REFUSED[rest]}")
    if rest not in bases:
        raise ValueError(f"ttt_loss_type must be one of {', '.join(known)}; got {name!r}{nearest(name, known)}")
    refused = [cut for cut in found if cut not in cuts.get(rest, ())]
    if refused:
        raise ValueError(
            f"ttt_loss_type={name!r} is not supported: the released code does not run {rest!r} with "
            f"{refused[0].removeprefix('_')!r}"
        )
    return bases[rest] | edits


def _check_width(name: str, edits: Edits, inter_multi: float) -> None:
    if edits.get("network") == Linear() and inter_multi != 1:
        raise ValueError(
            f"inter_multi must be 1 with ttt_loss_type={name!r}, whose one matrix maps keys to values; got {inter_multi}"
        )
