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


def forward(network, w, x, where="read"):
    """f(x) for one head, as it is read or as the loss has it: x [T, D], matrices [in, out] (kernels [D, 3, 3])."""
    head = getattr(network, "head", None)
    z = last(network, w, x)
    if head is None or head.where not in ("both", where):
        return z
    gain, shift = (1 + w["gamma"], None) if head.fast else (w["gamma"], w["beta"])
    y = F.layer_norm(z, z.shape[-1:], eps=head.eps) * gain
    y = y if shift is None else y + shift
    return x + y if head.residual else y


def last(network, w, x):
    kind = type(network).__name__
    bias = getattr(network, "bias", False)
    if kind == "Linear":
        return x @ w["out"] + w["out.bias"] if bias else x @ w["out"]
    if kind == "SwiGLU":
        return (F.silu(x @ w["gate"]) * (x @ w["up"])) @ w["out"]
    if kind == "GLU":
        return F.silu(x @ w["gate"]) * (x @ w["out"])
    if kind == "MLP":
        names = ["in"] if network.depth == 1 else [f"in.{i}" for i in range(network.depth)]
        for name in names:
            x = ACTIVATIONS[network.activation](x @ w[name] + (w[f"{name}.bias"] if bias else 0))
        return x @ w["out"] + (w["out.bias"] if bias else 0)
    if kind == "DepthwiseConv":
        tokens, channels = x.shape
        height, width = network.grid or (round(tokens**0.5),) * 2
        image = x.T.reshape(1, channels, height, width)
        return F.conv2d(image, w["out"][:, None], padding=1, groups=channels).reshape(channels, tokens).T
    raise NotImplementedError(kind)


def losses(spec, w, k, v, residual=None):
    """Of each token; with a residual that was read elsewhere, what has the same gradient: minus its product with f(k)."""
    f = forward(spec.network, w, k, "loss")
    if residual is not None:
        return -(f * residual).sum(-1)
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


VECTORS = ("bias", "gamma", "beta")


def is_vector(name):
    return name.split(".")[-1] in VECTORS


class Memory:
    """What a sequence is between writes: weights `w` as they are read and differentiated, and what fields add to them."""

    def __init__(self, spec, w):
        updated = spec.updated
        self.w, self.main = dict(w), dict(w)
        self.buffer = {name: torch.zeros_like(w[name]) for name in updated}
        self.norms = {
            name: channel_norms(spec, w[name].detach() if spec.detach_norms else w[name])
            for name in w
            if not is_vector(name)
        }
        self.tokens, self.updates = [], []
        anchor = spec.anchor
        if anchor is not None:
            self.anchor = {name: w[name].detach() if "start" in anchor.detach else w[name] for name in updated}
            self.importance = {name: torch.full_like(w[name], anchor.start) for name in updated}
        self.far = {name: torch.zeros_like(w[name]) for name in updated}

    def copy(self):
        other = object.__new__(Memory)
        for name, x in vars(self).items():
            setattr(other, name, dict(x) if isinstance(x, dict) else list(x))
        return other

    def seen(self, share):
        """With a read rate, what sees `share` of the span's updates."""
        return self.w | {name: self.w[name] + share * x for name, x in self.far.items()}


def part(tokens, rows):
    """Tokens by row: a dict of tensors, rates in a dict of their own."""
    return {name: {n: r[rows] for n, r in x.items()} if isinstance(x, dict) else x[rows] for name, x in tokens.items()}


def write(spec, memory, tokens, at):
    """One write, `spec.steps` times: memory after it; `at` the weights that gradients are taken at, None for its own."""
    use = tokens["use"]
    if not bool(use.any()):
        return memory
    mean = {name: tokens[name][use].mean(0) for name in ("momentum", "retention", "step_rate") if name in tokens}
    for step in range(spec.steps):
        memory = one_step(spec, memory, tokens, memory.w if step or at is None else at, mean)
    if spec.window_size > 1 and not spec.sums_updates:
        memory.tokens = [*memory.tokens, part(tokens, use)][1 - spec.window_size :]
    return memory


