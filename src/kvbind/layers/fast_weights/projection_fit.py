"""What a `Projections` makes of an inner loop: the parametrization of each gate, widths, and whether the two fit."""

from __future__ import annotations

from kvbind.inner.gates import Gate, decays
from kvbind.inner.projections import Constant, Making, Place, Projections, Sigmoid, Softplus, Step
from kvbind.inner.spec import InnerLoop


def making_of(gate: Gate, inner: InnerLoop, projections: Projections) -> Making:
    """How a gate is made: as `projections` says, or as follows from the inner loop."""
    given: Making | None = getattr(projections, gate.name)
    if given is not None:
        return given
    if gate.name == "read_rate":
        return Place()
    return Sigmoid(start=gate.start)


def rate_of(inner: InnerLoop, projections: Projections) -> Making:
    """How the rate is made, likewise."""
    if not inner.token_lr:
        return Constant()
    return projections.rate if projections.rate is not None else Softplus()


def fast_widths(hidden_size: int, heads: int, projections: Projections, multiplier: float) -> tuple[int, int, int]:
    """Channels of a head's keys, of its values, and of the fast network's hidden layers.

    Raises:
        ValueError: less than one.
    """
    width = hidden_size / heads
    found = int(width * projections.key_width), int(width * projections.value_width)
    for name, channels in zip(("key_width", "value_width"), found, strict=True):
        if channels < 1:
            raise ValueError(f"{name} must leave a head at least one of its {width:g} channels; got {channels}")
    return (*found, max(int(found[0] * multiplier), 1))


def check_fits_projections(inner: InnerLoop, projections: Projections) -> None:
    """Refuse projections that an inner loop has no use for, or that lack what it needs.

    Raises:
        ValueError: they do not fit.
    """
    p = projections
    if p.removal is not None and (inner.writes != 2 or not inner.erase):
        raise ValueError(
            f"removal needs an inner loop with writes=2 and erase=True; got writes={inner.writes}, erase={inner.erase}"
        )
    if p.removal is not None and p.write_gate is not None:
        raise ValueError("removal and write_gate exclude each other")
    if p.correction and not (inner.erase and p.removal is None and inner.writes == 1):
        raise ValueError(
            f"correction needs an inner loop with erase=True and writes=1; got erase={inner.erase}, writes={inner.writes}"
        )
    if p.skip != "none" and inner.writes > 1 and p.removal is None:
        raise ValueError(f"skip needs one value for each token; got writes={inner.writes}")
    if p.start == "zero" and len(inner.network.matrices) > 1:
        raise ValueError(
            f"start must be 'learned' for a network of several layers, as none of them learns from zero; got "
            f"{inner.network!r}"
        )
    if p.rotary == "span" and (inner.span or 1) < 2:
        raise ValueError(f"rotary='span' needs spans of several tokens; got {inner.span}")
    if p.read_rate is None and inner.read_rate and inner.refresh == "call":
        raise ValueError("read_rate needs a making of its own under refresh='call', whose spans have no length")
    if isinstance(p.read_rate, Place) and inner.read_rate and inner.refresh == "call":
        raise ValueError("read_rate=Place() needs spans of a length; got refresh='call'")
    decay = decays(inner.gates)[1]
    if isinstance(p.write_gate, Step) and (decay is None or decay.per != "head"):
        raise ValueError(f"write_gate=Step() needs an inner loop whose weights decay per head; got {decay and decay.per!r}")
