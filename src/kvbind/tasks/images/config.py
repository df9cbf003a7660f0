"""Configuration of the image task: its fields, and what is filled in for what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from kvbind.inner import InnerLoop
from kvbind.inner.systems import vittt
from kvbind.inner.value import LATER, check_choice, nearest
from kvbind.layers.vittt import check_fits_conv, check_fits_heads
from kvbind.tasks import preset_files
from kvbind.tasks.files import EXPANDED_GIB
from kvbind.tasks.images.augment import AugmentConfig
from kvbind.tasks.images.loading import Order
from kvbind.tasks.images.look import look, suited_patch
from kvbind.tasks.images.sources import DIGITS, ImageSource, Splits, holds_idx
from kvbind.tasks.inner_loops import beneath, edited
from kvbind.tasks.start import StartConfig
from kvbind.train.config import TrainConfig, check_seed, parse_overrides

SMALL_SIZE, SHRUNK = 32, 4
"""Images of at most this side in pixels, and this many times smaller than they were, are thumbnails, which is said."""

PROCESSOR = "preprocessor_config.json"
"""What transformers calls the file of the processor beside a model."""

PRESETS = preset_files("images")
"""The shipped configurations, by name."""

BRANCHES = {"heads": vittt("glu"), "conv": vittt("conv")}
"""The inner loops of ViTTT's two branches, by the keys of `model.inner`."""

FITS = {"heads": check_fits_heads, "conv": check_fits_conv}
"""What raises where a branch cannot run an inner loop."""

MODEL_FIELDS = (
    "embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio", "qkv_bias", "drop_rate", "drop_path_rate",
    "initializer_range", "fast_weights",
)  # fmt: skip
"""What `model.fields` may hold."""


@dataclass
class ImagesModelConfig:
    """ViTTT; its classes and the size of its images are the data's.

    Attributes:
        size: where it starts: a published size, such as "vittt_tiny" or "vittt_base" (`kvbind.models.vittt.SIZES`).
        inner: edits of the inner loops, field by field, under "heads" (the gated linear units) and "conv" (the convolution).
        fields: edits of that size: `embed_dim`, `depth`, `num_heads`, `patch_size`, `mlp_ratio`, `qkv_bias`, `drop_rate`,
            `drop_path_rate`, `initializer_range`, `fast_weights`. Hierarchical sizes have no `patch_size`.
        compile: let `torch.compile` make the kernels of the model that is trained; an average of weights (`train.ema`) is
            evaluated without.
    """

    size: str = "vittt_tiny"
    inner: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    compile: bool = False


