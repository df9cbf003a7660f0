"""Throughput, beside quality: of the inner loop alone in both of its forms, or of whole training steps.

A task's table has one of the two. Both offer `columns`, the names of their figures; `measure`, those figures by row;
`published`, the paper's; `compared`, ours in the paper's unit; `about`, a sentence on what was measured; and `measured_now`,
whether that is done on the machine that writes the report: runs may have been trained earlier, elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kvbind.bench.harness.operands import Size
from kvbind.bench.kernels.forms import tokens_per_second
from kvbind.experiments.results.cache import ResultCache
from kvbind.forms.evaluate import Form
from kvbind.forms.explained.analysis import explain
from kvbind.inner import InnerLoop

if TYPE_CHECKING:
    from kvbind.experiments.training.runs import Run

Speeds = dict[str, dict[str, float | None]]
"""Units per second by row and column; None for what a row does not have."""


@dataclass(frozen=True)
class InnerLoopSpeed:
    """Forward and backward of the inner loop alone, recurrent and parallel, on operands like a trained layer's.

    The paper counts tokens times heads: its benchmark runs 4 heads of 384 over 32,768 tokens, forward alone.

    Attributes:
        size: the operands' sizes, from a configuration whose `model.inner` is one whole inner loop.
        paper: millions of tokens times heads per second by row and form.
        unit: what is counted.
        per: how many of them make 1 in a table.
        title: of such columns.
        compared_title: of those beside the paper's.
        compared_unit: what the compared columns count.
        axis: below a figure, which has the paper's unit.
        pattern: of the numbers.
    """

    size: Callable[[Any], Size]
    paper: Mapping[str, Mapping[str, float]]
    unit: str = "tokens"
    per: float = 1e6
    title: str = "training of the inner loop, million tokens/s"
    compared_title: str = "the same beside the paper's, million tokens x heads/s"
    compared_unit: str = "x heads"
    axis: str = "million tokens x heads per second"
    pattern: str = ".3f"
    columns: Mapping[str, str] = field(default_factory=lambda: {"recurrent": "recurrent", "parallel": "parallel"})

    measured_now: ClassVar[bool] = True

    def published(self, row: str) -> dict[str, float | None]:
        """The paper's figures for a row, in millions of tokens times heads per second."""
        return {form: self.paper.get(row, {}).get(form) for form in self.columns}

    def compared(self, x: float | None, setting: Mapping[str, Any]) -> float | None:
        """Tokens per second in the paper's unit, millions of tokens times heads."""
        return None if x is None else x / self.per * setting["heads"]

    def setting(self, config: Any) -> dict[str, Any]:
        """The sizes, as plain data."""
        return dict(vars(self.size(config)))

    def about(self, setting: Mapping[str, Any], device: str) -> str:
        """What was measured, and where."""
        return (
            "Throughput is forward and backward of the inner loop alone, in millions of tokens per second, at "
            f"{setting['batch']} x {setting['tokens']} tokens, {setting['heads']} heads of {setting['width']}, on {device}. "
            "The paper's throughput counts tokens times heads (4 heads of 384, 32,768 tokens, forward without gradients); "
            'columns "x heads" are in that unit.'
        )

    def measure(
        self, configs: Mapping[str, Any], runs: Mapping[str, Sequence[Run]], device: torch.device, path: Path, fresh: bool
    ) -> Speeds:
        """Tokens per second of each row's inner loop in both forms; None for a form that it does not have.

        Args:
            configs: by row.
            runs: of each row; not looked at.
            device: where to run.
            path: keeps the figures.
            fresh: measure anew.
        """
        inners = {name: InnerLoop.from_dict(config.model.inner) for name, config in configs.items()}
        size = self.size(next(iter(configs.values())))
        plain = {name: inner.to_dict() for name, inner in inners.items()}
        cache = ResultCache(path, device, fresh)
        speeds: Speeds | None = cache.get(plain, vars(size))
        if speeds is None:
            forms: tuple[Form, ...] = ("recurrent", "parallel")
            cases = [
                (name, form) for form in forms for name in inners if form == "recurrent" or explain(inners[name]).parallel
            ]
            measured = tokens_per_second([(inners[name], form) for name, form in cases], size, device)
            speeds = {name: dict.fromkeys(forms) for name in inners}
            for (name, form), speed in zip(cases, measured, strict=True):
                speeds[name][form] = speed
            cache.put(speeds, plain, vars(size))
        return speeds


@dataclass(frozen=True)
class TrainingSpeed:
    """Whole training steps, as the rows' own runs went.

    Attributes:
        unit: what is counted; the task's own unit.
        per: how many of them make 1 in a table.
        pattern: of the numbers.
    """

    unit: str
    per: float = 1.0
    pattern: str = ",.0f"

    measured_now: ClassVar[bool] = False
    compared_title: ClassVar[str] = ""
    compared_unit: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """Of such columns."""
        return f"training, {self.unit}/s"

    @property
    def axis(self) -> str:
        """Below a figure."""
        return f"{self.unit} per second"

    @property
    def columns(self) -> Mapping[str, str]:
        """The one column and its heading."""
        return {"training": f"{self.unit}/s"}

    def published(self, row: str) -> dict[str, float | None]:
        """Nothing: the paper times inner loops alone."""
        return {}

    def compared(self, x: float | None, setting: Mapping[str, Any]) -> float | None:
        """A number as it stands in figures, where the paper has none to set the unit."""
        return None if x is None else x / self.per

    def setting(self, config: Any) -> dict[str, Any]:
        """Nothing further: the configuration says it."""
        return {}

    def about(self, setting: Mapping[str, Any], device: str) -> str:
        """What was measured, and where."""
        return f"Throughput is of whole training steps, beside the runs trained at the same time, on {device}."

    def measure(
        self, configs: Mapping[str, Any], runs: Mapping[str, Sequence[Run]], device: torch.device, path: Path, fresh: bool
    ) -> Speeds:
        """Units per second of training, averaged over a row's runs."""
        return {name: {"training": statistics.fmean(run.speed(self.unit) for run in own)} for name, own in runs.items()}


Speed = InnerLoopSpeed | TrainingSpeed
