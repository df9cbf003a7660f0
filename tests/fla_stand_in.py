"""A stand-in for flash-linear-attention: what its operators promise, as loops over tokens in float64.

Written from the signatures and docstrings of fla-core 0.6.0: layouts `[B, T, H, D]`, gates as logarithms, `scale` that is
`Dk^-1/2` where it is not given, states `[N, H, Dk, Dv]`, packed rows by `cu_seqlens`, and what each operator refuses.
"""

import itertools
import sys
import types

import torch


def recurrence(q, k, v, g=None, beta=None, *, scale, initial_state, output_final_state, cu_seqlens):
    """One state after another: decay, then the write `k^T v`, or with `beta` that of the residual, then the read."""
    rows = list(range(q.shape[0])) if cu_seqlens is None else [0] * (len(cu_seqlens) - 1)
    bounds = [(0, q.shape[1])] * len(rows) if cu_seqlens is None else list(itertools.pairwise(cu_seqlens))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    outputs, ends = [], []
    for n, (row, (start, stop)) in enumerate(zip(rows, bounds, strict=True)):
        state = k.new_zeros(k.shape[2], k.shape[3], v.shape[3], dtype=torch.float64)
        if initial_state is not None:
            state = initial_state[n].double()
        read = []
        for t in range(int(start), int(stop)):
            if g is not None:
                gate = g[row, t].double().exp()
                state = state * (gate[..., None] if gate.dim() == 2 else gate[..., None, None])
            key, value = k[row, t].double(), v[row, t].double()
            if beta is not None:
                value = beta[row, t].double()[..., None] * (value - torch.einsum("hk,hkv->hv", key, state))
            state = state + key[..., None] * value[..., None, :]
            read.append(torch.einsum("hk,hkv->hv", scale * q[row, t].double(), state))
        outputs.append(torch.stack(read))
        ends.append(state)
    output = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return output.to(q.dtype), torch.stack(ends).float() if output_final_state else None


class StandIn:
    """The package, installed as modules while it is entered; `calls` are the names and arguments of what was called."""

    def __init__(self, without=()):
        self.calls, self.without, self.before = [], without, {}

    def operator(self, name, gate=None, delta=False, narrow=False, widest=None):
        def called(q, k, v, *, scale=None, initial_state=None, output_final_state=False, g=None, beta=None, **packed):
            assert packed.keys() <= {"cu_seqlens", "cu_seqlens_cpu"}
            cu_seqlens, cu_seqlens_cpu = packed.get("cu_seqlens"), packed.get("cu_seqlens_cpu")
            given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "scale": scale, "cu_seqlens": cu_seqlens}
            self.calls.append((name, given))
            assert q.shape == k.shape
            assert v.shape[:3] == q.shape[:3]
            assert q.dtype == k.dtype == v.dtype
            assert not narrow or q.dtype != torch.float32
            assert widest is None or q.shape[-1] <= widest
            assert (beta is not None) == delta
            assert beta is None or beta.shape == q.shape[:3]
            needed = {None: None, "head": q.shape[:3], "key": q.shape, "maybe": None if g is None else q.shape[:3]}[gate]
            assert (None if g is None else g.shape) == needed
            assert initial_state is None or initial_state.dtype == torch.float32
            if cu_seqlens is not None:
                assert q.shape[0] == 1
                assert cu_seqlens.dtype == torch.long
                assert cu_seqlens_cpu is None or torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
                assert initial_state is None or initial_state.shape[0] == len(cu_seqlens) - 1
            return recurrence(q, k, v, g, beta, scale=scale, initial_state=initial_state,
                              output_final_state=output_final_state, cu_seqlens=cu_seqlens)  # fmt: skip

        return called

    def __enter__(self):
        functions = {
            "simple_gla": self.operator("chunk_simple_gla", gate="maybe"),
            "gla": self.operator("chunk_gla", gate="key"),
            "delta_rule": self.operator("chunk_delta_rule", delta=True, narrow=True, widest=256),
            "gated_delta_rule": self.operator("chunk_gated_delta_rule", gate="head", delta=True, widest=256),
            "kda": self.operator("chunk_kda", gate="key", delta=True, widest=256),
        }
        modules = {"fla": types.ModuleType("fla"), "fla.ops": types.ModuleType("fla.ops")}
        for name, function in functions.items():
            module = types.ModuleType(f"fla.ops.{name}")
            if name not in self.without:
                setattr(module, f"chunk_{name}", function)
            modules[module.__name__] = module
        # a package that is found, and whose submodules are those alone
        for name in ("fla", "fla.ops"):
            modules[name].__path__ = []
            modules[name].__spec__ = types.SimpleNamespace(name=name, submodule_search_locations=[])
        self.before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        return self

    def __exit__(self, *_):
        for name, module in self.before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
