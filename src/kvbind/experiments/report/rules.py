"""The rule of a claim in one plain sentence. The exact one stays in `results.json` and at the end of its section."""

from __future__ import annotations

import re

PLAIN = (
    (r"it is worse by less than (\S+), by at least (\S+) standard errors of the differences seed by seed",
     r"the change costs less than \1, by at least \2 standard errors over seeds"),
    (r"rung 1 is better than every other rung by at least (\S+) standard errors of the differences seed by seed",
     r"rung 1 beats every other rung by at least \1 standard errors over seeds"),
    (r"accuracy, as a mean over the logarithm of bytes .*, is above that of (\S+) by at least (\S+) standard errors.*",
     r"its mean accuracy at equal bytes of state is above that of \1 by at least \2 standard errors over seeds"),
    (r"at least (\S+) times as fast on every rung that has one",
     r"it is at least \1 times as fast on every rung that has one"),
    (r"at every width at least (\S+) of all answers are right", r"at least \1 of its answers are right at every width"),
    (r"at most (\S+) of the steps from scratch come to at least as good a (.+), in every seed",
     r"fine-tuning needs at most \1 of the steps of training from scratch to reach the same \2, in every seed"),
    (r"three quarters of its steps take less time than three quarters of the recurrent form's",
     r"its steps take less time at the third quartile"),
    (r"with any number of further steps it is worse than with the one step of training(.*)",
     r"it is worse with every number of steps above the one used in training\1"),
    (r"it is lower with every further step(.*)", r"each further step lowers it\1"),
    (r"right on at least (\S+) of the tokens that it was not fitted on, in every layer",
     r"it classifies at least \1 of held-out tokens correctly, in every layer"),
    (r"at most (\S+) of them are near one, in every layer", r"at most \1 of them have one nearby, in every layer"),
    (r"the loss over the last quarter of the positions is below that over the first by at least (\S+) standard errors.*, in "
     r"every row",
     r"the loss over the last quarter of the sequence is below that over the first by at least \1 standard errors, in every "
     r"row"),
    (r"the loss over the last quarter of the positions is below that over the first, in every row",
     r"the loss over the last quarter of the sequence is below that over the first, in every row"),
    (r"relative error below (\S+) in float64 and (\S+) in float32 in every case, and writes make up at least (\S+) of the "
     r"outputs", r"the relative error is below \1 in float64 and \2 in float32, in every case"),
    (r"a line through the gaps, against the logarithm of their places, has a slope (\S+) standard errors over seeds.*",
     r"a line fitted to the gaps runs towards zero, by at least \1 standard errors over seeds"),
)  # fmt: skip
"""Exact beginnings of rules and what to say in their place; of others the beginning itself, up to a semicolon, is shown."""


def plain(rule: str) -> str:
    """A rule as it follows "Holds if", without a full stop."""
    beginning = rule.split("; ")[0]
    for pattern, said in PLAIN:
        found = re.fullmatch(pattern, beginning)
        if found:
            return found.expand(said)
    return beginning
