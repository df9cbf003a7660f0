"""The image task: a ViTTT classifier, DeiT's augmentation, top-1 accuracy on held-out images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from kvbind.files import inside, read_fields
from kvbind.inner import InnerLoop
from kvbind.inner.systems import vittt
from kvbind.inner.value import LATER, check_choice, nearest
from kvbind.layers.vittt import check_fits_conv, check_fits_heads
from kvbind.models.saving import without_bars
from kvbind.tasks import preset_files
from kvbind.tasks.contents import Contents
from kvbind.tasks.files import EXPANDED_GIB
from kvbind.tasks.images.augment import Augment, AugmentConfig, ReadEvaluation, ReadTraining, check_fits_memory, normalized
from kvbind.tasks.images.loading import Batch, Order, Reads, evaluation_batches, training_batches
from kvbind.tasks.images.look import look, suited_patch
from kvbind.tasks.images.sources import DIGITS, Images, InMemory, Readable, Source, Splits, holds_idx
from kvbind.tasks.inner_loops import SOFTMAX, beneath, edited, more_hidden, table_rows
from kvbind.tasks.start import Start, StartConfig, divergence
from kvbind.train.config import TrainConfig, check_seed, parse_overrides
from kvbind.train.ranks import WHOLE, Share

if TYPE_CHECKING:
    from kvbind.models.vittt import VitttForImageClassification

log = logging.getLogger("kvbind.tasks")

SMALL_SIZE, SHRUNK = 32, 4
"""Images of at most this side in pixels, and this many times smaller than they were, are thumbnails, which is said."""

TOP = 5
"""Of so many of the likeliest classes, one may be an image's for it to count as top-5."""

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
class ModelConfig:
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
class DataConfig:
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
        source = Source(
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
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
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


def inner_loops(model: ModelConfig) -> dict[str, InnerLoop]:
    """The inner loops of the heads and of the convolution that a model's configuration describes, under "heads" and "conv".

    Raises:
        ValueError, TypeError: another key or an unknown field (the message gives the nearest known one), or a value that
            does not fit.
    """
    for key in model.inner:
        check_choice("model.inner's keys", key, tuple(BRANCHES))
    return {key: edited(start, model.inner.get(key, {}), FITS[key]) for key, start in BRANCHES.items()}


def describe(model: VitttForImageClassification, folder: Path) -> ImagesConfig:
    """The configuration of a run whose model is a saved one; its data are to be named.

    Args:
        model: as its folder holds it.
        folder: the model's. Where a processor is beside it, images are given to the model as that does.

    Raises:
        ValueError: a model of images that are not square.
    """
    config = model.config
    if not isinstance(config.img_size, int):
        raise ValueError(f"the model must be of square images; that in {str(folder)!r} has img_size={config.img_size}")
    size = "h_vittt_tiny" if config.hierarchical else "vittt_tiny"
    names = [name for name in MODEL_FIELDS if not (name == "patch_size" and config.hierarchical)]
    held = {name: getattr(config, name) for name in names}
    data: dict[str, Any] = {}
    if (folder / PROCESSOR).is_file():
        seen = read_fields(inside(folder, PROCESSOR))
        data = {name: seen[key] for name, key in {"mean": "image_mean", "std": "image_std", "kept": "crop_pct"}.items()}
    elif config.in_chans == 1:
        data = {"mean": [], "std": []}
    return ImagesConfig(
        model=ModelConfig(
            size=size,
            inner={"heads": config.inner.to_dict(), "conv": config.inner_conv.to_dict()},
            fields={name: list(x) if isinstance(x, tuple) else x for name, x in held.items()},
        ),
        data=DataConfig(size=config.img_size, channels=config.in_chans, **data),
    )


def rows(config: ImagesConfig) -> dict[str, dict[str, Any]]:
    """The rows of the paper's tables 1 and 2 that apply to ViTTT, each as a value of `config.model.inner`.

    Rungs change the heads alone: the convolution is one linear layer as it stands, and the published ablations clip it
    throughout. Rungs 2, 4 and 5 do not apply: there are no weight normalization, learned rates or momentum to remove.
    Ascent is the heads' alone, as published; the key takes the query's place in both branches.

    Args:
        config: whose own inner loops are "rung0".
    """
    loops = inner_loops(config.model)
    heads, conv = table_rows(loops["heads"], without=("rung2", "rung4", "rung5")), loops["conv"]
    conv_of = dict.fromkeys(heads, conv) | {"key_for_query": conv.replace(query="key")}
    return {name: {"heads": inner, "conv": conv_of[name].to_dict()} for name, inner in heads.items()}


def baselines(config: ImagesConfig) -> dict[str, dict[str, Any]]:
    """Edits of `config.model.fields` that make models without fast weights, by row: "softmax", a plain vision transformer.

    Width, depth and heads are the full system's; what that has in parameters of its fast weights and convolutions goes into
    wider MLPs. Hierarchical models have none.
    """
    from kvbind.models.vittt import VitttConfig
    from kvbind.models.vittt.blocks import VitttBlock

    fields, loops = model_fields(config.model), inner_loops(config.model)
    own = VitttConfig(**fields, inner=loops["heads"], inner_conv=loops["conv"])
    if own.hierarchical:
        return {}
    dim: int = own.embed_dim  # type: ignore[assignment]
    heads: int = own.num_heads  # type: ignore[assignment]

    def block(fast_weights: bool) -> VitttBlock:
        return VitttBlock(
            dim, heads, own.inner, own.inner_conv, mlp_ratio=own.mlp_ratio, qkv_bias=own.qkv_bias, drop_rate=0.0,
            drop_path=0.0, norm_eps=1e-6, mlp_convolution=False, fast_weights=fast_weights,
        )  # fmt: skip

    hidden = int(dim * own.mlp_ratio) + more_hidden(block, True, False, 2 * dim + 1)
    return {SOFTMAX: {"fast_weights": False, "mlp_ratio": hidden / dim}}


def model_fields(model: ModelConfig) -> dict[str, Any]:
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


def looked_at(data: DataConfig, opened: Splits) -> DataConfig:
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


def build_model(config: ImagesConfig, names: Sequence[str]) -> VitttForImageClassification:
    """A model with fresh weights, drawn from the run's seed.

    Args:
        config: the run, as `resolve` gives it.
        names: of the classes.
    """
    from kvbind.models.vittt import VitttConfig, VitttForImageClassification

    model, data, loops = config.model, config.data, inner_loops(config.model)
    described = VitttConfig(
        **model_fields(model),
        img_size=data.size,
        in_chans=data.channels,
        inner=loops["heads"],
        inner_conv=loops["conv"],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(config.seed)
    built = VitttForImageClassification(described)
    if model.compile:
        built.compile()
    return built


class ImagesTask:
    """Data, model, loss and metrics of an image run; what `kvbind.train.train` asks of a task.

    Opening it opens both splits, so that a source that does not exist is known at once.

    Args:
        config: the run, as `resolve` gives it.
        training: whether training images will be read; False to evaluate alone.

    Raises:
        ValueError: a configuration that does not fit the images, or that still counts in epochs.
        ImportError: a library that is asked for and not installed.
    """

    unit = "images"

    def __init__(self, config: ImagesConfig, training: bool = True) -> None:
        data, self.config, self.batch = config.data, config, config.data.batch
        if config.epochs or config.warmup_epochs:
            raise ValueError(
                "config must count in steps: kvbind.tasks.images.resolve(config) writes out what its epochs come to"
            )
        if data.looks:
            raise ValueError(
                "config.data must say size, channels, mean, std and batch: kvbind.tasks.images.resolve(config) looks at the "
                "images for them"
            )
        inner_loops(config.model)  # inner loops that are none are better known before any image is read
        self.start = Start.of(config.start, training)
        splits = data.open()
        self.names, self._contents = splits.names, splits.contents
        counted = len(splits.train.labels)
        if data.images not in (0, counted):
            raise ValueError(f"data.images must be 0 or the number of training images, {counted}; got {data.images}")
        self.splits = {"train": splits.train, "held_out": splits.held_out} if training else {"held_out": splits.held_out}
        self.sources = {split: self._source(split, images) for split, images in self.splits.items()}
        self.augment = Augment(config.augment, data.mean, data.std, len(self.names))
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def _source(self, split: str, images: Images) -> InMemory | Reads:
        """What batches of a split are made of: images that have the task's size, or that are given it as they are read."""
        data, augment = self.config.data, self.config.augment
        if not isinstance(images, InMemory):
            if split == "train":
                self._tell_shrunk(images)
            prepare = ReadTraining(augment, data.size) if split == "train" else ReadEvaluation(data.size, data.kept)
            return Reads(images, prepare, data.channels, self.config.seed)
        shape = tuple(images.images.shape[1:])
        if shape != (data.channels, data.size, data.size):
            raise ValueError(
                f"data.channels and data.size must be those of the images of {data.source}, which are {list(shape)}; got "
                f"{data.channels} and {data.size}"
            )
        check_fits_memory(augment)
        return images

    def _tell_shrunk(self, images: Readable) -> None:
        """Warn where photos become thumbnails."""
        data = self.config.data
        if data.size <= SMALL_SIZE and min(width_height := images.read(0).size) >= SHRUNK * data.size:
            log.warning(
                "the first image of %s, %d x %d, is shrunk to %d x %d %s; --preset photos, or data.size, would keep more",
                data.source, *width_height, data.size, data.size, "grey" if data.channels == 1 else "colour",
            )  # fmt: skip

    def build(self) -> VitttForImageClassification:
        """A model with fresh weights, drawn from the run's seed, or with those of the model that the run starts from."""
        model = build_model(self.config, self.names)
        return model if self.start is None else self.start.into(model)

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Endless training batches, each with the position behind it."""
        if "train" not in self.sources:
            raise ValueError("this task was opened with training=False")
        data, images = self.config.data, self.sources["train"]
        order = Order(len(self.splits["train"].labels), data.batch, self.config.seed)
        return training_batches(images, order, data.workers, position, share, self.augment.mixes)

    def size(self, batch: Batch) -> int:
        """Images in a batch."""
        lead = batch["among"].lead if "among" in batch else 0
        return len(batch["rows"] if "rows" in batch else batch["labels"]) - lead

    def weight(self, batch: Batch) -> float:
        """All batches count alike: they are of one size."""
        return 1.0

    @staticmethod
    def blocks(model: VitttForImageClassification) -> Iterable[nn.Module]:
        """The model's layers."""
        from kvbind.models.vittt.blocks import VitttBlock

        return [module for module in model.modules() if isinstance(module, VitttBlock)]

    def pixels(self, batch: Batch, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The images of a batch, uint8 `[B, C, H, W]`, and their classes `[B]`, on `device`.

        Those that are held in memory move there whole when they are first asked for.
        """
        if "rows" not in batch:
            return batch["images"].to(device, non_blocking=True), batch["labels"].to(device, non_blocking=True)
        if (split, device) not in self._resident:
            held = self.splits[split]
            self._resident[split, device] = held.images.to(device), held.classes.to(device)  # type: ignore[union-attr]
        images, classes = self._resident[split, device]
        chosen = batch["rows"].to(device, non_blocking=True)
        return images[chosen], classes[chosen]

    def flops(self, model: VitttForImageClassification) -> float:
        """Model FLOPs of training for each unit."""
        from kvbind.tasks.flops import flops_per_unit

        return flops_per_unit(model.config, self.config.data)

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        """A batch with all that is random about it drawn: `x` and `targets`, as `Augment` gives them, on `device`."""
        images, labels = self.pixels(batch, "train", device)
        x, targets = self.augment(images, labels, batch["seed"], batch.get("among"))
        return {"x": x, "targets": targets}

    def loss(self, model: VitttForImageClassification, batch: Batch) -> Tensor:
        """Mean cross-entropy against the augmented targets, in nats; of a batch as it comes, or prepared.

        Where the targets are the outputs of the model that the run starts from, the divergence from those.
        """
        ready = batch if "targets" in batch else self.prepare(batch, model.device)
        if self.start is not None and self.start.distils:
            return divergence(model(ready["x"]).logits, self.start.outputs(ready["x"], device=ready["x"].device).logits)
        loss: Tensor = model(ready["x"], labels=ready["targets"]).loss
        return loss

    def evaluate(self, model: VitttForImageClassification, share: Share = WHOLE) -> dict[str, Any]:
        """Top-1 and, of more than five classes, top-5 accuracy in percent, cross-entropy in nats, and the number of images.

        All of them are held out.
        """
        data, device = self.config.data, model.device
        most = min(TOP, len(self.names))
        total = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        size = data.evaluation_batch or data.batch
        for batch, counts in evaluation_batches(self.sources["held_out"], size, data.workers, share):
            images, labels = self.pixels(batch, "held_out", device)
            logits = model(normalized(images, data.mean, data.std)).logits.float()
            hits = logits.topk(most).indices == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="sum")
            if counts:
                total[:3] += torch.stack([hits[:, 0].sum(), hits.sum(), losses]).to(total)
                total[3] += len(labels)
        *sums, count = share.sum(total).tolist()
        top1, top5, loss = (x / count for x in sums)
        few = len(self.names) <= TOP  # the five likeliest are all
        return {"top1": 100 * top1, **({} if few else {"top5": 100 * top5}), "loss": loss, "images": round(count)}

    def held_out_image(self, number: int) -> tuple[Tensor, int]:
        """A held-out image as the model sees it but for normalization, uint8 `[C, H, W]`, and its class.

        Raises:
            ValueError: a number that is none of theirs.
        """
        images = self.sources["held_out"]
        count = len(self.splits["held_out"].labels)
        if not 0 <= number < count:
            raise ValueError(f"image must be from 0 to {count - 1}, the held-out images; got {number}")
        if isinstance(images, InMemory):
            return images.images[number], int(images.classes[number])
        return images[0, number]

    def save(self, model: VitttForImageClassification, folder: Path) -> None:
        """Write a model in transformers' format, with the processor that makes its input of pictures."""
        from kvbind.models.vittt import VitttImageProcessor

        data = self.config.data
        with without_bars():
            model.save_pretrained(folder)
        VitttImageProcessor(data.size, data.channels, data.mean, data.std, data.kept).save_pretrained(folder)

    def contents(self) -> Contents:
        """What the images are read from, for noticing that it has changed."""
        return self._contents

    def fingerprint(self) -> dict[str, str]:
        """What images these are, for telling runs apart."""
        return {split: images.fingerprint() for split, images in self.splits.items()}


Config = ImagesConfig
Task = ImagesTask
