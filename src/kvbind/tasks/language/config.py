"""Configuration of the language task: its fields, and what is filled in for what was left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kvbind.inner import InnerLoop
from kvbind.inner.projections import Projections
from kvbind.inner.systems import PROJECTIONS
from kvbind.inner.value import LATER, check_choice, nearest
from kvbind.layers.fitting import check_fits_causal_layer
from kvbind.models.presets import PRESETS as SIZES
from kvbind.tasks import inner_loops, preset_files
from kvbind.tasks.inner_loops import edited
from kvbind.tasks.start import StartConfig
from kvbind.train.config import TrainConfig, check_seed

PRESETS = preset_files("language")
"""The shipped configurations, by name."""

SMALLEST = "tiny"
"""The one that is taken where none is named."""

MIXERS = ("fast", "in_place")
"""What `model.mixer` can be in this task."""

LEAST_LENGTH = 512
"""Tokens in the samples of a saved model, where it was made for as many."""


@dataclass
class LanguageModelConfig:
    """The LaCT language model; its vocabulary is the tokenizer's, unless `fields` has a larger one.

    Attributes:
        size: where it starts: a preset of `kvbind.models`, "tiny", "30m", "125m", "760m" or "3b".
        inner: edits of that size's inner loop, field by field; "system" names another to start from (`kvbind systems` lists
            them). With a system comes the layer that it was published in, where there is one
            (`kvbind.inner.systems.PROJECTIONS`).
        fields: edits of any other field of `kvbind.models.LactConfig`; a `vocab_size` leaves room beside the tokenizer's
            tokens. `projections` edits those of the system field by
            field; a name takes those of another, and null leaves its inner loop in the LaCT layer.
        ttt_form: how the inner loop is evaluated: "auto", "recurrent" or "parallel".
        mixer: where fast weights are: "fast", in layers that mix tokens, as above; or "in_place", in the MLPs of a Llama of
            the same sizes (In-Place TTT), in chunks as long as the inner loop's.
    """

    size: str = "tiny"
    inner: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    ttt_form: str = "auto"
    mixer: str = "fast"

    LATER: ClassVar[dict[str, Any]] = {"mixer": "fast"}
    """What `kvbind.train.config.what_matters` leaves out at this value: runs from before the key have no other, and keep
    their names."""


@dataclass
class LanguageDataConfig:
    """Text, and how it is packed.

    Attributes:
        source: "stdlib" (the Python standard library's source), "linux" (the Linux kernel's C source, from Debian's package
            linux-source), "package:NAME" (an installed Python package's), a folder or file of text, JSONL or parquet, or
            "hub:NAME".
        column: of tables, the column that holds the text.
        stream: read local JSONL or parquet as it comes, where it is too large to be gone through beforehand.
        name: of hub data sets, the configuration.
        part: of hub data sets, the published split.
        encoding: of text and JSONL files, as Python names it; parquet is always UTF-8.
        held_out: the fraction of documents kept for evaluation, chosen by a stable hash; where there are too few for that,
            the last part of each.
        held_out_source: other text to evaluate on, all of it; training then reads all of `source`. "linux-others" are
            subsystems that "linux" has not.
        held_out_name: of a hub `held_out_source`, the configuration.
        held_out_part: of a hub `held_out_source`, the published split.
        tokenizer: "bytes", or a name or folder that transformers' `AutoTokenizer` loads.
        chat_template: what is saved with the tokenizer for `apply_chat_template`: "plain" (`role: content`, a blank line),
            a file of a Jinja template, or "" for the tokenizer's own, if it has one. Training does not look at it.
        length: tokens in a sample.
        batch: samples in a batch.
        window: samples that are shuffled together.
        streams: readings of the text that take turns, sample by sample, each of its own documents. Several processes or
            workers that train together read no text twice where there is a stream for each; the order depends on it.
        separate: documents stay apart in attention and fast weights (`cu_seqlens`); else they run on as one text.
        workers: processes that read, for each one that trains, at most as many as it has streams; 0 for none besides it.
            Nothing but speed depends on it.
        evaluation_samples: held-out samples, spread over the held-out text.
        evaluation_batch: samples in an evaluation batch; 0 for as many as in training.
    """

    source: str = "stdlib"
    column: str = "text"
    stream: bool = False
    name: str | None = None
    part: str = "train"
    encoding: str = "utf-8"
    held_out: float = 0.1
    held_out_source: str | None = None
    held_out_name: str | None = None
    held_out_part: str = "test"
    tokenizer: str = "bytes"
    chat_template: str = ""
    length: int = 512
    batch: int = 8
    window: int = 1024
    streams: int = 1
    separate: bool = False
    workers: int = 0
    evaluation_samples: int = 64
    evaluation_batch: int = 0

    INDIFFERENT: ClassVar[tuple[str, ...]] = ("workers", "encoding", "chat_template")
    """What `kvbind.train.config.what_matters` leaves out; an encoding is told apart by what is read, as files are, and a
    chat template is written beside the model."""

    def __post_init__(self) -> None:
        for key, least in {"length": 2, "batch": 1, "window": 1, "streams": 1, "workers": 0, "evaluation_samples": 1,
                           "evaluation_batch": 0}.items():  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} must be at least {least}; got {getattr(self, key)}")


@dataclass
class LanguageConfig:
    """A whole run: its seed (of weights and data order), model, data, training, and the saved model that it starts from."""

    seed: int = 0
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: LanguageDataConfig = field(default_factory=LanguageDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig = field(default_factory=StartConfig, metadata=LATER)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice("model.mixer", self.model.mixer, MIXERS)

    @staticmethod
    def beneath(file: Any, edits: Any) -> Any:
        """What is left of a configuration file under further edits: another system's come with its own layer."""
        left = inner_loops.beneath(file, edits)
        if _system(edits) is None or not isinstance(left, dict) or not isinstance(left.get("model"), dict):
            return left
        fields = left["model"].get("fields")
        if not isinstance(fields, dict) or _system(file) == _system(edits):
            return left
        kept = {name: x for name, x in fields.items() if name != "projections"}
        return {**left, "model": {**left["model"], "fields": kept}}


def inner_loop(model: LanguageModelConfig) -> InnerLoop:
    """The inner loop that a model's configuration describes.

    Raises:
        ValueError, TypeError: an unknown size, system or field (the message gives the nearest known one), a value that
            does not fit, or an inner loop that is not causal.
    """
    return edited(model_fields(model)["inner"], model.inner, check_fits_causal_layer)


def model_fields(model: LanguageModelConfig) -> dict[str, Any]:
    """The fields of `LactConfig` that `model.size` and `model.fields` give.

    Raises:
        ValueError: an unknown size, or a field that has its own place.
    """
    if model.size not in SIZES:
        raise ValueError(f"model.size must be one of {', '.join(SIZES)}; got {model.size!r}{nearest(model.size, SIZES)}")
    for name, where in {"inner": "model.inner", "ttt_form": "model.ttt_form"}.items():
        if name in model.fields:
            raise ValueError(f"model.fields must not hold {name!r}, which {where} gives")
    made = projections(model)
    return {**SIZES[model.size], **model.fields, **({} if made is None else {"projections": made.to_dict()})}


def projections(model: LanguageModelConfig) -> Projections | None:
    """The projections of a model's fast weights: those of its system, edited; None in the LaCT layer.

    Raises:
        ValueError, TypeError: the name of no system, or a field that is unknown or does not fit.
    """
    given = model.fields.get("projections", {})
    system = model.inner.get("system")
    own = PROJECTIONS.get(system) if isinstance(system, str) else None
    if isinstance(given, str):
        if given not in PROJECTIONS:
            known = ", ".join(PROJECTIONS)
            raise ValueError(f"projections must be those of one of {known}; got {given!r}{nearest(given, PROJECTIONS)}")
        return PROJECTIONS[given]
    if given is None or (own is None and "projections" not in model.fields):
        return None
    if not isinstance(given, dict):
        raise TypeError(f"projections must be fields, the name of a system or null; got {given!r}")
    return Projections.from_dict(({} if own is None else own.to_dict()) | given)


def _system(tree: Any) -> Any:
    inner = tree.get("model", {}).get("inner") if isinstance(tree, dict) and isinstance(tree.get("model"), dict) else None
    return inner.get("system") if isinstance(inner, dict) else None


def resolve(config: LanguageConfig) -> LanguageConfig:
    """`config` with every field of its inner loop, and every field that its size gives, spelled out."""
    return replace(config, model=resolved(config.model), start=config.start.resolved())


def resolved(model: LanguageModelConfig) -> LanguageModelConfig:
    """A model's configuration with every field of its inner loop, and every field that its size gives, spelled out."""
    own = {name for name in ("inner", "vocab_size") if name not in model.fields}
    fields = {name: x for name, x in model_fields(model).items() if name not in own}
    return replace(model, inner=inner_loop(model).to_dict(), fields=fields)
