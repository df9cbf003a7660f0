"""Figure 3: what each row's loss does along the sequence, and beyond the length of training.

A model that uses its context predicts late tokens better than early ones. The rows of table 2 are evaluated by position, to
see whether all of them do, and whether the row that is better overall is also better where the context is long. Some are
evaluated on longer sequences than they were trained on: does the loss keep falling there?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.subjects.rows import BASELINES
from kvbind.experiments.tables.table2 import TABLE
from kvbind.experiments.training.run_folders import exported
from kvbind.experiments.training.trained_rows import Trained, train_rows
from kvbind.train.loop import evaluate

SERIES = "loss_by_position"

ERRORS = 2
"""Standard errors that a gain must lie away from 0."""

FURTHER = ("rung0", "rung2", "rung6", *BASELINES)
"""Rows that are evaluated beyond the length of training, at scales that say how far."""

SAMPLES = 12
"""Sequences of that evaluation."""

CACHE = "further.json"
"""Beside the report: what each of those models came to."""

AGREEMENT = 0.9
"""The share of pairs of rows from which on two orders count as the same."""

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Along:
    """A row's loss along the sequence, averaged over seeds.

    Attributes:
        curve: position and loss in nats.
        overall: the loss of all held-out tokens.
    """

    curve: Curve
    overall: float

    @property
    def early(self) -> float:
        """The mean over the first quarter of the positions."""
        return statistics.fmean(loss for _, loss in self.curve[: self._quarter])

    @property
    def late(self) -> float:
        """The mean over the last quarter."""
        return statistics.fmean(loss for _, loss in self.curve[-self._quarter :])

    @property
    def gain(self) -> float:
        """By how much late tokens are predicted better than early ones."""
        return self.early - self.late

    @property
    def gain_error(self) -> float:
        """The standard error of `gain`, from how much the loss differs between places of the same quarter."""
        quarters = ([loss for _, loss in part] for part in (self.curve[: self._quarter], self.curve[-self._quarter :]))
        return math.hypot(*(statistics.stdev(x) / len(x) ** 0.5 if len(x) > 1 else math.inf for x in quarters))

    def beyond(self, trained: int) -> tuple[float, float]:
        """By how much the loss beyond the length of training is below that over its second half, and the standard error.

        Args:
            trained: that length.
        """
        parts = [
            [loss for place, loss in self.curve if place >= trained],
            [loss for place, loss in self.curve if trained / 2 <= place < trained],
        ]
        late, early = (statistics.fmean(part) for part in parts)
        spread = (statistics.stdev(part) / len(part) ** 0.5 if len(part) > 1 else math.inf for part in parts)
        return early - late, math.hypot(*spread)

    @property
    def _quarter(self) -> int:
        return max(len(self.curve) // 4, 1)


def reproduce(**options: Any) -> dict[str, Any]:
    """Draw every row's loss by position, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "language".

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale, or an edit that does not fit.
    """
    request = Request(**options)
    trained = train_rows("figure3", TABLE.rows, ["language"], request)
    rows = {name: read(trained, name) for name in trained.runs}
    numbers = {name: f"{i}  " for i, name in enumerate(TABLE.rows[: TABLE.rungs])}
    names = {name: numbers.get(name, "") + label for name, label in trained.labels.items()}
    plotting.curves(
        trained.out / "positions.png",
        {names[name]: plotting.pooled(along.curve, 16) for name, along in rows.items()},
        title="Held-out loss by position", x="position in the sequence", y="nats per token",
        rungs=sum(name in numbers for name in rows),
    )  # fmt: skip
    lines = [
        [names[name], *(f"{x:.3f}" for x in (along.early, along.late, along.late - along.early, along.overall))]
        for name, along in rows.items()
    ]
    length, long = trained.config["data"]["length"], trained.subject.scales[request.scale].long
    further = look_further(trained, request, long) if long else {}
    verdicts = judge(rows) + [judge_further(trained.labels[name], along, length) for name, along in further.items()]
    pictures = {"Along the sequence": ("positions.png", "held-out loss by position, every row")}
    if further:
        plotting.curves(
            trained.out / "further.png",
            {names[name]: plotting.pooled(along.curve, 32) for name, along in further.items()},
            title=f"Held-out loss by position, trained at {length:,}", x="position in the sequence", y="nats per token",
            rungs=sum(name in numbers for name in further),
        )  # fmt: skip
        pictures["Beyond the length of training"] = ("further.png", f"held-out loss by position, up to {long:,} tokens")
    findings = Findings(
        experiment="figure3",
        title=f"Figure 3: loss by position, scale {request.scale}",
        lead=f"Held-out loss in nats per token, averaged over {request.seeds} seed(s). Early and late are the first and the "
        f"last quarter of the positions.{trained.missing}",
        config=trained.config,
        data={
            "rows": [
                {"name": name, "label": trained.labels[name], "early": along.early, "late": along.late,
                 "overall": along.overall, SERIES: [list(point) for point in along.curve]}
                for name, along in rows.items()
            ],
            "further": {name: [list(point) for point in along.curve] for name, along in further.items()},
            "runs": trained.folders(),
        },
        verdicts=verdicts,
        tables={"Each row": (["inner loop", "early", "late", "late - early", "overall"], lines)},
        pictures=pictures,
    )  # fmt: skip
    return write_findings(trained.out, request, findings, trained.device)


def read(trained: Trained, row: str) -> Along:
    """A row's held-out losses, averaged over seeds."""
    return averaged([run.result["held_out"] for run in trained.runs[row].values()])


