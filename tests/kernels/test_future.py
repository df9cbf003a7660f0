"""On kernels too, outputs depend on what they see alone: chunks of any form, packed sequences, heads."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import kvbind

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK, TOKENS, SPOILT, BOUNDS = 64, 150, 70, (0, 100, 150)
PLAIN = kvbind.InnerLoop(kvbind.Linear(), chunk=CHUNK)
SPECS = {
    "chunked": PLAIN.replace(momentum=True, retention=True),
    "chunked, with its own chunk": PLAIN.replace(visibility="chunk"),
    "chunked, shaped": PLAIN.replace(orthogonalize=kvbind.NewtonSchulz(dtype=torch.float32)),
    "recurrent": PLAIN.replace(network=kvbind.SwiGLU(), update="all", normalize=True, momentum=True),
    "GLU, token by token": PLAIN.replace(network=kvbind.GLU(), chunk=1, visibility="token", update="last"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
@pytest.mark.parametrize("where", ["q", "v"])
@pytest.mark.parametrize("name", SPECS)
def test_outputs_that_do_not_see_it_stay(name, where, packed, monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force" if DEVICE == "cpu" else "1")
    spec, g = SPECS[name], torch.Generator().manual_seed(0)
    tensors = {x: torch.randn(1, TOKENS, 2, 16, generator=g).to(DEVICE) for x in ("q", "k", "v")}
    weights = {x: y.to(DEVICE) for x, y in spec.network.initial(2, 16, 16, 16, generator=g).items()}
    gates = {
        gate: torch.full((1, TOKENS, 2), 0.9, device=DEVICE) for gate in ("momentum", "retention") if getattr(spec, gate)
    }
    bounds = {"cu_seqlens": BOUNDS} if packed else {}

    def run(given):
        return kvbind.ttt(spec, weights, **given, lr=0.1, **gates, **bounds)

    changed = {x: y.clone() for x, y in tensors.items()}
    changed[where][0, SPOILT, 1, 3] = math.nan
    (y, state), (z, after) = run(tensors), run(changed)
    sees = torch.zeros(1, TOKENS, 2, dtype=torch.bool)
    start = SPOILT // spec.chunk * spec.chunk
    first = {"past": start + spec.chunk, "chunk": start, "token": SPOILT}[spec.visibility]
    last = BOUNDS[1] if packed else TOKENS
    sees[0, slice(SPOILT, SPOILT + 1) if where == "q" else slice(first, last), 1] = True
    assert torch.equal(z[~sees], y[~sees])
    if sees.any():
        assert not z[sees].isfinite().all(-1).any()
    if packed:
        assert torch.equal(after.weights["out"][1], state.weights["out"][1])


def test_tokens_that_do_not_write_may_hold_anything(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 1, 16, generator=g).to(DEVICE)
    for kernels in ("0", "force" if DEVICE == "cpu" else "1"):
        monkeypatch.setenv("KVBIND_KERNELS", kernels)
        for spec in (kvbind.systems.lact_nvs().replace(orthogonalize=None), kvbind.systems.vittt()):
            weights = {x: y.to(DEVICE) for x, y in spec.network.initial(1, 16, 16, 16, generator=g).items()}
            writes = torch.arange(20, device=DEVICE) < 12
            ys = []
            for value in (0.0, math.nan):
                keys, values = (x.index_fill(1, torch.arange(12, 20, device=DEVICE), value) for x in (k, v))
                ys.append(kvbind.ttt(spec, weights, q, keys, values, update_tokens=writes)[0])
            assert torch.equal(*ys)
