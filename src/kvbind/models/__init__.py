"""Models: the LaCT language model, LaCT view synthesis and ViTTT, and any decoder of transformers with In-Place TTT.

`LactConfig`, `LactModel`, `LactForCausalLM`, `InPlaceConfig` and `InPlaceForCausalLM` are imported when first asked for, as
they need transformers; that import also registers them with its `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvbind.models.presets import PRESETS

if TYPE_CHECKING:
    from kvbind.models.in_place import InPlaceCache, InPlaceConfig, InPlaceForCausalLM
    from kvbind.models.lact import LactCache, LactConfig, LactForCausalLM, LactModel

__all__ = [
    "PRESETS",
    "InPlaceCache",
    "InPlaceConfig",
    "InPlaceForCausalLM",
    "LactCache",
    "LactConfig",
    "LactForCausalLM",
    "LactModel",
]

_LAZY = {
    "in_place": ("InPlaceCache", "InPlaceConfig", "InPlaceForCausalLM"),
    "lact": ("LactCache", "LactConfig", "LactForCausalLM", "LactModel"),
}
_MODULES = ("lact_nvs", "vittt")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kvbind.models.{name}")
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"kvbind.models.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
