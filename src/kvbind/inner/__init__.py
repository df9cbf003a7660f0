"""What an inner loop is: the spec, fast networks, losses, update rule, named systems."""

from kvbind.inner import systems
from kvbind.inner.fields import Anchor, Retention, Window
from kvbind.inner.head import LayerNormHead
from kvbind.inner.network import Network
from kvbind.inner.networks import GLU, MLP, NETWORKS, DepthwiseConv, Linear, SwiGLU
from kvbind.inner.orthogonalize import LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS, NewtonSchulz
from kvbind.inner.spec import InnerLoop, Visibility
from kvbind.inner.systems import cite

__all__ = [
    "GLU",
    "LANGUAGE_COEFFICIENTS",
    "MLP",
    "NETWORKS",
    "VIEWS_COEFFICIENTS",
    "Anchor",
    "DepthwiseConv",
    "InnerLoop",
    "LayerNormHead",
    "Linear",
    "Network",
    "NewtonSchulz",
    "Retention",
    "SwiGLU",
    "Visibility",
    "Window",
    "cite",
    "systems",
]
