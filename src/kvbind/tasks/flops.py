"""Model FLOPs per unit of a task's data, from which training reports its utilization (MFU)."""

from __future__ import annotations

from typing import Any

from kvbind.inner.value import check_positive_int
from kvbind.models.flops import in_place_flops, lact_flops, lact_nvs_flops, vittt_flops
from kvbind.models.in_place.config import InPlaceConfig
from kvbind.models.lact.config import LactConfig
from kvbind.models.lact_nvs.config import LactNvsConfig
from kvbind.models.vittt.config import VitttConfig


def flops_per_unit(model: Any, data: Any) -> float:
    """Model FLOPs of training for each token, image or view that a task counts.

    Args:
        model: the configuration of the model (its attribute `config`).
        data: the task's `data` configuration, for the sizes: `length` of a sample of text, taken for one document; `size`
            of an image; `size`, `inputs` and `targets` of a scene.

    Raises:
        TypeError: a configuration of no known model.
        ValueError: sizes that do not fit the model.
    """
    if isinstance(model, LactConfig):
        return sum(lact_flops(model, data.length).values()) / data.length
    if isinstance(model, InPlaceConfig):
        return sum(in_place_flops(model, data.length).values()) / data.length
    if isinstance(model, VitttConfig):
        check_positive_int("data.size", data.size)
        return sum(vittt_flops(model, (data.size, data.size)).values())
    if isinstance(model, LactNvsConfig):
        flops = lact_nvs_flops(model, (data.size[0], data.size[1]), data.inputs, data.targets)
        return sum(flops.values()) / (data.inputs + data.targets)
    raise TypeError(f"model must be a LactConfig, InPlaceConfig, VitttConfig or LactNvsConfig; got {type(model).__name__}")
