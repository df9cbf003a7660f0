"""What a user writes, of every public name, under mypy's strict flags; tests run it."""

from typing import assert_type

import torch
from torch import Tensor, nn

import kvbind
from kvbind import (
    GLU,
    MLP,
    Anchor,
    DepthwiseConv,
    Explanation,
    InnerLoop,
    LayerNormHead,
    Linear,
    LinearAttention,
    Network,
    NewtonSchulz,
    NoParallelFormError,
    Retention,
    SequenceShard,
    State,
    SwiGLU,
    Window,
)
from kvbind.layers import (
    FastWeightLayer,
    FastWeightState,
    InnerCall,
    InPlaceMLP,
    LactLayer,
    LactNvsLayer,
    LactState,
    Layout,
    RMSNorm,
    VitttLayer,
)


def inner_loops() -> list[InnerLoop]:
    networks: list[Network] = [Linear(), SwiGLU(), GLU(), MLP(head=LayerNormHead()), DepthwiseConv((2, 4))]
    language = kvbind.systems.lact_llm(chunk=4)
    assert_type(language, InnerLoop)
    assert_type(kvbind.cite(language), str)
    steps = NewtonSchulz(dtype=torch.float32)
    later = InnerLoop(Linear(), chunk=4, retention=Retention(order="before"), window=Window(2), anchor=Anchor(strength=0.1))
    print(later)
    return [language.replace(network=network, orthogonalize=steps, normalize=False) for network in networks[:2]]


def calls(spec: InnerLoop) -> tuple[Tensor, State]:
    q = torch.randn(2, 8, 2, 4)
    gate = torch.rand(2, 8, 2)
    weights = spec.network.initial(heads=2, key_width=4, value_width=4)
    assert_type(weights, dict[str, Tensor])
    y, state = kvbind.ttt(spec, weights, q, q, q, lr=gate, momentum=gate)
    attention = kvbind.linearize(spec, weights, q, q, q, lr=gate, momentum=gate)
    assert_type(attention, LinearAttention)
    assert_type(attention.matrix(), Tensor)
    assert_type(kvbind.inner_loss(spec, weights, q, q, lr=gate, momentum=gate), Tensor)
    assert_type(kvbind.explain(spec), Explanation)
    try:
        kvbind.ttt(spec, weights, q, q, q, lr=gate, momentum=gate, form="parallel")
    except NoParallelFormError as error:
        print(error)
    return y, state[0]


def rows(tokens: int) -> dict[str, Tensor]:
    ids = torch.arange(tokens)[None]
    shard = SequenceShard.even(tokens)
    with kvbind.sequence_parallel(shard), kvbind.count_bytes() as traffic:
        batch = kvbind.shard_batch({"input_ids": ids, "labels": ids}, shard)
    print(traffic)
    return batch


class Mixed(nn.Module):
    """One of each layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.text = LactLayer(dim, 2, 2, kvbind.systems.lact_llm(chunk=4), window_size=4)
        self.linear = FastWeightLayer(dim, 2, kvbind.systems.gla())
        self.image = VitttLayer(dim, 2)
        self.views = LactNvsLayer(dim, dim // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, LactState | None, State]:
        text, kept = self.text(self.norm(x), Layout.rows(x.shape[1], x.device), return_state=True)
        call: InnerCall = self.text.call(x)
        assert_type(call.linearize(), LinearAttention)
        mixed: Tensor
        _held: FastWeightState | None
        mixed, _held = self.linear(x, return_state=True)
        image = self.image(x, (2, x.shape[1] // 2))
        views, state = self.views(x, slice(0, 4))
        return text + mixed + image + views, kept, state


def fast_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    layer = InPlaceMLP(mlp, 0, chunk=4, lr=0.3)
    assert_type(layer.inner_call(x), InnerCall)
    return layer.from_start(x)
