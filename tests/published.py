"""Inner loops of published systems with short spans, under the names by which `PROJECTIONS` has their layers."""

import torch

from kvbind import MLP, InnerLoop, LayerNormHead, Linear, NewtonSchulz, Retention, Window

SPAN = 4
"""Tokens between renewals of the weights that gradients are taken at, where a system has any."""

TOKENS = {"chunk": 1, "visibility": "token"}
DELTA = {"network": Linear(), "loss": "squared", **TOKENS}
GATED = InnerLoop(**DELTA, retention=Retention(order="before"))
SIMPLE = InnerLoop(Linear(), retention=True, **TOKENS)
TITANS = InnerLoop(MLP("silu"), loss="squared", momentum=True, retention=True, refresh=SPAN, **TOKENS)
TTT = InnerLoop(Linear(bias=True, head=LayerNormHead()), loss="squared", refresh=SPAN, read_rate=True, **TOKENS)

SYSTEMS = {
    "retnet": SIMPLE,
    "simple_gla": SIMPLE,
    "gla": SIMPLE.replace(retention=Retention("key")),
    "mamba2": SIMPLE,
    "delta_net": InnerLoop(**DELTA),
    "gated_delta_net": GATED,
    "delta_product": GATED.replace(writes=2),
    "kda": GATED.replace(retention=Retention("key", "before")),
    "gdn2": GATED.replace(retention=Retention("key", "before"), erase=True),
    "comba": InnerLoop(**DELTA, retention=True, erase=True),
    "rwkv7": InnerLoop(**DELTA, retention=Retention("key"), erase=True, writes=2, token_lr=False),
    "ttt_linear": TTT,
    "ttt_mlp": TTT.replace(network=MLP("gelu_tanh", bias=True, head=LayerNormHead())),
    "titans": TITANS,
    "atlas": TITANS.replace(orthogonalize=NewtonSchulz(dtype=torch.float64), step_rate=True, window=Window(2)),
}