def one_step(spec, memory, tokens, at, mean):
    old, new, anchor = memory, memory.copy(), spec.anchor
    decay = mean.get("retention")
    if decay is not None and decay.dim():
        decay = decay[:, None]
    if spec.decays_before:
        at = at | {name: decay * at[name] for name in spec.updated}
    total = dict.fromkeys(spec.updated, 0.0)
    own = part(tokens, tokens["use"])
    if type(spec.network).__name__ == "DepthwiseConv":
        # which needs the whole grid: what does not write has no rate
        own = tokens | {"lr": {name: rate * tokens["use"] for name, rate in tokens["lr"].items()}}
    for its in [*old.tokens, own]:
        residual = None
        if "erase" in its:
            residual = its["v"] - forward(spec.network, at, its["erase"], "loss")
        for name in spec.updated:

            def weighted(weight, name=name, its=its, residual=residual):
                return (its["lr"][name] * losses(spec, {**at, name: weight}, its["k"], its["v"], residual)).sum()

            total[name] = total[name] - torch.func.grad(weighted)(at[name])
    moved = {name: g + mean["momentum"] * old.buffer[name] if spec.momentum else g for name, g in total.items()}
    if spec.momentum:
        new.buffer = moved
    if spec.sums_updates:
        new.updates = [*old.updates, moved][1 - spec.window.n :]
    for name in spec.updated:
        u = sum(held[name] for held in [*old.updates, moved])
        if spec.orthogonalize is not None and not is_vector(name):
            u = newton_schulz(u, spec.orthogonalize.coefficients)
        if spec.clip:
            u = u / (channel_norms(spec, u) + 1)
        if spec.step_rate:
            u = mean["step_rate"] * u
        signed = -u if spec.direction == "ascent" else u
        if spec.read_rate:
            new.far[name] = old.far[name] + signed
            continue
        m = (decay * old.main[name] if decay is not None else old.main[name]) + signed
        if anchor is not None:
            a, d, x = old.anchor[name], u, m
            if "importance" in anchor.detach:
                a, d, x = a.detach(), d.detach(), x.detach()
            imp = {"absolute": d.abs(), "square": d**2, "drift": (d * (x - a)).abs()}[anchor.importance]
            f = new.importance[name] = anchor.decay * old.importance[name] + (1 - anchor.decay) * imp
            if anchor.weight == "rest":
                f = 1 - f / (f.max() + 1e-8)
            m = m - anchor.strength * f * (m - old.anchor[name])
        new.main[name] = new.w[name] = m
        if spec.normalize and not is_vector(name):
            new.w[name] = m / (channel_norms(spec, m) + 1e-5) * old.norms[name]
            if spec.normalize is True:
                new.main[name] = new.w[name]
        if anchor is not None:
            follows = new.main[name].detach() if "follow" in anchor.detach else new.main[name]
            new.anchor[name] = anchor.follow * old.anchor[name] + (1 - anchor.follow) * follows
    return new


def run_head(spec, w, q, tokens):
    """Outputs [T, Dv] of one sequence and head, and its weights where a state would stop.

    Args:
        spec: the inner loop.
        w: weights.
        q: queries [T, Dk].
        tokens: by name "k", "v", "lr" by weight, gates, and "use", which tokens write; a row for each write.
    """
    memory, n, length = Memory(spec, w), spec.writes, len(q)
    read = q if spec.query == "query" else tokens["k"]
    size = spec.chunk or max(length, 1)
    span = spec.refresh if isinstance(spec.refresh, int) else size
    at, stopped, outputs = memory.w, memory.w, []
    if spec.visibility == "full":
        for start in range(0, length, size):
            at = memory.w if start % span == 0 and spec.refresh != "call" else at
            memory = write(spec, memory, part(tokens, slice(start, start + size)), at)
        return forward(spec.network, memory.w, read), memory.w

    for start in range(0, length, size):
        if start % span == 0 and spec.refresh != "call":
            at = memory.w

        def after(stop, start=start, memory=memory, at=at):
            if n == 1:
                return write(spec, memory, part(tokens, slice(start, stop)), at)
            for row in range(start * n, stop * n):
                first = row == start * n
                its = part(tokens, slice(row, row + 1))
                if "retention" in its and not first:
                    its["retention"] = torch.ones_like(its["retention"])
                memory = write(spec, memory, its, at if first else None)
            return memory

        end = min(start + size, length)
        for t in range(start, end):
            found = memory if spec.visibility == "past" else after(end if spec.visibility == "chunk" else t + 1)
            seen = found.seen(tokens["read_rate"][t]) if spec.read_rate else found.w
            outputs.append(forward(spec.network, seen, read[t : t + 1]))
        if end < start + size:
            break
        memory = after(end)
        if end % span == 0:
            stopped = memory.seen(tokens["read_rate"][end - 1]) if spec.read_rate else memory.w
            if spec.read_rate and spec.refresh != "call":
                memory = memory.copy()
                memory.w, memory.far = stopped, {name: torch.zeros_like(x) for name, x in memory.far.items()}
    return torch.cat(outputs), stopped


def run(spec, weights, q, k, v, lr, update_tokens=None, **gates):
    """As `kvbind.ttt`, for plain dicts of `lr` by weight [B, T, H]; returns outputs [B, T, H, Dv] and weights [B][H]."""
    batch, length, heads, width = *q.shape[:3], v.shape[-1]
    n, conv = spec.writes, type(spec.network).__name__ == "DepthwiseConv"
    rows, finals = [], []
    for b in range(batch):
        columns, final = [], []
        for h in range(heads):
            pick = slice(h * width, (h + 1) * width) if conv else h
            whole = {name: x.dim() == (3 if is_vector(name) else 4) for name, x in weights.items()}
            w = {name: (x[b] if whole[name] else x)[pick] for name, x in weights.items()}
            use = torch.ones(length, dtype=torch.bool)
            if update_tokens is not None:
                chosen = (
                    update_tokens[b]
                    if isinstance(update_tokens, torch.Tensor) and update_tokens.dim() == 2
                    else update_tokens
                )
                use = torch.zeros(length, dtype=torch.bool)
                use[chosen] = True
            tokens = {"k": k[b, :, h], "v": v[b, :, h], "lr": {name: rate[b, :, h] for name, rate in lr.items()}}
            for name, gate in gates.items():
                x = gate[b, :, h]
                tokens[name] = x if name == "erase" else x.repeat_interleave(n, dim=0)
            tokens["use"] = use.repeat_interleave(n)
            out, last_weights = run_head(spec, w, q[b, :, h], tokens)
            columns.append(out)
            final.append(last_weights)
        rows.append(torch.stack(columns, dim=1))
        finals.append(final)
    return torch.stack(rows), finals
