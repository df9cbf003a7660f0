"""Results of one experiment and task at several scales as one section of the report: the largest first, each claim once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbind.experiments import EXPERIMENTS
from kvbind.experiments.outcomes.claims import STATES
from kvbind.experiments.report.contents import PagePart
from kvbind.experiments.report.rules import plain

SCALES = ("paper", "small", "smoke")
"""From the largest; others follow."""

ONE_SEED = "one seed has no standard error"
CLOSE = "the numbers decide neither way"
"""Why a claim is not decided."""


@dataclass(frozen=True)
class JudgedClaim:
    """What results say of a claim, from the largest scale at which it is decided.

    Attributes:
        claim: in words.
        rule: when it holds, in plain words.
        holds: None where it is decided at no scale.
        found: the numbers.
        scale: they are from.
        others: scales at which it is decided otherwise, each with "holds" or "does not hold".
        reason: why it is not decided; empty where it is.
    """

    claim: str
    rule: str
    holds: bool | None
    found: str
    scale: str
    others: Sequence[tuple[str, str]] = ()
    reason: str = ""


@dataclass(frozen=True)
class Section:
    """Parts of one experiment and task.

    Attributes:
        name: in addresses.
        title: for people.
        parts: at each scale, the largest first.
        claims: of all parts, each once.
    """

    name: str
    title: str
    parts: Sequence[PagePart]
    claims: Sequence[JudgedClaim]

    @property
    def counts(self) -> dict[bool | None, int]:
        """How many claims hold, do not hold, and are not decided."""
        return {holds: sum(claim.holds is holds for claim in self.claims) for holds in STATES}

    @property
    def decided(self) -> list[tuple[str, list[JudgedClaim]]]:
        """Claims that are decided, those of one rule together."""
        known = [claim for claim in self.claims if claim.holds is not None]
        return [
            (rule, [claim for claim in known if claim.rule == rule]) for rule in dict.fromkeys(one.rule for one in known)
        ]

    @property
    def open(self) -> list[tuple[str, list[JudgedClaim]]]:
        """Claims that are not decided, by the reason."""
        unknown = [claim for claim in self.claims if claim.holds is None]
        reasons = dict.fromkeys(claim.reason for claim in unknown)
        return [(reason, [claim for claim in unknown if claim.reason == reason]) for reason in reasons]

    @property
    def rules(self) -> list[str]:
        """The exact rules of all claims."""
        return list(dict.fromkeys(str(verdict["rule"]) for part in self.parts for verdict in part.verdicts))


def sections_of(parts: Iterable[PagePart]) -> list[Section]:
    """Parts by experiment and task, in the order in which the first of each comes."""
    found: dict[tuple[str, str, str], list[PagePart]] = {}
    for part in parts:
        # other experiments, such as a probe, are each about a model of its own
        alone = "" if part.table or part.experiment in EXPERIMENTS else str(part.place)
        found.setdefault((part.table or part.experiment, part.task, alone), []).append(part)
    names: dict[str, int] = {}
    sections = []
    for (experiment, task, _), own in found.items():
        name = re.sub(r"[^\w-]", "", f"{experiment}-{task}" if task else experiment) or "part"
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}-{names[name]}"
        ordered = sorted(own, key=size)
        sections.append(Section(name, common_title(ordered[0]), ordered, claims_of(ordered)))
    return sections


def size(part: PagePart) -> tuple[bool, int, int]:
    """Where a part stands among those of its section: measured steps of a table come behind tables."""
    scale = SCALES.index(part.scale) if part.scale in SCALES else len(SCALES)
    return bool(part.table), scale, -part.seeds


def common_title(part: PagePart) -> str:
    """A part's title, without its scale where that stands in it."""
    if not part.scale:
        return part.title
    return re.sub(rf",? scale {re.escape(part.scale)}(, \d+ seeds)?", "", part.title).rstrip(": ")


def claims_of(parts: Sequence[PagePart]) -> list[JudgedClaim]:
    """Each claim of some parts once, in the order in which they first appear."""
    found: dict[str, list[tuple[PagePart, Mapping[str, Any]]]] = {}
    for part in parts:
        for verdict in part.verdicts:
            found.setdefault(str(verdict["claim"]), []).append((part, verdict))
    return [one_claim(claim, own) for claim, own in found.items()]


def one_claim(claim: str, found: Sequence[tuple[PagePart, Mapping[str, Any]]]) -> JudgedClaim:
    """A claim and its verdicts, of the largest scale first.

    The largest scale speaks, decided or not, unless it has a single seed and the rule asks for several.
    """
    part, verdict = next((one for one in found if why_open(one[1]) != ONE_SEED), found[0])
    others = [(own.at, STATES[one["holds"]]) for own, one in found if one["holds"] != verdict["holds"] and not why_open(one)]
    return JudgedClaim(
        claim, plain(str(verdict["rule"])), verdict["holds"], str(verdict["found"]), part.at, others, why_open(verdict)
    )


def why_open(verdict: Mapping[str, Any]) -> str:
    """Why a verdict is not decided; empty where it is."""
    if verdict["holds"] is not None:
        return ""
    return ONE_SEED if re.search(r"\b1 seed\b", str(verdict["found"])) else CLOSE
