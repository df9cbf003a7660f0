"""Layers: `nn.Module`s that hold parameters and projections around one call of `kvbind.ttt`.

`LactLayer` mixes text causally, beside attention, `FastWeightLayer` by fast weights alone, `VitttLayer` the patches of an
image, `LactNvsLayer` the views of a scene; each takes the place of attention in a model of your own (docs/layers.md).
`InPlaceMLP` takes that of a gated MLP. Each keeps its inner loop as its attribute `inner`, which can be assigned; its
parameters stay.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbind.layers.fast_weights.layer import FastWeightLayer
    from kvbind.layers.fast_weights.state import FastWeightState
    from kvbind.layers.in_place.layer import InPlaceMLP
    from kvbind.layers.inner_call import InnerCall
    from kvbind.layers.lact.layer import LactLayer, LactState
    from kvbind.layers.lact_nvs import LactNvsLayer
    from kvbind.layers.layout import Layout
    from kvbind.layers.norm import RMSNorm
    from kvbind.layers.vittt import VitttLayer

__all__ = [
    "FastWeightLayer",
    "FastWeightState",
    "InPlaceMLP",
    "InnerCall",
    "LactLayer",
    "LactNvsLayer",
    "LactState",
    "Layout",
    "RMSNorm",
    "VitttLayer",
]

_HOMES = {
    "FastWeightLayer": "fast_weights.layer",
    "FastWeightState": "fast_weights.state",
    "InPlaceMLP": "in_place.layer",
    "InnerCall": "inner_call",
    "LactLayer": "lact.layer",
    "LactNvsLayer": "lact_nvs",
    "LactState": "lact.layer",
    "Layout": "layout",
    "RMSNorm": "norm",
    "VitttLayer": "vittt",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
