"""Gates of chunks, on kernels and in PyTorch's float32: exact from 1 down to 0, as are their gradients."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import kvbind
from strategies import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, CHUNKS = 64, 3
SIZES = {
    "1": [1.0] * CHUNKS,
    "small": [1e-6] * CHUNKS,
    "least": [1e-30] * CHUNKS,
    "mixed": [0.9, 1e-30, 1e-8],
    "shut": [1.0, 0.0, 0.0],
}
SPECS = {
    "chunked": kvbind.InnerLoop(kvbind.Linear(), momentum=True, retention=True, chunk=CHUNK),
    "recurrent": kvbind.InnerLoop(kvbind.SwiGLU(), momentum=True, retention=True, chunk=CHUNK, update="all"),
    "blockwise": kvbind.InnerLoop(kvbind.Linear(), momentum=True, retention=True, chunk=32, loss="squared"),
    "token by token": kvbind.InnerLoop(kvbind.Linear(), momentum=True, retention=True, chunk=1, visibility="token"),
}


def results(spec, gates, dtype, kernels, monkeypatch, form="auto"):
    monkeypatch.setenv("KVBIND_KERNELS", kernels)
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype).requires_grad_()

    tokens = CHUNK * CHUNKS
    q, k, v = (normal(1, tokens, 1, 16, scale=0.25) for _ in range(3))
    weights = {name: normal(1, 16, 16, scale=0.25) for name in spec.network.matrices}
    per_token = torch.tensor(gates).repeat_interleave(CHUNK)[None, :, None].to(DEVICE, dtype)
    momentum, retention = (per_token.clone().requires_grad_() for _ in range(2))
    y, state = kvbind.ttt(spec, weights, q, k, v, lr=0.1, momentum=momentum, retention=retention, form=form)
    named = {"q": q, "k": k, "v": v, "momentum": momentum, "retention": retention} | weights
    grads = torch.autograd.grad(y.square().sum() + state.weights["out"].square().sum(), list(named.values()))
    return {"output": y, "state": state.weights["out"]} | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPECS)
def test_gates_and_their_gradients_are_exact_at_any_gate(name, size, monkeypatch):
    spec = SPECS[name]
    exact = results(spec, SIZES[size], torch.float64, "0", monkeypatch, form="recurrent")
    kernels = "force" if DEVICE == "cpu" else "1"
    for found in (results(spec, SIZES[size], torch.float32, x, monkeypatch) for x in ("0", kernels)):
        for what, x in exact.items():
            # of which nothing is left in float32
            gone = x.abs().max() < 1e-30
            assert gone or error(found[what], x) < 1e-5, what