def averaged(held_out: Sequence[Mapping[str, Any]]) -> Along:
    """The mean of evaluations, which have the same positions."""
    places = [place for place, _ in held_out[0][SERIES]]
    losses = zip(*([loss for _, loss in one[SERIES]] for one in held_out), strict=True)
    curve = [(float(place), statistics.fmean(own)) for place, own in zip(places, losses, strict=True)]
    return Along(curve, statistics.fmean(one["loss"] for one in held_out))


def look_further(trained: Trained, request: Request, long: int) -> dict[str, Along]:
    """The losses of some rows' models on longer sequences than they were trained on, averaged over seeds.

    Args:
        trained: all rows; of runs whose weights are elsewhere nothing is known.
        request: what was asked.
        long: tokens in a sequence.
    """
    cache = ResultCache(trained.out / CACHE, trained.device, request.fresh)
    found = {}
    for row in (name for name in FURTHER if name in trained.runs):
        own = []
        for seed, run in trained.runs[row].items():
            if not exported(run.folder):
                continue
            held_out = cache.get(run.result, long)
            if held_out is None:
                config = trained.jobs[row][seed].config
                sizes = {"length": long, "evaluation_samples": SAMPLES, "evaluation_batch": 1}
                model, task, _ = trained.open(row, seed, replace(config, data=replace(config.data, **sizes)))
                held_out = evaluate(model, task, config.train, trained.device)
                cache.put(held_out, run.result, long)
            own.append(held_out)
            request.say(f"{row} seed {seed}: loss {held_out['loss']:.3f} on sequences of {long:,} tokens")
        if own:
            found[row] = averaged(own)
    return found


def judge_further(label: str, along: Along, length: int) -> Verdict:
    """Whether a row predicts better beyond the length that it was trained at than before."""
    gain, error = along.beyond(length)
    return Verdict(
        f"{label}: the loss keeps falling beyond the length of training",
        f"the mean loss beyond it is below that over its second half by at least {ERRORS} standard errors (from the scatter "
        "between positions); it does not hold if it is above by as much",
        None if abs(gain) < ERRORS * error else gain > 0,
        f"trained at {length:,} tokens; lower by {gain:.3f} ± {error:.3f} nats from there on",
    )


def judge(rows: Mapping[str, Along]) -> list[Verdict]:
    """Whether context helps every row, and whether rows keep their order where there is much of it."""
    least = min(rows, key=lambda name: rows[name].gain)
    clear = {name: None if abs(x.gain) < ERRORS * x.gain_error else x.gain > 0 for name, x in rows.items()}
    pairs = list(combinations(rows.values(), 2))
    agreeing = sum((a.late - b.late) * (a.overall - b.overall) > 0 for a, b in pairs)
    best_late, best = (min(rows, key=key) for key in (lambda name: rows[name].late, lambda name: rows[name].overall))
    return [
        Verdict(
            "every row predicts late tokens better than early ones",
            f"the loss over the last quarter of the positions is below that over the first by at least {ERRORS} standard "
            "errors (from the scatter between positions), in every row; it does not hold if it is above by as much in one",
            False if False in clear.values() else None if None in clear.values() else True,
            f"the row that gains least, {least}, gains {rows[least].gain:.3f} ± {rows[least].gain_error:.3f} nats",
        ),
        Verdict(
            "rows have the same order at late positions as overall",
            f"of all pairs of rows, at least {AGREEMENT:.0%} are in the same order by late loss as by overall loss",
            agreeing >= AGREEMENT * len(pairs) if pairs else None,
            f"{agreeing} of {len(pairs)} pairs agree; best late {best_late}, best overall {best}",
        ),
    ]
