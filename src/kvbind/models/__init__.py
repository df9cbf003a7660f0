"""Models of the paper: the LaCT language model, LaCT view synthesis and ViTTT.

`LactConfig`, `LactModel` and `LactForCausalLM` are imported when first asked for, as they need transformers; that import
also registers them with transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvbind.models.presets import PRESETS

if TYPE_CHECKING:
    from kvbind.models.lact import LactCache, LactConfig, LactForCausalLM, LactModel

__all__ = ["PRESETS", "LactCache", "LactConfig", "LactForCausalLM", "LactModel"]

_LAZY = ("LactCache", "LactConfig", "LactForCausalLM", "LactModel")
_MODULES = ("lact_nvs", "vittt")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"kvbind.models.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("kvbind.models.lact"), name)
