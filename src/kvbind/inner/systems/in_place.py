"""A language model's own MLPs as fast weights."""

from __future__ import annotations

from kvbind.inner.networks import SwiGLU
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems.registry import Source, system

IN_PLACE = Source("2604.06169", "In-Place Test-Time Training", "Feng, Guhao and others")


@system(IN_PLACE)
def in_place_ttt(chunk: int = 4096) -> InnerLoop:
    """In-Place TTT (arXiv 2604.06169): the last layer of a language model's own MLP, written once per chunk.

    Queries and keys are the MLP's input; values are its convolution over the chunk, projected. The rate is one constant, 3
    in the published configurations. `kvbind.models.InPlaceForCausalLM` is the model.
    """
    return InnerLoop(network=SwiGLU(), update="last", chunk=chunk, visibility="past", token_lr=False)
