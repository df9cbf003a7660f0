"""What every chart asks of its numbers: a range that is wide enough for them, and labels that tell them apart."""

from __future__ import annotations

from collections.abc import Iterable

LEAST = 0.01
"""The least width of a range, relative to its largest number: less than that is not drawn as if it were much."""

MORE = 6
"""How many digits a label may have beyond those that were asked for."""


def widened(low: float, high: float) -> tuple[float, float]:
    """A range about the same middle whose width is at least `LEAST` of its largest number.

    Args:
        low: its least number.
        high: its largest.
    """
    short = LEAST * max(abs(low), abs(high)) - (high - low)
    return (low - short / 2, high + short / 2) if short > 0 else (low, high)


def digits_apart(values: Iterable[float], digits: int) -> int:
    """How many digits after the point numbers need so that those that differ have different labels.

    Args:
        values: the numbers.
        digits: the least that is wanted; the result is at most `MORE` above.
    """
    different = set(values)
    enough = (n for n in range(digits, digits + MORE) if len({f"{x:.{n}f}" for x in different}) == len(different))
    return next(enough, digits + MORE)
