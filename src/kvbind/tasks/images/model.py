"""The model of the image task: built from a configuration, and the configuration of a saved one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvbind.files import inside, read_fields
from kvbind.tasks.images.config import (
    MODEL_FIELDS,
    PROCESSOR,
    ImagesConfig,
    ImagesDataConfig,
    ImagesModelConfig,
    inner_loops,
    model_fields,
)

if TYPE_CHECKING:
    from kvbind.models.vittt import VitttForImageClassification


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
        model=ImagesModelConfig(
            size=size,
            inner={"heads": config.inner.to_dict(), "conv": config.inner_conv.to_dict()},
            fields={name: list(x) if isinstance(x, tuple) else x for name, x in held.items()},
        ),
        data=ImagesDataConfig(size=config.img_size, channels=config.in_chans, **data),
    )


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
