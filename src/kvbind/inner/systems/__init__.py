"""Named systems: published inner loops, each a value with its sources, a file for each family; and the paper's ladder."""

# ruff: noqa: I001, imported in the order in which systems are listed
from kvbind.inner.systems.lact import elastic_lact, in_place_ttt, lact_llm, lact_nvs, lact_video, tttlrm, zipmap
from kvbind.inner.systems.vittt import vittt, vittt_conv
from kvbind.inner.systems.recurrences import gla, linear_attention, mamba2, retnet, simple_gla
from kvbind.inner.systems.recurrences import comba, delta_net, delta_product, gated_delta_net, gdn2, kda, rwkv7
from kvbind.inner.systems.learners import ttt_linear, ttt_mlp
from kvbind.inner.systems.memory import atlas, titans
from kvbind.inner.systems.ladder import RUNGS, ladder
from kvbind.inner.systems.layers import PROJECTIONS
from kvbind.inner.systems.registry import SOURCES, SYSTEMS, Source, cite, family, named

__all__ = [
    "PROJECTIONS",
    "RUNGS",
    "SOURCES",
    "SYSTEMS",
    "Source",
    "atlas",
    "cite",
    "comba",
    "delta_net",
    "delta_product",
    "elastic_lact",
    "family",
    "gated_delta_net",
    "gdn2",
    "gla",
    "in_place_ttt",
    "kda",
    "lact_llm",
    "lact_nvs",
    "lact_video",
    "ladder",
    "linear_attention",
    "mamba2",
    "named",
    "retnet",
    "rwkv7",
    "simple_gla",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "tttlrm",
    "vittt",
    "vittt_conv",
    "zipmap",
]
