"""Configurations of view synthesis runs: fields, presets, and the rows of the paper's tables as edits of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from kvbind.inner import InnerLoop
from kvbind.inner.value import LATER, check_choice, nearest
from kvbind.layers.lact_nvs import check_fits_views
from kvbind.models.lact_nvs import PRESETS as SIZES
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.models.lact_nvs.model import LactNvsBlock
from kvbind.tasks import preset_files
from kvbind.tasks.files import EXPANDED_GIB
from kvbind.tasks.inner_loops import SOFTMAX, beneath, edited, more_hidden, table_rows
from kvbind.tasks.start import StartConfig
from kvbind.train.config import TrainConfig, check_seed

PRESETS = preset_files("views")
"""The shipped configurations, by name."""

PROCEDURAL = "procedural"
NORMALIZATIONS = ("mean", "none")
LEAST_SIDE = 6
"""Of an image, in pixels: SSIM pads its window of 11 by reflection."""


@dataclass
class ViewsModelConfig:
    """LaCT view synthesis.

    Attributes:
        size: where it starts: a preset of `kvbind.models.lact_nvs`, such as "tiny", "small" or "114m".
        inner: edits of that size's inner loop, field by field; "system" names another to start from.
        fields: edits of any other field of `kvbind.models.lact_nvs.LactNvsConfig`.
    """

    size: str = "tiny"
    inner: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProceduralConfig:
    """The scenes of the source "procedural", which are made by chance and rendered once, where the model trains.

    Attributes:
        scenes: how many to train on.
        views: pictures of each.
        sector: degrees of azimuth that a scene's cameras are spread over; 360 for all around.
        samples: rays along each side of a pixel.
    """

    scenes: int = 1024
    views: int = 16
    sector: float = 360.0
    samples: int = 2

    def __post_init__(self) -> None:
        for key, least in {"scenes": 1, "views": 2, "samples": 1}.items():
            if getattr(self, key) < least:
                raise ValueError(f"data.procedural.{key} must be at least {least}; got {getattr(self, key)}")
        if not 0 < self.sector <= 360:
            raise ValueError(f"data.procedural.sector must be above 0 and at most 360; got {self.sector}")


@dataclass
class ViewsDataConfig:
    """Posed images, and how views are drawn from them.

    Attributes:
        source: "procedural"; a folder of RealEstate10K in chunks of tensors, or its parent with `train/` and `test/`; a
            folder of scenes of posed images, each a JSON file, or one such file, or a JSON file that lists them.
        held_out: the fraction of scenes kept for evaluation, chosen by a stable hash, where the source has no split.
        held_out_source: other scenes to evaluate on, all of them; training then takes all of `source`.
        procedural: the scenes of the source "procedural".
        size: height and width of the images in pixels; others are resized to cover it and cropped around their middle.
        inputs: views of a scene that the model reads.
        targets: further views of it that the model renders.
        span: draw them from that many consecutive views of the scene; 0 from all of its views.
        normalize: "mean" for the frame of the input views' mean camera, or "none" for the source's own coordinates.
        batch: scenes in a batch.
        window: of chunked sources, how many chunks are shuffled together.
        skip_short: leave out scenes with fewer views than asked for; else they are an error.
        expanded_gib: the most GiB that an image file may expand to.
        workers: processes that read files; 0 for none besides the training one. Nothing but speed depends on it.
        evaluation_scenes: held-out scenes, spread over all of them.
        evaluation_batch: scenes in an evaluation batch; 0 for as many as in training.
    """

    source: str = PROCEDURAL
    held_out: float = 0.1
    held_out_source: str | None = None
    procedural: ProceduralConfig = field(default_factory=ProceduralConfig)
    size: tuple[int, int] = (64, 64)
    inputs: int = 4
    targets: int = 4
    span: int = 0
    normalize: str = "mean"
    batch: int = 8
    window: int = 8
    skip_short: bool = False
    expanded_gib: float = EXPANDED_GIB
    workers: int = 0
    evaluation_scenes: int = 64
    evaluation_batch: int = 0

    INDIFFERENT: ClassVar[tuple[str, ...]] = ("workers", "expanded_gib")

    def __post_init__(self) -> None:
        check_choice("data.normalize", self.normalize, NORMALIZATIONS)
        for key, least in {"inputs": 1, "targets": 1, "span": 0, "batch": 1, "window": 1, "workers": 0,
                           "evaluation_scenes": 1, "evaluation_batch": 0}.items():  # fmt: skip
            if getattr(self, key) < least:
                raise ValueError(f"data.{key} must be at least {least}; got {getattr(self, key)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must lie between 0 and 1; got {self.held_out}")
        if not self.expanded_gib > 0:
            raise ValueError(f"data.expanded_gib must be above 0; got {self.expanded_gib}")
        if min(self.size) < LEAST_SIDE:
            raise ValueError(f"data.size must be a height and a width of at least {LEAST_SIDE}; got {list(self.size)}")
        if self.span and self.span < self.views:
            raise ValueError(
                f"data.span must be 0 or at least data.inputs + data.targets = {self.views}, as no view is drawn twice; got "
                f"{self.span}"
            )
        if self.source == PROCEDURAL and self.procedural.views < self.views:
            raise ValueError(
                f"data.procedural.views must be at least data.inputs + data.targets = {self.views}; got "
                f"{self.procedural.views}"
            )

    @property
    def views(self) -> int:
        """Views drawn from a scene, inputs and targets."""
        return self.inputs + self.targets


@dataclass
class LossConfig:
    """What is minimized: the mean squared error, which is all that the paper's runs use, and more where asked for.

    Attributes:
        perceptual: weight of LPIPS (VGG) beside it; needs the package `lpips`.
        perceptual_from: the step from which on it counts.
    """

    perceptual: float = 0.0
    perceptual_from: int = 0

    def __post_init__(self) -> None:
        for key in ("perceptual", "perceptual_from"):
            if getattr(self, key) < 0:
                raise ValueError(f"loss.{key} must be at least 0; got {getattr(self, key)}")


@dataclass
class ViewsConfig:
    """A whole run: its seed (of weights, data order and choice of views), model, data, loss, training, and start."""

    seed: int = 0
    model: ViewsModelConfig = field(default_factory=ViewsModelConfig)
    data: ViewsDataConfig = field(default_factory=ViewsDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    start: StartConfig = field(default_factory=StartConfig, metadata=LATER)

    def __post_init__(self) -> None:
        check_seed(self.seed)

    beneath = staticmethod(beneath)


def model_config(model: ViewsModelConfig) -> LactNvsConfig:
    """The model that a configuration describes.

    Raises:
        ValueError, TypeError: an unknown size or field (the message gives the nearest known one), or a value that does not
            fit.
    """
    if model.size not in SIZES:
        raise ValueError(f"model.size must be one of {', '.join(SIZES)}; got {model.size!r}{nearest(model.size, SIZES)}")
    if "inner" in model.fields:
        raise ValueError("model.fields must not hold 'inner', which model.inner gives")
    size = SIZES[model.size].replace(**model.fields)
    return size.replace(inner=edited(size.inner, model.inner, check_fits_views))


def inner_loop(model: ViewsModelConfig) -> InnerLoop:
    """The inner loop that a model's configuration describes.

    Raises:
        ValueError, TypeError: as `model_config`.
    """
    return model_config(model).inner


def resolve(config: ViewsConfig) -> ViewsConfig:
    """`config` with every field of its inner loop, and every field that its size gives, spelled out."""
    fields = model_config(config.model).to_dict()
    inner = fields.pop("inner")
    if fields["fast_weights"]:  # as names of runs have it from before there was another
        del fields["fast_weights"]
    return replace(config, model=replace(config.model, inner=inner, fields=fields), start=config.start.resolved())


def describe(model: LactNvs, folder: Path) -> ViewsConfig:
    """The configuration of a run whose model is a saved one; its data are to be named.

    Args:
        model: as its folder holds it.
        folder: the model's.
    """
    fields = model.config.to_dict()
    return ViewsConfig(
        model=ViewsModelConfig(inner=model.inner.to_dict(), fields={k: x for k, x in fields.items() if k != "inner"})
    )


def baselines(config: ViewsConfig) -> dict[str, dict[str, Any]]:
    """Edits of `config.model.fields` that make models without fast weights, by row: "softmax", attention across all views.

    Widths and depth are the full system's; what that has in parameters of its fast weights goes into wider MLPs.
    """
    own = model_config(config.model)
    wider = more_hidden(LactNvsBlock, own, own.replace(fast_weights=False), 2 * own.dim)
    return {SOFTMAX: {"fast_weights": False, "mlp_ratio": (int(own.dim * own.mlp_ratio) + wider) / own.dim}}


def rows(config: ViewsConfig) -> dict[str, Any]:
    """What `config.model.inner` is in each row of the paper's tables 1 and 2 that applies to view synthesis.

    Rungs 4 and 5 do not: the paper has them in brackets, as there is no momentum to remove, and the constant rate comes
    with rung 6.

    Args:
        config: the full system's; its other edits of the inner loop hold for every row.

    Returns:
        By name: "rung0", "rung1", "rung2", "rung3" and "rung6" of the ladder; "ascent" and "key_for_query", each one change
        of the full system.
    """
    return table_rows(inner_loop(config.model), without=("rung4", "rung5"))
