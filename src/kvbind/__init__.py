"""Test-time-training layers with key-value binding, run as the linear attention they are (arXiv 2602.21204)."""

from importlib.metadata import PackageNotFoundError, version

from kvbind.forms.analysis import Explanation, NoParallelFormError, explain
from kvbind.forms.api import inner_loss, ttt
from kvbind.forms.linearize import LinearAttention, linearize
from kvbind.forms.state import State
from kvbind.inner import GLU, MLP, DepthwiseConv, InnerLoop, Linear, Network, NewtonSchulz, SwiGLU, systems

try:
    __version__ = version("kvbind")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "GLU",
    "MLP",
    "DepthwiseConv",
    "Explanation",
    "InnerLoop",
    "Linear",
    "LinearAttention",
    "Network",
    "NewtonSchulz",
    "NoParallelFormError",
    "State",
    "SwiGLU",
    "explain",
    "inner_loss",
    "linearize",
    "systems",
    "ttt",
]
