"""What keeps an inner loop from a parallel form, field by field, and which form is the best that it has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from kvbind.inner.fields import Retention
from kvbind.inner.networks import MLP, Linear
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class Obstacle:
    """One reason why an inner loop has no parallel form.

    Attributes:
        field: the field of `InnerLoop` that stands in the way.
        value: that field's value.
        reason: why that makes the map from writes to state non-associative (arXiv 2602.21204, appendix I).
        edit: the fields to `replace` that would remove this obstacle.
    """

    field: str
    value: Any
    reason: str
    edit: dict[str, Any]

    def __str__(self) -> str:
        edit = ", ".join(f"{name}={value!r}" for name, value in self.edit.items())
        return f"{self.field}={self.value!r}: {self.reason}; removed by replace({edit})"


def parallel_obstacles(spec: InnerLoop) -> tuple[Obstacle, ...]:
    """What keeps `spec` from a parallel form; empty where it has one.

    There is one when the map from writes to state is associative: only the last layer is updated, by a loss whose gradient
    does not read the state, once per chunk, without renormalization. The squared error reads the state, linearly where the
    trained part is one ungated matrix and no orthogonalization or clipping acts on the update: the delta rule, which the
    WY representation makes parallel. What else an inner loop has keeps its form where writes simply add up: `erase`, several
    `writes` per token, gates per key channel and before the gradient, `refresh`, windows, rates of steps and readers, a bias
    of the last layer, and a head that outputs alone pass (`kvbind.forms.parallel.affine`).
    """
    found = extension_obstacles(spec)
    if spec.update == "all" and spec.network.theta:
        names = " and ".join(spec.network.theta)
        reason = f"the features of each chunk depend on every earlier chunk through the updated {names}, nonlinearly"
        found.append(Obstacle("update", spec.update, reason, {"update": "last"}))
    if spec.normalize is True:
        reason = "each renormalization rescales all earlier writes together: Norm(A + B) is not Norm(A) + Norm(B)"
        found.append(Obstacle("normalize", True, reason, {"normalize": False}))
    elif spec.normalize == "read" and spec.visibility == "token" and spec.chunk != 1:
        reason = "every token reads a state with a norm of its own, which takes a state for every token"
        found.append(Obstacle("normalize", spec.normalize, reason, {"normalize": False}))
    if spec.steps > 1:
        reason = "each step on a chunk starts from the weights that the step before it left"
        found.append(Obstacle("steps", spec.steps, reason, {"steps": 1}))
    if spec.loss == "squared":
        nonlinear = next((name for name in ("orthogonalize", "clip") if getattr(spec, name)), None)
        if spec.normalize == "read":
            nonlinear = "normalize"
        if nonlinear:
            reason = f"its gradient reads the state, and {nonlinear} makes each write a nonlinear function of it"
            found.append(Obstacle("loss", spec.loss, reason, {"loss": "dot"}))
        elif spec.network.has_gate:
            reason = "its gradient reads the state through a gate that differs from channel to channel"
            found.append(Obstacle("loss", spec.loss, reason, {"loss": "dot"}))
    return tuple(found)


def parallel_in_spans(spec: InnerLoop) -> bool:
    """Whether all tokens of a span can be run at once where spans must run in order: the dual form (`parallel/dual.py`).

    Gradients may read the state as they like where several updates share the weights that they are taken at, or several
    tokens of a chunk see weights of their own. The network is then a chain of layers, and what a span writes adds up.
    """
    if type(spec.network) not in (Linear, MLP) or spec.visibility == "full" or spec.steps > 1 or spec.writes > 1:
        return False
    if spec.orthogonalize is not None or spec.clip or spec.normalize or spec.anchor is not None:
        return False
    if isinstance(spec.retention, Retention) and spec.retention.per == "key":
        return False
    return spec.refresh not in (None, spec.chunk) or (spec.visibility == "token" and spec.chunk != 1)


def best_form(spec: InnerLoop) -> Literal["recurrent", "parallel", "dual"]:
    """What `form="auto"` runs on more than a chunk."""
    if not parallel_obstacles(spec):
        return "parallel"
    return "dual" if parallel_in_spans(spec) else "recurrent"


_UNKNOWN = "it has no parallel form yet"

_BESIDE = f"beside orthogonalize, clip or normalize, for which all writes are shaped at once, {_UNKNOWN}"

_SHAPED = ("step_rate", "retention", "window", "network.head")
"""What goes beside orthogonalization, clipping and normalization of reads where writes do not read the state."""

_REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("erase", "writes", "read_rate", "step_rate", "retention", "refresh", "window", "network.bias"), _BESIDE
    ),
    "chunk": f"nothing is read before the last write; {_UNKNOWN}",
    "anchor": "the pull towards the anchor is a product with an importance that the state itself has made",
    "network.head": "the slope of its normalization reads the state",
}


_EDITS: dict[str, Any] = {field.name: field.default for field in fields(InnerLoop)} | {"retention": True}
"""What each field would have to be instead."""


def extension_obstacles(spec: InnerLoop) -> list[Obstacle]:
    """What of `spec.extensions`, and of a network that applies itself, keeps it from a parallel form."""
    found = []
    network = spec.network
    if not network.applies_itself:
        reason = f"{type(network).__name__} has an apply of its own, of which nothing is known"
        found.append(Obstacle("network", network, reason, {"network": Linear()}))
    adds_up = spec.orthogonalize is None and not spec.clip and not spec.normalize
    alike = spec.loss == "dot" and spec.normalize is not True
    for name, value in spec.extensions.items():
        reason = _REASONS.get(name, _UNKNOWN)
        if name == "network.head" and value.where == "read":
            reason = _BESIDE
        if reason == _BESIDE and (adds_up or (alike and name in _SHAPED)):
            continue
        if name.startswith("network."):
            plain = {field: default for field, default in (("bias", False), ("head", None)) if hasattr(network, field)}
            found.append(Obstacle(name, value, reason, {"network": network.replace(**plain)}))
        elif name == "chunk":
            # what is of several writes goes with them
            others = {other: _EDITS[other] for other in ("refresh", "window") if getattr(spec, other) != _EDITS[other]}
            found.append(Obstacle(name, value, reason, {name: _EDITS[name], **others}))
        else:
            found.append(Obstacle(name, value, reason, {name: _EDITS[name]}))
    return found
