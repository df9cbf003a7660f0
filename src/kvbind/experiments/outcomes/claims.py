"""What numbers say to a claim."""

from __future__ import annotations

from dataclasses import dataclass

STATES = {True: "holds", False: "does not hold", None: "not decided at this scale"}
"""What is said of a verdict, by whether the claim holds."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers say to a claim.

    Attributes:
        claim: in words.
        rule: when it holds.
        holds: whether it does; None where the numbers decide neither way.
        found: the numbers that decided.
    """

    claim: str
    rule: str
    holds: bool | None
    found: str

    @property
    def word(self) -> str:
        """What is said of it."""
        return STATES[self.holds]
