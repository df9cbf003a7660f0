"""The LaCT language model, written plainly from the specification: one sequence, token by token and chunk by chunk.

Attention is a softmax per token, gradients of the inner loop come from autograd, and nothing of the library is used.
"""

import math

import torch
from torch import Tensor

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

DEFAULTS = {
    "qkv_bias": False,
    "attn_qk_norm": False,
    "qkv_silu": True,
    "no_v_silu": False,
    "ttt_nope": False,
    "learnable_ttt_scale": True,
    "use_muon": True,
    "use_momentum": True,
    "ttt_prenorm": False,
    "w0_w2_low_rank": -1,
    "norm_eps": 1e-6,
    "rope_theta": 1e4,
}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """One head vector `[D]` at a position: channel i turns with channel i + D / 2."""
    half = x.shape[0] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[0])
        c, s = math.cos(angle), math.sin(angle)
        out[i] = c * x[i] - s * x[half + i]
        out[half + i] = s * x[i] + c * x[half + i]
    return out


def rotated_row(x: Tensor, position: int, heads: int, theta: float) -> Tensor:
    return torch.cat([rotated(part, position, theta) for part in x.chunk(heads)])


def newton_schulz(g: Tensor) -> Tensor:
    x = g / (g.norm() + 1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, window: int, theta: float) -> Tensor:
    """`[T, d]` each; a token sees itself and `window - 1` tokens before it."""
    q = torch.stack([rotated_row(x, t, heads, theta) for t, x in enumerate(q)])
    k = torch.stack([rotated_row(x, t, heads, theta) for t, x in enumerate(k)])
    rows = []
    for t in range(len(q)):
        first = max(0, t - window + 1)
        parts = []
        for qh, kh, vh in zip(
            q[t].chunk(heads), k[first : t + 1].chunk(heads, 1), v[first : t + 1].chunk(heads, 1), strict=True
        ):
            parts.append(torch.softmax(kh @ qh / math.sqrt(len(qh)), 0) @ vh)
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def fast_output(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """`w1 (silu(w0 x) * (w2 x))` for rows x, matrices `[out, in]`."""
    return (silu(x @ w["w0"].T) * (x @ w["w2"].T)) @ w["w1"].T


def fast_head(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, gate: Tensor | None, w: dict[str, Tensor], c: dict) -> Tensor:
    """One head: read each chunk with the weights before it, then update. `rates` is `[T, 3]` for w0, w1, w2."""
    names, size = ("w0", "w1", "w2"), c["lact_chunk_size"]
    start = {n: w[n].norm(dim=1, keepdim=True) for n in names}
    kept, momentum = dict(w), {n: torch.zeros_like(w[n]) for n in names}
    outputs = []
    for begin in range(0, len(q), size):
        chunk = slice(begin, min(begin + size, len(q)))
        outputs.append(fast_output(q[chunk], w))
        if chunk.stop - chunk.start < size:
            break
        for place, n in enumerate(names):
            probe = {m: w[m].detach().clone().requires_grad_(m == n) for m in names}
            with torch.enable_grad():
                bound = (rates[chunk, place, None] * fast_output(k[chunk], probe) * v[chunk]).sum()
                (step,) = torch.autograd.grad(bound, probe[n])
            if gate is not None:
                step = step + gate[chunk].mean() * momentum[n]
                momentum[n] = step
            kept[n] = kept[n] + (newton_schulz(step) if c["use_muon"] else step)
        shaped = {n: kept[n] / (kept[n].norm(dim=1, keepdim=True) + 1e-5) * start[n] for n in names}
        if not c["ttt_prenorm"]:
            kept = dict(shaped)
        w = shaped
    return torch.cat(outputs)


def mixer(h: Tensor, w: dict[str, Tensor], c: dict) -> Tensor:
    heads, fast_heads, theta = c["num_attn_heads"], c["num_lact_heads"], c["rope_theta"]
    qkv = h @ w["qkv.weight"].T + (w["qkv.bias"] if c["qkv_bias"] else 0)
    q, k, v = qkv.chunk(3, dim=1)
    if c["attn_qk_norm"]:
        q, k = rms(q, w["q_norm.weight"], 1e-5), rms(k, w["k_norm.weight"], 1e-5)
    o = attention(q, k, v, heads, c["window_size"], theta)

    operands = []
    for place, x in enumerate((q, k)):
        x = x * w["qk_scale"][:, place] + w["qk_offset"][:, place]
        x = silu(x) if c["qkv_silu"] else x
        x = torch.cat([part / (part.norm(dim=1, keepdim=True) + 1e-5) for part in x.chunk(fast_heads, 1)], 1)
        if not c["ttt_nope"]:
            x = torch.stack([rotated_row(row, t, heads, theta) for t, row in enumerate(x)])
        operands.append(x.chunk(fast_heads, 1))
    values = (silu(v) if c["qkv_silu"] and not c["no_v_silu"] else v).chunk(fast_heads, 1)
    rates = h @ w["lr_proj.weight"].T + w["lr_proj.bias"] + math.log(math.expm1(1e-3))
    rates = torch.log1p(torch.exp(rates)).chunk(fast_heads, 1)
    gates = [None] * fast_heads
    if c["use_momentum"]:
        gates = 1 / (1 + torch.exp(-(h @ w["momentum_proj.0.weight"].T + w["momentum_proj.0.bias"])))
        gates = gates.unbind(1)

    fast = []
    for i in range(fast_heads):
        start = {"w1": w["w1"][i]}
        for n in ("w0", "w2"):
            if c["w0_w2_low_rank"] > 0:
                start[n] = w[f"{n}.w_left"][i] @ w[f"{n}.w_right"][i]
                start[n] = start[n] + 0.5 * torch.eye(*start[n].shape, dtype=h.dtype)
            else:
                start[n] = w[n][i]
        y = fast_head(operands[0][i], operands[1][i], values[i], rates[i], gates[i], start, c)
        y = rms(y, w["ttt_norm.weight"], 1e-5)
        if c["learnable_ttt_scale"]:
            y = y * silu(h @ w["ttt_scale_proj.weight"][i] + w["ttt_scale_proj.bias"][i])[:, None]
        fast.append(y)
    return (o + torch.cat(fast, 1)) @ w["o_proj.weight"].T


@torch.no_grad()
def logits(weights: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """Logits `[T, vocab]` of one sequence `ids` `[T]`, in the dtype of the weights, under the released field names."""
    c = {**DEFAULTS, **config}
    x = weights["model.embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): y for name, y in weights.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): y for name, y in w.items() if name.startswith("attn.")}
        x = x + mixer(rms(x, w["attn_norm.weight"], c["norm_eps"]), attn, c)
        h = rms(x, w["mlp_norm.weight"], c["norm_eps"])
        hidden = silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
        x = x + hidden @ w["mlp.down_proj.weight"].T
    x = rms(x, weights["model.norm.weight"], c["norm_eps"])
    return x @ weights["lm_head.weight"].T