@dataclass
class ImagesDataConfig:
    """Images, and how they are read.

    Attributes:
        source: "digits" (scikit-learn's, 8 x 8), a folder of IDX files, of class folders, or of parquet or arrow files, or
            "hub:NAME". Digits and IDX files are held in memory, on the device that trains; other images are read as they are
            needed.
        name: of hub data sets, the configuration.
        part: of tables, the split to train on.
        held_out_part: of tables, the split to evaluate on.
        image_column: of tables, that of the images.
        label_column: of tables, that of the classes.
        held_out: the fraction of each class kept for evaluation where the source has no split of its own.
        images: training images, where they should not be counted to know how long an epoch is; 0 to count them.
        size: side of the images in pixels; those held in memory must have it, others are resized. 0 for one that suits the
            training images, which are looked at.
        channels: 1 for grey, 3 for colour; 0 for grey if they all are.
        mean: of each channel, of pixels from 0 to 1; empty for theirs.
        std: of each channel, likewise.
        expanded_gib: the most GiB that a compressed file or an image may expand to.
        kept: in evaluation, the side of the central square that is seen over the image's shorter side.
        batch: images in a batch; 0 for 64, or all where there are fewer.
        workers: processes that read; 0 for none besides the training one. Nothing but speed depends on it.
        evaluation_batch: images in an evaluation batch; 0 for as many as in training.
    """

    source: str = "digits"
    name: str | None = None
    part: str = "train"
    held_out_part: str = "validation"
    image_column: str = "image"
    label_column: str = "label"
    held_out: float = 0.2
    images: int = 0
    size: int = 224
    channels: int = 3
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    expanded_gib: float = EXPANDED_GIB
    kept: float = 1.0
    batch: int = 64
    workers: int = 0
    evaluation_batch: int = 0

    INDIFFERENT: ClassVar[tuple[str, ...]] = ("workers", "expanded_gib")

    def __post_init__(self) -> None:
        for key, least in {"images": 0, "size": 0, "batch": 0, "workers": 0, "evaluation_batch": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} must be at least {least}; got {getattr(self, key)}")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"data.channels must be 1 or 3; got {self.channels} (0 looks at the images)")
        for key in ("mean", "std"):
            held = list(getattr(self, key))
            if held and len(held) != self.channels:
                raise ValueError(f"data.{key} must hold a number per channel, {self.channels}; got {held}")
        if min(self.std, default=1) <= 0:
            raise ValueError(f"data.std must be above 0; got {list(self.std)}")
        if not self.expanded_gib > 0:
            raise ValueError(f"data.expanded_gib must be above 0; got {self.expanded_gib}")
        if not 0 < self.kept <= 1:
            raise ValueError(f"data.kept must be above 0 and at most 1; got {self.kept}")

    @property
    def looks(self) -> bool:
        """Whether something is left to be chosen by looking at the images."""
        return not (self.size and self.channels and self.mean and self.std and self.batch)

    def open(self) -> Splits:
        """The images.

        Raises:
            ValueError: a source that does not exist or does not hold what it should.
            ImportError: a source that needs a library which is not installed.
        """
        source = ImageSource(
            self.source, self.held_out, self.name, self.part, self.held_out_part, self.image_column, self.label_column,
            self.expanded_gib,
        )  # fmt: skip
        return source.open()


