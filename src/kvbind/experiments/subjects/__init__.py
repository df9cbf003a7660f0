"""What a table needs to know of each task: its metrics, its scales, the paper's figures, and what throughput means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvbind.bench.harness.operands import Size
from kvbind.experiments.subjects import published
from kvbind.experiments.subjects.throughput import InnerLoopSpeed, Speed, TrainingSpeed
from kvbind.inner.value import nearest
from kvbind.tasks.linux import LINUX, OTHERS_NAME

NONE = "\N{EN DASH}"
"""In a cell without a number."""


@dataclass(frozen=True)
class Metric:
    """A held-out metric.

    Attributes:
        name: in a run's held-out metrics.
        label: heading of its column.
        title: in sentences and above figures.
        better: which way.
        digits: after the point.
        change: rows are compared by their "ratio" to the first, in percent, or by their "difference".
        margin: of such changes, the loss that would count; for a task's own metric, the largest in the paper, rounded up.
    """

    name: str
    label: str
    title: str
    better: Literal["lower", "higher"]
    digits: int = 2
    change: Literal["ratio", "difference"] = "difference"
    margin: float = 0.25

    @property
    def unit(self) -> str:
        """Of changes, behind a number."""
        return "%" if self.change == "ratio" else ""

    def changed(self, value: float | None, reference: float | None) -> str:
        """The change of `value` against `reference`; a dash where one is missing."""
        if value is None or reference is None:
            return NONE
        if self.change == "ratio":
            return f"{100 * (value / reference - 1):+.1f}%"
        return f"{value - reference:+.{min(self.digits, 2)}f}"


@dataclass(frozen=True)
class Series:
    """A held-out metric that is a list of `[x, y]`, drawn as a curve per row.

    Attributes:
        name: in a run's held-out metrics.
        heading: of its section.
        title: above its figure.
        x: of the horizontal axis.
        y: of the vertical axis.
        file: of its picture.
    """

    name: str
    heading: str
    title: str
    x: str
    y: str
    file: str


@dataclass(frozen=True)
class TaskScale:
    """How large a reproduction is.

    Attributes:
        preset: of the task.
        overrides: edits of it.
        about: for people.
        long: tokens of the sequences on which figure 3 asks what becomes of losses beyond the length of training; 0 for not.
    """

    preset: str
    overrides: tuple[str, ...]
    about: str
    long: int = 0


@dataclass(frozen=True)
class Subject:
    """A task, as tables of trained rows show it.

    Attributes:
        metric: the one that rows are compared by.
        held_out: what it is measured on.
        paper: the paper's figures, by row.
        paper_model: what the paper trained.
        scales: by name.
        speed: what throughput means.
        loss: the training loss, with its unit.
        others: further metrics with a column.
        series: metrics that are drawn.
        baseline: a held-out metric that depends on no model, in the metric's unit, and whose it is; or None.
        labels: of rows that this task words differently.
        held_out_of: by a source of data, the one to evaluate on with it.
    """

    metric: Metric
    held_out: str
    paper: Mapping[str, published.Published]
    paper_model: str
    scales: Mapping[str, TaskScale]
    speed: Speed
    loss: str
    others: tuple[Metric, ...] = ()
    series: tuple[Series, ...] = ()
    baseline: tuple[str, str] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    held_out_of: Mapping[str, str] = field(default_factory=dict)


FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of a run's training, at which models are evaluated on the way."""

ON_THE_WAY = f"train.evaluate_at=[{','.join(map(str, FRACTIONS))}]"


def _language_size(config: Any) -> Size:
    """The operands of one layer of the language model."""
    heads = config.model.fields["num_lact_heads"]
    return Size(config.data.batch, config.data.length, heads, config.model.fields["hidden_size"] // heads)


SUBJECTS: dict[str, Subject] = {
    "language": Subject(
        metric=Metric("perplexity", "ppl", "perplexity", "lower", digits=3, change="ratio", margin=2.5),
        held_out="held-out text",
        paper=published.LANGUAGE,
        paper_model="760M",
        scales={
            "smoke": TaskScale("tiny", ("train.steps=180", "train.warmup=18", ON_THE_WAY), "minutes on two CPU cores"),
            "small": TaskScale("small", (ON_THE_WAY,), "minutes per row on one GPU"),
            "large": TaskScale("large", (ON_THE_WAY,), "61 million bytes per row, minutes each on one H200", long=32768),
            "paper": TaskScale("760m", (), "the paper's own size: 760M parameters, 21 billion tokens per row"),
        },
        speed=InnerLoopSpeed(_language_size, published.INNER_LOOP_SPEED),
        loss="nats per token",
        others=(Metric("bits_per_byte", "bits/byte", "bits per byte", "lower", digits=3),),
        series=(
            Series(
                "loss_by_position", "Positions", "Held-out loss by position", x="position in the sequence",
                y="nats per token", file="positions.png",
            ),
        ),
        held_out_of={LINUX: OTHERS_NAME},
    ),
    "images": Subject(
        metric=Metric("top1", "top-1", "top-1 accuracy (%)", "higher"),
        held_out="held-out images",
        paper=published.IMAGES,
        paper_model="ViTTT-B",
        scales={
            "smoke": TaskScale("digits", (ON_THE_WAY,), "minutes on two CPU cores"),
            "small": TaskScale("fashion", (ON_THE_WAY,), "minutes per row on one GPU"),
            "large": TaskScale("fashion", ("epochs=100", "warmup_epochs=2", ON_THE_WAY), "6 million images per row"),
            "paper": TaskScale("imagenet", (), "the paper's own size: ViTTT-B, 60 epochs of ImageNet-1K per row"),
        },
        speed=TrainingSpeed("images"),
        loss="cross-entropy, nats",
        labels={"rung6": "no gradient clipping", "softmax": "plain vision transformer"},
    ),
    "views": Subject(
        metric=Metric("psnr", "PSNR", "PSNR (dB)", "higher"),
        held_out="held-out views",
        paper=published.VIEWS,
        paper_model="114M",
        scales={
            "smoke": TaskScale("tiny", (ON_THE_WAY,), "minutes on two CPU cores"),
            "small": TaskScale("small", (ON_THE_WAY,), "minutes per row on one GPU"),
            "large": TaskScale("large", (ON_THE_WAY,), "3.8 million views per row"),
            "paper": TaskScale("114m", (), "the paper's own size: 12 layers of width 768, 20,000 steps per row"),
        },
        speed=TrainingSpeed("views"),
        loss="mean squared error",
        others=(Metric("ssim", "SSIM", "SSIM", "higher", digits=3),),
        baseline=("nearest_view_psnr", "the nearest input view, taken as it is,"),
        labels={"rung6": "no rates or Newton-Schulz", "softmax": "full attention across views"},
    ),
}  # fmt: skip
"""By the tasks' names."""

ALL = "all"
"""In place of a task's name: each of them."""


def named_subject(task: str) -> Subject:
    """The task of that name, as tables show it.

    Raises:
        ValueError: an unknown name; the message gives the nearest known one.
    """
    if task not in SUBJECTS:
        known = (*SUBJECTS, ALL)
        raise ValueError(f"task must be one of {', '.join(known)}; got {task!r}{nearest(task, known)}")
    return SUBJECTS[task]
