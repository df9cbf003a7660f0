"""An inner loop written for the tests alone, from the specification: loops, `torch.func.grad`, nothing of the library's.

One sequence, one head at a time; slow and plain. Only the spec's fields are read from the library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda u: u,
}


def forward(network, w, x):
    """f(x) for one head: x [T, D], matrices [in, out] (kernels [D, 3, 3])."""
    kind = type(network).__name__
    if kind == "Linear":
        return x @ w["out"]
    if kind == "SwiGLU":
        return (F.silu(x @ w["gate"]) * (x @ w["up"])) @ w["out"]
    if kind == "GLU":
        return F.silu(x @ w["gate"]) * (x @ w["out"])
    if kind == "MLP":
        names = ["in"] if network.depth == 1 else [f"in.{i}" for i in range(network.depth)]
        for name in names:
            x = ACTIVATIONS[network.activation](x @ w[name])
        return x @ w["out"]
    if kind == "DepthwiseConv":
        tokens, channels = x.shape
        height, width = network.grid or (round(tokens**0.5),) * 2
        image = x.T.reshape(1, channels, height, width)
        return F.conv2d(image, w["out"][:, None], padding=1, groups=channels).reshape(channels, tokens).T
    raise NotImplementedError(kind)


def losses(spec, w, k, v):
    f = forward(spec.network, w, k)
    return -(f * v).sum(-1) if spec.loss == "dot" else 0.5 * ((f - v) ** 2).sum(-1)


def newton_schulz(g, coefficients):
    transposed = g.shape[0] > g.shape[1]
    x = g.T if transposed else g
    x = x / (x.pow(2).sum().sqrt() + 1e-7)
    for a, b, c in coefficients:
        s = x @ x.T
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.T if transposed else x


def channel_norms(spec, m):
    return m.flatten(1).norm(dim=1)[:, None, None] if type(spec.network).__name__ == "DepthwiseConv" else m.norm(dim=0)[None]


def rule(spec, w, buffer, main, norms, k, v, lr, m, a, writes=None):
    """`spec.steps` applications of the six lines to one chunk; lr by matrix [T], m and a [T] or None."""
    use = slice(None) if writes is None else writes
    for _ in range(spec.steps):
        new_w, new_buffer, main = dict(w), dict(buffer), dict(main)
        for name in spec.updated:

            def weighted(matrix, name=name, w=w):
                return (lr[name] * losses(spec, {**w, name: matrix}, k, v))[use].sum()

            g = -torch.func.grad(weighted)(w[name])
            if spec.momentum:
                g = g + m[use].mean() * buffer[name]
                new_buffer[name] = g
            if spec.orthogonalize is not None:
                g = newton_schulz(g, spec.orthogonalize.coefficients)
            if spec.clip:
                g = g / (channel_norms(spec, g) + 1)
            if spec.direction == "ascent":
                g = -g
            matrix = main[name] * a[use].mean() if spec.retention else main[name]
            matrix = main[name] = matrix + g
            if spec.normalize:
                matrix = matrix / (channel_norms(spec, matrix) + 1e-5) * norms[name]
            new_w[name] = matrix
            if spec.normalize is True:
                main[name] = matrix
        w, buffer = new_w, new_buffer
    return w, buffer, main


def run_head(spec, w, q, k, v, lr, m, a, writes=None):
    """Outputs [T, Dv] of one sequence and head, and the weights after its complete chunks."""
    buffer = {name: torch.zeros_like(w[name]) for name in spec.updated}
    norms = {name: channel_norms(spec, w[name]) for name in spec.updated}
    read = q if spec.query == "query" else k
    if spec.visibility == "full":
        w, _, _ = rule(spec, w, buffer, dict(w), norms, k, v, lr, m, a, writes)
        return forward(spec.network, w, read), w

    outputs, main = [], dict(w)
    for start in range(0, len(k), spec.chunk):
        s = slice(start, start + spec.chunk)

        def after(stop, s=s, w=w, buffer=buffer, main=main):
            part = slice(s.start, stop)
            rates = {name: rate[part] for name, rate in lr.items()}
            gates = [None if gate is None else gate[part] for gate in (m, a)]
            return rule(spec, w, buffer, main, norms, k[part], v[part], rates, *gates)

        end = min(s.stop, len(k))
        if spec.visibility == "past":
            outputs.append(forward(spec.network, w, read[s]))
        elif spec.visibility == "chunk":
            outputs.append(forward(spec.network, after(end)[0], read[s]))
        else:
            outputs += [forward(spec.network, after(t + 1)[0], read[t : t + 1]) for t in range(start, end)]
        if end == s.stop:
            w, buffer, main = after(end)
    return torch.cat(outputs), w


def run(spec, weights, q, k, v, lr, momentum=None, retention=None, update_tokens=None):
    """As `kvbind.ttt`, for plain dicts of `lr` by matrix [B, T, H]; returns outputs [B, T, H, Dv] and weights [B][H]."""
    batch, _, heads, width = v.shape
    conv = type(spec.network).__name__ == "DepthwiseConv"
    rows, finals = [], []
    for b in range(batch):
        columns, final = [], []
        for h in range(heads):
            pick = slice(h * width, (h + 1) * width) if conv else h
            w = {name: (x[b] if x.dim() == 4 else x)[pick] for name, x in weights.items()}
            gates = [None if gate is None else gate[b, :, h] for gate in (momentum, retention)]
            rates = {name: rate[b, :, h] for name, rate in lr.items()}
            writes = (
                update_tokens[b] if isinstance(update_tokens, torch.Tensor) and update_tokens.dim() == 2 else update_tokens
            )
            out, last = run_head(spec, w, q[b, :, h], k[b, :, h], v[b, :, h], rates, *gates, writes)
            columns.append(out)
            final.append(last)
        rows.append(torch.stack(columns, dim=1))
        finals.append(final)
    return torch.stack(rows), finals
