"""Test-time-training layers with key-value binding, run as the linear attention they are (arXiv 2602.21204).

Names are imported when first asked for, so that the command `kvbind` answers without waiting for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbind.forms.api import inner_loss, ttt
    from kvbind.forms.attention.linear_attention import LinearAttention
    from kvbind.forms.attention.linearize import linearize
    from kvbind.forms.explained.analysis import Explanation, NoParallelFormError, explain
    from kvbind.forms.state import State
    from kvbind.inner import (
        GLU,
        MLP,
        Anchor,
        DepthwiseConv,
        InnerLoop,
        LayerNormHead,
        Linear,
        Network,
        NewtonSchulz,
        Retention,
        SwiGLU,
        Window,
        cite,
        systems,
    )
    from kvbind.models.lact.sharding import shard_batch
    from kvbind.sequence import SequenceShard, count_bytes, sequence_parallel

    __version__: str

__all__ = [
    "GLU",
    "MLP",
    "Anchor",
    "DepthwiseConv",
    "Explanation",
    "InnerLoop",
    "LayerNormHead",
    "Linear",
    "LinearAttention",
    "Network",
    "NewtonSchulz",
    "NoParallelFormError",
    "Retention",
    "SequenceShard",
    "State",
    "SwiGLU",
    "Window",
    "cite",
    "count_bytes",
    "explain",
    "inner_loss",
    "linearize",
    "sequence_parallel",
    "shard_batch",
    "systems",
    "ttt",
]

_HOMES = {
    "kvbind.forms.explained.analysis": ("Explanation", "NoParallelFormError", "explain"),
    "kvbind.forms.api": ("inner_loss", "ttt"),
    "kvbind.forms.attention.linearize": ("LinearAttention", "linearize"),
    "kvbind.forms.state": ("State",),
    "kvbind.models.lact.sharding": ("shard_batch",),
    "kvbind.sequence": ("SequenceShard", "count_bytes", "sequence_parallel"),
}
_PACKAGES = ("bench", "experiments", "forms", "inner", "layers", "models", "sequence", "tasks", "train")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"kvbind.{name}")
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "kvbind.inner")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvbind")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, "__version__"})