@dataclass
class ImagesConfig:
    """A whole run: its seed (of weights, data order and augmentation), model, data, augmentation and training.

    Attributes:
        seed: of everything random.
        epochs: how often the training images are gone through; 0 where `train.steps` says how long training is.
        warmup_epochs: likewise, in place of `train.warmup`.
        model: the model.
        data: the images.
        augment: how they are varied.
        train: how the model is trained.
        start: the saved model that the run starts from.
    """

    seed: int = 0
    epochs: float = 0.0
    warmup_epochs: float = 0.0
    model: ImagesModelConfig = field(default_factory=ImagesModelConfig)
    data: ImagesDataConfig = field(default_factory=ImagesDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig = field(default_factory=StartConfig, metadata=LATER)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, key in (("epochs", "steps"), ("warmup_epochs", "warmup")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
            if getattr(self, name) and getattr(self.train, key) != getattr(TrainConfig, key):
                raise ValueError(
                    f"{name}={getattr(self, name):g} and train.{key}={getattr(self.train, key)} both say how long; set "
                    f"{name}=0 to count steps"
                )

    @staticmethod
    def beneath(file: Any, edits: Any) -> Any:
        """What is left of a configuration file under further edits: of two ways to say how long, the edits' one.

        Where edits count in steps and leave the warm-up to a file that counts in epochs, its part of the whole stays.
        """
        left = beneath(file, edits, branches=tuple(BRANCHES))
        if not isinstance(left, dict) or not isinstance(edits, dict):
            return left
        above, train = edits.get("train"), left.get("train")
        above, train = (dict(x) if isinstance(x, dict) else {} for x in (above, train))
        whole, warmup = left.get("epochs"), left.get("warmup_epochs")
        gone = set()
        if "epochs" in edits:
            train.pop("steps", None)
        elif "steps" in above:
            gone.add("epochs")
            if whole and warmup and "warmup" not in above and isinstance(above["steps"], int):
                gone.add("warmup_epochs")
                train["warmup"] = round(above["steps"] * warmup / whole)
        if "warmup_epochs" in edits:
            train.pop("warmup", None)
        elif "warmup" in above:
            gone.add("warmup_epochs")
        left = {name: x for name, x in left.items() if name not in gone}
        return {**left, "train": train} if train or "train" in left else left


def inner_loops(model: ImagesModelConfig) -> dict[str, InnerLoop]:
    """The inner loops of the heads and of the convolution that a model's configuration describes, under "heads" and "conv".

    Raises:
        ValueError, TypeError: another key or an unknown field (the message gives the nearest known one), or a value that
            does not fit.
    """
    for key in model.inner:
        check_choice("model.inner's keys", key, tuple(BRANCHES))
    return {key: edited(start, model.inner.get(key, {}), FITS[key]) for key, start in BRANCHES.items()}


def model_fields(model: ImagesModelConfig) -> dict[str, Any]:
    """The fields of `kvbind.models.vittt.VitttConfig` that `model.size` and `model.fields` give.

    Raises:
        ValueError: an unknown size or field, or one that the size has not.
    """
    from kvbind.models.vittt import SIZES

    if model.size not in SIZES:
        raise ValueError(f"model.size must be one of {', '.join(SIZES)}; got {model.size!r}{nearest(model.size, SIZES)}")
    for name in model.fields:
        check_choice("model.fields' keys", name, MODEL_FIELDS)
    if "patch_size" in model.fields and "patch_size" not in SIZES[model.size]:
        raise ValueError(
            f"model.fields must not hold 'patch_size' with model.size={model.size!r}, whose patches are of 4 x 4 pixels"
        )
    stages = {"dim": "embed_dim", "depths": "depth"}
    size = {stages.get(name, name): list(x) if isinstance(x, tuple) else x for name, x in SIZES[model.size].items()}
    return size | model.fields


def resolve(config: ImagesConfig) -> ImagesConfig:
    """`config` with every field of its inner loops and of its model spelled out, and its epochs as steps.

    What `data` leaves to be chosen is, by looking at the training images; `model.fields` with `patch_size: 0` gets one that
    suits their size. Images are counted where `epochs` says how long training is and `data.images` does not say how many
    there are.
    """
    data, opened = config.data, None
    if data.looks:
        opened = data.open()
        data = looked_at(data, opened)
        config = replace(config, data=data)
    if config.model.fields.get("patch_size") == 0:
        fields = {**config.model.fields, "patch_size": suited_patch(data.size)}
        config = replace(config, model=replace(config.model, fields=fields))
    model = replace(
        config.model,
        inner={key: inner.to_dict() for key, inner in inner_loops(config.model).items()},
        fields=model_fields(config.model),
    )
    train = config.train
    if config.epochs or config.warmup_epochs:
        images = data.images or len((opened or data.open()).train.labels)
        per_epoch = Order(images, config.data.batch, config.seed).per_epoch / train.accumulate
        if config.epochs:
            train = replace(train, steps=max(round(config.epochs * per_epoch), 1))
        if config.warmup_epochs:
            train = replace(train, warmup=round(config.warmup_epochs * per_epoch))
    return replace(config, epochs=0.0, warmup_epochs=0.0, model=model, train=train, start=config.start.resolved())


def looked_at(data: ImagesDataConfig, opened: Splits) -> ImagesDataConfig:
    """`data` with what it leaves open chosen by looking at the training images."""
    seen = look(opened.train, data.size)
    channels = data.channels or seen.channels
    return replace(
        data,
        size=seen.size,
        channels=channels,
        mean=list(data.mean) or seen.mean(channels),
        std=list(data.std) or seen.std(channels),
        batch=data.batch or min(64, len(opened.train.labels)),
    )


def as_before(config: ImagesConfig, before: ImagesConfig) -> ImagesConfig:
    """`config` with what its data leave to be chosen as an earlier run on the same source has it, not by looking anew.

    So a run goes on as it began though images came or went, which is noticed as a change of the data.
    """
    data, old = config.data, before.data
    if old.source != data.source or data.channels not in (0, old.channels) or data.size not in (0, old.size):
        return config
    chosen = {name: getattr(data, name) or getattr(old, name) for name in ("size", "channels", "mean", "std", "batch")}
    return replace(config, data=replace(data, **chosen))


def suited_preset(edits: Sequence[str]) -> str | None:
    """The preset that suits the images which edits of a configuration name; None where they name none, or the digits."""
    where = OmegaConf.select(parse_overrides(edits), "data.source")
    if where is None or where == DIGITS:
        return None
    return "fashion" if holds_idx(Path(str(where)).expanduser()) else "photos"
