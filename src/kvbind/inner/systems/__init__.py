"""Named systems: published inner loops, each a value with its sources, a file for each family; and the paper's ladder."""

# ruff: noqa: I001, imported in the order in which systems are listed
from kvbind.inner.systems.lact import lact_llm, lact_nvs
from kvbind.inner.systems.vittt import vittt
from kvbind.inner.systems.in_place import in_place_ttt
from kvbind.inner.systems.linear import linear_attention
from kvbind.inner.systems.delta import delta_net, gated_delta_net
from kvbind.inner.systems.learners import ttt_linear, ttt_mlp
from kvbind.inner.systems.memory import atlas, titans
from kvbind.inner.systems.ladder import RUNGS, ladder
from kvbind.inner.systems.registry import SOURCES, SYSTEMS, Source, cite, named

__all__ = [
    "RUNGS",
    "SOURCES",
    "SYSTEMS",
    "Source",
    "atlas",
    "cite",
    "delta_net",
    "gated_delta_net",
    "in_place_ttt",
    "lact_llm",
    "lact_nvs",
    "ladder",
    "linear_attention",
    "named",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "vittt",
]
