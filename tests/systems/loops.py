"""Inner loops of public systems, written for the tests alone from their papers and public code: nothing here is the
library's.

Every loop goes token by token, or chunk by chunk, and reads beside its equation. Where a system states a loss, its inner
gradient is `torch.func.grad` of that loss as it is written, so no closed form is trusted; the outer gradient is autograd
through the loop.

Layout: q, k, v `[B, T, H, D]`, per-token rates and gates `[B, T, H]` or `[B, T, H, Dk]`, weights `[H, in, out]`; row
vectors, so a linear memory reads `q S`. Loops return outputs `[B, T, H, Dv]` and the state behind the last complete step,
`[B, H, in, out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
Predict = Callable[[Weights, Tensor], Tensor]

VIEWS = ((3.4445, -4.7750, 2.0315),) * 5
"""Newton-Schulz coefficients of view synthesis and of everything with public code beside the LaCT language model."""


# parts


def token(x: Tensor, t: int) -> Tensor:
    """Token t as a row: `[B, T, H, D]` to `[B, H, 1, D]`."""
    return x[:, t, :, None]


def gate(x: Tensor, t: int) -> Tensor:
    """A gate of token t that multiplies matrices: `[B, T, H]` to `[B, H, 1, 1]`, `[B, T, H, Dk]` to `[B, H, Dk, 1]` (their
    rows).
    """
    return x[:, t, ..., None] if x.dim() == 4 else x[:, t, :, None, None]


def by_head(x: Tensor, like: Tensor) -> Tensor:
    """`[B, H]` beside a matrix or a bias `[B, H, ...]`."""
    return x.reshape(*x.shape, *[1] * (like.dim() - 2))


def span(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start to stop with heads in front: `[B, T, H, ...]` to `[B, H, n, ...]`."""
    return x[:, start:stop].transpose(1, 2)


def tokens(rows: list[Tensor]) -> Tensor:
    """Parts `[B, H, n, D]` one behind another, as `[B, T, H, D]`."""
    return torch.cat(rows, dim=2).transpose(1, 2)


def per_batch(weights: Weights, like: Tensor) -> dict[str, Tensor]:
    """Starting weights `[H, ...]` for every row of a batch, `[B, H, ...]`."""
    return {name: w.expand(like.shape[0], *w.shape) for name, w in weights.items()}


def descent(loss: Callable[[Any], Tensor], at: Any) -> Any:
    """`-dloss/dM` of one matrix or of a dict of them; sums over batch and heads keep these apart."""
    gradient = torch.func.grad(loss)(at)
    return {name: -g for name, g in gradient.items()} if isinstance(gradient, dict) else -gradient


def newton_schulz(
    g: Tensor, coefficients: tuple[tuple[float, float, float], ...], norm: Callable[[Tensor], Tensor]
) -> Tensor:
    """Five odd polynomials of a matrix that push its singular values towards 1; `norm` is what it is divided by first."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / norm(x.square().sum((-2, -1), keepdim=True).sqrt())
    for a, b, c in coefficients:
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


def muon(g: Tensor) -> Tensor:
    """Newton-Schulz as LaCT's code and its kin divide: by the Frobenius norm plus 1e-7."""
    return newton_schulz(g, VIEWS, lambda n: n + 1e-7)


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor | float, eps: float) -> Tensor:
    """Over the width of a head, with the biased variance; weight and bias `[..., H, D]`."""
    centred = z - z.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    shift = bias if isinstance(bias, float) else bias[..., None, :]
    return normed * weight[..., None, :] + shift


def linear(w: Weights, x: Tensor) -> Tensor:
    return x @ w["out"]


def biased_linear(w: Weights, x: Tensor) -> Tensor:
    return x @ w["out"] + w["out_bias"][..., None, :]


def biased_mlp(w: Weights, x: Tensor) -> Tensor:
    hidden = F.gelu(x @ w["in"] + w["in_bias"][..., None, :], approximate="tanh")
    return hidden @ w["out"] + w["out_bias"][..., None, :]


def mlp(activation: Callable[[Tensor], Tensor]) -> Predict:
    """`act(x W_in) W_out`, without biases."""
    return lambda w, x: activation(x @ w["in"]) @ w["out"]


def monomials(x: Tensor, coefficients: Tensor) -> Tensor:
    """Every monomial of the entries of x up to degree p, degree i times coefficient i; `coefficients` has `p + 1` entries.

    A degree's monomials are the outer power of x, flat: its `D^i` products in order, so that the inner product of two of
    them is `(x . y)^i`.
    """
    power, parts = torch.ones_like(x[..., :1]), []
    for i, coefficient in enumerate(coefficients):
        parts.append(coefficient * power)
        if i + 1 < len(coefficients):
            power = (power[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat(parts, dim=-1)


def powers(x: Tensor, coefficients: Tensor) -> Tensor:
    """The polynomial of each entry, `sum_i c_i x^i`."""
    return sum(c * x**i for i, c in enumerate(coefficients))


# TTT (arXiv 2407.04620)


def ttt(
    weights: Weights, ln_weight: Tensor, ln_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, reader: Tensor, *,
    predict: Predict, mini_batch: int = 16, eps: float = 1e-6, residual: str = "input",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """TTT-Linear and TTT-MLP: `f(x) = x + LN(z(x))`, `1/2 ||f(k) - v||^2` at the weights that open the mini-batch.

    Token t reads `M_s + c_t sum_(s <= i <= t) lr_i G_i`, and so does the next mini-batch behind the last token. `residual`:
    what stands beside the LN at the read, the query ("input") or `z(q)` ("prediction", as flash-linear-attention has it).
    """
    weights = per_batch(weights, q)

    def loss(w: Weights, x: Tensor, target: Tensor, rate: Tensor) -> Tensor:
        f = x + layer_norm(predict(w, x), ln_weight, ln_bias, eps)
        return (rate * 0.5 * (f - target).square().sum(-1)).sum()

    rows = []
    for start in range(0, q.shape[1], mini_batch):
        moved = {name: torch.zeros_like(w) for name, w in weights.items()}
        seen = weights
        for t in range(start, min(start + mini_batch, q.shape[1])):
            k_t, v_t, lr_t = token(k, t), token(v, t), lr[:, t, :, None]
            step = descent(lambda w, k_t=k_t, v_t=v_t, lr_t=lr_t: loss(w, k_t, v_t, lr_t), weights)
            moved = {name: moved[name] + step[name] for name in moved}
            seen = {name: weights[name] + by_head(reader[:, t], y) * y for name, y in moved.items()}
            z = predict(seen, token(q, t))
            rows.append((token(q, t) if residual == "input" else z) + layer_norm(z, ln_weight, ln_bias, eps))
        if start + mini_batch <= q.shape[1]:
            weights = seen
    return tokens(rows), dict(weights)


# Titans (arXiv 2501.00663) and Atlas (arXiv 2505.23735)


def titans(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor, *,
    predict: Predict, batch: int, step: Callable[..., Any] | None = None, read: Callable[[Tensor], Tensor] = lambda z: z,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Section 3: `S_t = eta_t S_(t-1) - theta_t grad ||M(k_t) - v_t||^2` at `M_t'`, `M_t = (1 - alpha_t) M_(t-1) + S_t`.

    `t'` is the last multiple of `batch`. `step(M_t', k_t, v_t)` may put something else for minus the gradient; `read` is
    applied to `M_t(q_t)`.
    """
    weights = per_batch(weights, q)
    surprise = {name: torch.zeros_like(w) for name, w in weights.items()}
    rows = []
    for t in range(q.shape[1]):
        if t % batch == 0:
            opening = weights
        k_t, v_t = token(k, t), token(v, t)
        if step is None:
            moved = descent(lambda w, k_t=k_t, v_t=v_t: (predict(w, k_t) - v_t).square().sum(), opening)
        else:
            moved = step(opening, k_t, v_t)
        surprise = {name: gate(eta, t) * surprise[name] + gate(theta, t) * moved[name] for name in weights}
        weights = {name: (1 - gate(alpha, t)) * weights[name] + surprise[name] for name in weights}
        rows.append(read(predict(weights, token(q, t))))
    return tokens(rows), {**weights, **{f"{name}.momentum": s for name, s in surprise.items()}}


def fast_norm(predict: Predict, eps: float = 1e-5) -> Predict:
    """`x + LN(z(x)) (1 + gamma)` with a fast gamma `[H, D]`, the default memory of titans-pytorch."""
    return lambda w, x: x + layer_norm(predict(w, x), 1 + w["gamma"], 0.0, eps)


def titans_pytorch(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor, *,
    predict: Predict, chunk: int, batch: int | None, orthogonalize: bool = False, window: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The neural memory of lucidrains/titans-pytorch, on its keys, queries, values, rates and gates.

    One write per complete chunk, of the loss's *mean* over channels, under gates `[B, N, H]` that belong to chunks;
    gradients at the weights behind the last complete `batch` of tokens, or at the first ones (None). Token t reads the
    weights behind `floor((t + 1) / chunk)` chunks. Newton-Schulz, where asked for, acts on matrices alone and divides by the
    norm, at least 1e-7. Of a `window` of chunks (engineerA314/atlas-pytorch), their last momenta are summed first.
    """
    weights = per_batch(weights, q)
    surprise = {name: torch.zeros_like(w) for name, w in weights.items()}
    opening, behind, momenta = weights, [weights], []
    for n in range(q.shape[1] // chunk):
        start, stop = n * chunk, (n + 1) * chunk
        if batch is not None and start % batch == 0:
            opening = weights
        keys, values, rates = span(k, start, stop), span(v, start, stop), span(lr, start, stop)

        def loss(w: Weights, keys: Tensor = keys, values: Tensor = values, rates: Tensor = rates) -> Tensor:
            return (rates * (predict(w, keys) - values).square().mean(-1)).sum()

        step, new, last = descent(loss, opening), {}, surprise
        surprise = {name: by_head(momentum[:, n], last[name]) * last[name] + step[name] for name in weights}
        momenta.append(surprise)
        for name, w in weights.items():
            update = sum(s[name] for s in momenta[-window:])
            if orthogonalize and w.dim() == 4:
                update = newton_schulz(update, VIEWS, lambda x: x.clamp(min=1e-7))
            new[name] = by_head(1 - decay[:, n], w) * w + update
        weights = new
        behind.append(weights)
    rows = [predict(behind[(t + 1) // chunk], token(q, t)) for t in range(q.shape[1])]
    return tokens(rows), {**weights, **{f"{name}.momentum": s for name, s in surprise.items()}}


def atlas(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor,
    coefficients: Tensor, *, predict: Predict, window: int, batch: int | None,
    phi: Callable[[Tensor, Tensor], Tensor] = monomials, orthogonalize: bool = True, sees: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """`S_t = theta_t S_(t-1) - grad sum_(t-w < i <= t) gamma_i ||M(phi(k_i)) - v_i||^2`, `M_t = alpha_t M_(t-1) + eta_t
    NS5(S_t)`.

    As the equations are told by others, the paper's text not being at hand: where gradients are taken (here at the weights
    that open a batch of tokens, as in Titans, or with None a call) and that they descend is a reading. Token t reads `M_t`,
    or `M_(t-1)` ("past").
    """
    weights = per_batch(weights, q)
    q, k = phi(q, coefficients), phi(k, coefficients)
    surprise = {name: torch.zeros_like(w) for name, w in weights.items()}
    opening, rows = weights, []
    for t in range(q.shape[1]):
        if batch is not None and t % batch == 0:
            opening = weights
        if sees == "past":
            rows.append(predict(weights, token(q, t)))
        first = max(0, t + 1 - window)
        keys, values, rates = (span(x, first, t + 1) for x in (k, v, gamma))

        def loss(w: Weights, keys: Tensor = keys, values: Tensor = values, rates: Tensor = rates) -> Tensor:
            return (rates * (predict(w, keys) - values).square().sum(-1)).sum()

        moved, shape = descent(loss, opening), muon if orthogonalize else lambda x: x
        surprise = {name: gate(theta, t) * surprise[name] + moved[name] for name in weights}
        weights = {name: gate(alpha, t) * weights[name] + gate(eta, t) * shape(surprise[name]) for name in weights}
        if sees == "token":
            rows.append(predict(weights, token(q, t)))
    return tokens(rows), {**weights, **{f"{name}.momentum": s for name, s in surprise.items()}}


# linear recurrences; one matrix S [Dk, Dv] per head


def start_of(state: Tensor, q: Tensor) -> Tensor:
    return state.expand(q.shape[0], *state.shape)


def bound(state: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dot-product loss `-<k S, v>`."""
    return -((k @ state) * v).sum()


def missed(state: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The squared loss `1/2 ||k S - v||^2`."""
    return 0.5 * (k @ state - v).square().sum()


def gated_linear_attention(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`S = a S + k^T v`: simple GLA, RetNet (arXiv 2307.08621), Mamba-2 (2405.21060) by head; GLA (2312.06635) by key
    channel.
    """
    s, rows = start_of(state, q), []
    for t in range(q.shape[1]):
        s = gate(decay, t) * s + descent(lambda m, t=t: bound(m, token(k, t), token(v, t)), s)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def retention_of_retnet(heads: int) -> Tensor:
    """RetNet's constant decay by head, `1 - 2^(-5-h)`."""
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))


def delta_rule(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`S' = a S`, `S = S' - beta grad 1/2 ||k S' - v||^2`.

    DeltaNet (arXiv 2406.06484) without decay; gated DeltaNet (2412.06464) with one by head, KDA (2510.26692) by key channel.
    With n keys, values and betas for each query, DeltaProduct (2502.10297): the decay comes before the first, the read after
    the last.
    """
    s, rows, n = start_of(state, q), [], k.shape[1] // q.shape[1]
    for t in range(q.shape[1]):
        if decay is not None:
            s = gate(decay, t) * s
        for i in range(n * t, n * (t + 1)):
            s = s + gate(beta, i) * descent(lambda m, i=i: missed(m, token(k, i), token(v, i)), s)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def gdn2(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gated DeltaNet 2 (arXiv 2605.22791): `S' = a o S`, `S = S' + k^T (w o v - (b o k) S')`."""
    s, rows = start_of(state, q), []
    for t in range(q.shape[1]):
        s = gate(decay, t) * s
        s = s + token(k, t).mT @ (token(write, t) * token(v, t) - (token(erase, t) * token(k, t)) @ s)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def comba(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Comba (arXiv 2506.02475): `S = a S + beta k^T (v - p S)`, the residual at the state *before* its decay."""
    s, rows = start_of(state, q), []
    for t in range(q.shape[1]):
        s = gate(decay, t) * s + gate(beta, t) * token(k, t).mT @ (token(v, t) - token(p, t) @ s)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def rwkv7(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, removal: Tensor, rate: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """RWKV-7 (arXiv 2503.14456): `S = w o S - (r o x)^T (r S) + k^T v`; r is its removal key, x its in-context rate by
    channel.
    """
    s, rows = start_of(state, q), []
    for t in range(q.shape[1]):
        r, x = token(removal, t), token(rate, t)
        s = gate(decay, t) * s - (r * x).mT @ (r @ s) + token(k, t).mT @ token(v, t)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def preconditioned_delta_rule(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, beta: Tensor, decay: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preconditioned gated DeltaNet (arXiv 2604.21100): `S' = a S`, `S = S' + beta (P o k)^T (v - k S')`; P by channel."""
    s, rows = start_of(state, q), []
    for t in range(q.shape[1]):
        s = gate(decay, t) * s
        s = s + gate(beta, t) * (token(scale, t) * token(k, t)).mT @ (token(v, t) - token(k, t) @ s)
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s}


def momentum_delta_rule(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, lr: Tensor, momentum: Tensor, step_rate: Tensor, decay: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """`D = m D + lr k^T (v - p S)`, `S = a S + eta D`: flash-linear-attention's `momentum_delta_rule`, several fields in
    one.
    """
    s, rows = start_of(state, q), []
    d = torch.zeros_like(s)
    for t in range(q.shape[1]):
        d = gate(momentum, t) * d + gate(lr, t) * token(k, t).mT @ (token(v, t) - token(p, t) @ s)
        s = gate(decay, t) * s + gate(step_rate, t) * d
        rows.append(token(q, t) @ s)
    return tokens(rows), {"out": s, "out.momentum": d}


# LaCT (arXiv 2505.23884) and its descendants


def swiglu(w: Weights, x: Tensor) -> Tensor:
    return (F.silu(x @ w["gate"]) * (x @ w["up"])) @ w["out"]


def channel_norms(weights: Weights) -> dict[str, Tensor]:
    """The L2 norm of what each output channel sums over, `[..., 1, out]`."""
    return {name: w.square().sum(-2, keepdim=True).sqrt() for name, w in weights.items()}


def renormalized(weights: Weights, norms: Weights) -> dict[str, Tensor]:
    return {name: w / (channel_norms({"": w})[""] + 1e-5) * norms[name] for name, w in weights.items()}


def binding_step(weights: Weights, k: Tensor, v: Tensor, rates: Weights) -> dict[str, Tensor]:
    """`sum_i rate_i (-d/dM)` of `-<f(k_i), v_i>` for every matrix, each at its own rates `[B, H, n]`."""
    found = {}
    for name, matrix in weights.items():

        def loss(m: Tensor, name: str = name) -> Tensor:
            return -(rates[name] * (swiglu({**weights, name: m}, k) * v).sum(-1)).sum()

        found[name] = descent(loss, matrix)
    return found


def spans_of(x: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: span(y, start, stop) for name, y in x.items()}


def lact_video(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, lr: Weights, *, block: int, clean: int, orthogonalize: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """LaCT's autoregressive video: the first `block - clean` tokens read the starting weights; then of every `block` tokens
    the first `clean` ones write and all of them read what these wrote. The starting norms carry gradient.
    """
    weights = per_batch(weights, q)
    norms = channel_norms(weights)
    rows = [swiglu(weights, span(q, 0, block - clean))]
    for start in range(block - clean, q.shape[1], block):
        stop = start + clean
        step = binding_step(weights, span(k, start, stop), span(v, start, stop), spans_of(lr, start, stop))
        shaped = {name: muon(g) if orthogonalize else g for name, g in step.items()}
        weights = renormalized({name: weights[name] + shaped[name] for name in weights}, norms)
        rows.append(swiglu(weights, span(q, start, start + block)))
    return tokens(rows), dict(weights)


def zipmap(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, lr: Weights, *, window: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """ZipMap (arXiv 2603.04385): one update from all tokens and all read; streaming, one per window, which its tokens read.

    The starting norms are detached.
    """
    weights = per_batch(weights, q)
    norms = {name: n.detach() for name, n in channel_norms(weights).items()}
    window, rows = window or q.shape[1], []
    for start in range(0, q.shape[1], window):
        stop = start + window
        step = binding_step(weights, span(k, start, stop), span(v, start, stop), spans_of(lr, start, stop))
        weights = renormalized({name: weights[name] + muon(step[name]) for name in weights}, norms)
        rows.append(swiglu(weights, span(q, start, stop)))
    return tokens(rows), dict(weights)


def tttlrm(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, lr: Weights, *,
    chunk: int, strength: float = 0.0, memory: float = 0.5, follow: float = 0.8, joint: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """tttLRM (arXiv 2602.20160), scan "ar": updates chunk after chunk, then every token reads the last weights.

    With a strength, an anchor behind each update: `F <- .5 F + .5 U^2`, `M <- M - lam (1 - F / (max F + 1e-8)) o (M - A)`,
    and behind the norms `A <- .8 A + .2 M`. F and the M that enter A are detached, the first A is not; nor are they by the
    released code's max, which runs over batch and heads (`joint`), and here over one matrix otherwise.
    """
    weights = per_batch(weights, q)
    norms = {name: n.detach() for name, n in channel_norms(weights).items()}
    anchor, importance = dict(weights), {name: torch.zeros_like(w) for name, w in weights.items()}
    for start in range(0, q.shape[1], chunk):
        stop = start + chunk
        step = binding_step(weights, span(k, start, stop), span(v, start, stop), spans_of(lr, start, stop))
        update = {name: muon(g) for name, g in step.items()}
        weights = {name: weights[name] + update[name] for name in weights}
        if strength:
            for name in weights:
                f = memory * importance[name] + (1 - memory) * update[name].detach().square()
                largest = f.max() if joint else f.amax((-2, -1), keepdim=True)
                pull = strength * (1 - f / (largest + 1e-8))
                importance[name] = f
                weights[name] = weights[name] - pull * (weights[name] - anchor[name])
        weights = renormalized(weights, norms)
        anchor = {name: follow * anchor[name] + (1 - follow) * weights[name].detach() for name in weights}
    extra = {f"{name}.importance": f for name, f in importance.items()} | {f"{name}.anchor": a for name, a in anchor.items()}
    return tokens([swiglu(weights, span(q, 0, q.shape[1]))]), {**weights, **(extra if strength else {})}


def elastic_lact(
    weights: Weights, q: Tensor, k: Tensor, v: Tensor, lr: Weights, *,
    chunk: int, sees: str, importance: str, anchor: str, memory: float = 0.5, follow: float = 0.5, strength: float = 0.5,
    first_importance: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Elastic TTT (arXiv 2604.07350): `M' = M + NS(G)`, `F <- al F + (1 - al) imp`, `M'' = M' - lam F o (M' - A)`, norms,
    then A.

    imp is `|U|` ("update"), `U^2` ("squared") or `|U o (M' - A)|` ("path"); A stays ("fixed"), becomes M ("copy") or moves
    `be A + (1 - be) M` ("average"). Norms, F, and the first A are detached, later M in A are not. `sees`: tokens read before
    their chunk's update ("past"), after it ("chunk"), or after all ("full").
    """
    weights = per_batch(weights, q)
    norms = {name: n.detach() for name, n in channel_norms(weights).items()}
    anchors = {name: w.detach() for name, w in weights.items()}
    fisher = {name: torch.full_like(w, first_importance) for name, w in weights.items()}
    rows = []
    for start in range(0, q.shape[1], chunk):
        stop = start + chunk
        if sees == "past":
            rows.append(swiglu(weights, span(q, start, stop)))
        step = binding_step(weights, span(k, start, stop), span(v, start, stop), spans_of(lr, start, stop))
        new = {}
        for name, w in weights.items():
            u = muon(step[name])
            moved = w + u
            u_, away = u.detach(), (moved - anchors[name]).detach()
            imp = {"update": u_.abs(), "squared": u_.square(), "path": (u_ * away).abs()}[importance]
            fisher[name] = memory * fisher[name] + (1 - memory) * imp
            new[name] = moved - strength * fisher[name] * (moved - anchors[name])
        weights = renormalized(new, norms)
        if anchor == "copy":
            anchors = dict(weights)
        elif anchor == "average":
            anchors = {name: follow * anchors[name] + (1 - follow) * weights[name] for name in weights}
        if sees == "chunk":
            rows.append(swiglu(weights, span(q, start, stop)))
    if sees == "full":
        rows = [swiglu(weights, span(q, 0, q.shape[1]))]
    extra = {f"{name}.importance": f for name, f in fisher.items()} | {f"{name}.anchor": a for name, a in anchors.items()}
    return tokens(rows), {**weights, **extra}


def in_place_ttt(weights: Weights, x: Tensor, v: Tensor, *, lr: float, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """In-Place TTT (arXiv 2604.06169): a model's own SwiGLU MLP whose down projection moves by `lr` times minus the gradient
    of `-<f(x), v>` behind each complete chunk, and is read before it.
    """
    weights = per_batch(weights, x)
    rows = []
    for start in range(0, x.shape[1], chunk):
        xs, vs = span(x, start, start + chunk), span(v, start, start + chunk)
        rows.append(swiglu(weights, xs))
        if start + chunk <= x.shape[1]:
            step = descent(lambda m, w=weights, xs=xs, vs=vs: -(swiglu({**w, "out": m}, xs) * vs).sum(), weights["out"])
            weights = {**weights, "out": weights["out"] + lr * step}
    return tokens(rows), {"out": weights["out"]}


def in_place_target(embedded: Tensor, kernel: Tensor, projection: Tensor, *, chunk: int) -> Tensor:
    """Its values: a depthwise convolution of width 5 inside each chunk, zero outside, times P: `[B, T, D]` to `[B, T, D]`.

    Args:
        embedded: `[B, T, D]`, the MLP's input or the token embeddings.
        kernel: `[D, 5]`; token t sees t - 2 to t + 2, no further than its chunk.
        projection: P `[D, D]`, multiplied from the right.
        chunk: tokens.
    """
    rows = []
    for t in range(embedded.shape[1]):
        start = t - t % chunk
        near = [(i, t - 2 + i) for i in range(5) if start <= t - 2 + i < min(start + chunk, embedded.shape[1])]
        rows.append(sum(kernel[:, i] * embedded[:, j] for i, j in near) @ projection)
    return torch.stack(rows, dim=1)


# the systems, with operands


B, H, D = 2, 2, 6
"""Sequences, heads and channels per head of what is drawn."""

Draw = Callable[["Source"], dict[str, Any]]


class Source:
    """Random operands in float64, from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        return F.normalize(self.normal(*shape), dim=-1)

    def matrices(self, **shapes: tuple[int, int]) -> dict[str, Tensor]:
        """Starting weights `[H, in, out]` of variance 1 / in."""
        return {name: self.normal(H, *shape) / shape[0] ** 0.5 for name, shape in shapes.items()}

    def qkv(self, t: int, writes: int = 1) -> dict[str, Tensor]:
        return {"q": self.unit(B, t, H, D), "k": self.unit(B, t * writes, H, D), "v": self.normal(B, t * writes, H, D)}


@dataclass(frozen=True)
class System:
    """A loop, with operands to run it on.

    Attributes:
        name: of the function in `kvbind.systems`, then what varies where there are several.
        loop: takes what `draw` returns and `settings`, returns outputs and state.
        draw: operands, all of which have gradients.
        settings: what the loop takes beside operands.
    """

    name: str
    loop: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    draw: Draw
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def run(self, operands: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loop(**operands, **self.settings)


def draw_ttt(t: int, hidden: int | None) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        if hidden is None:
            weights = source.matrices(out=(D, D)) | {"out_bias": 0.3 * source.normal(H, D)}
        else:
            weights = source.matrices(**{"in": (D, hidden), "out": (hidden, D)})
            weights |= {"in_bias": 0.3 * source.normal(H, hidden), "out_bias": 0.3 * source.normal(H, D)}
        count = torch.arange(t, dtype=torch.float64) % 16 + 1
        return {
            "weights": weights,
            "ln_weight": 1 + 0.3 * source.normal(H, D),
            "ln_bias": 0.3 * source.normal(H, D),
            **source.qkv(t),
            "lr": source.between(0.0, 1.0, B, t, H),
            "reader": (1 / count)[None, :, None] + source.between(0.0, 0.2, B, t, H),
        }

    return draw


def draw_titans(t: int, hidden: int | None) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        shapes = {"out": (D, D)} if hidden is None else {"in": (D, hidden), "out": (hidden, D)}
        return {
            "weights": source.matrices(**shapes),
            **source.qkv(t),
            "theta": source.between(0.0, 0.3, B, t, H),
            "eta": source.between(0.1, 0.9, B, t, H),
            "alpha": source.between(0.0, 0.3, B, t, H),
        }

    return draw


def draw_titans_pytorch(t: int, chunk: int, head: bool, hidden: int = 2 * D) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        weights = source.matrices(**{"in": (D, hidden), "out": (hidden, D)})
        return {
            "weights": weights | ({"gamma": 0.3 * source.normal(H, D)} if head else {}),
            **source.qkv(t),
            "lr": source.between(0.0, 1.0, B, t, H),
            "momentum": source.between(0.1, 0.9, B, t // chunk, H),
            "decay": source.between(0.0, 0.3, B, t // chunk, H),
        }

    return draw


def draw_atlas(t: int, degree: int, hidden: int | None, width: int = 3) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        features = sum(width**i for i in range(degree + 1))
        shapes = {"out": (features, D)} if hidden is None else {"in": (features, hidden), "out": (hidden, D)}
        factorials = torch.cumprod(torch.tensor([1.0, *range(1, degree + 1)], dtype=torch.float64), 0)
        return {
            "weights": source.matrices(**shapes),
            "q": source.unit(B, t, H, width),
            "k": source.unit(B, t, H, width),
            "v": source.normal(B, t, H, D),
            "gamma": source.between(0.0, 1.0, B, t, H),
            "theta": source.between(0.1, 0.9, B, t, H),
            "eta": source.between(0.0, 0.3, B, t, H),
            "alpha": source.between(0.7, 1.0, B, t, H),
            "coefficients": 1 / factorials,
        }

    return draw


def draw_recurrence(t: int, *, key_decay: bool = False, writes: int = 1, beta: bool = True, decay: bool = True) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        found = {"state": source.normal(H, D, D) / D**0.5, **source.qkv(t, writes)}
        if beta:
            found["beta"] = source.between(0.0, 2.0 if writes > 1 else 1.0, B, t * writes, H)
        if decay:
            found["decay"] = source.between(0.5, 1.0, B, t, H, *([D] if key_decay else []))
        return found

    return draw


def draw_more(base: Draw, more: Callable[[Source, dict[str, Any]], dict[str, Any]]) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        found = base(source)
        return {**found, **more(source, found)}

    return draw


T = 21
"""Tokens of a linear recurrence."""

draw_retnet = draw_more(
    draw_recurrence(T, beta=False, decay=False), lambda source, _: {"decay": retention_of_retnet(H).expand(B, T, H)}
)


def draw_mamba2(source: Source) -> dict[str, Any]:
    """Values `dt x`, gates `exp(-A dt)`."""
    found = draw_recurrence(T, beta=False, decay=False)(source)
    dt = F.softplus(source.normal(B, T, H) - 1)
    return {**found, "v": dt[..., None] * found["v"], "decay": (-source.between(0.1, 2.0, H) * dt).exp()}


draw_gdn2 = draw_more(
    draw_recurrence(T, key_decay=True, beta=False),
    lambda source, _: {"erase": source.between(0.0, 1.0, B, T, H, D), "write": source.between(0.0, 1.0, B, T, H, D)},
)
draw_comba = draw_more(draw_recurrence(T), lambda source, found: {"p": 0.7 * found["k"] + 0.2 * source.unit(B, T, H, D)})
draw_rwkv7 = draw_more(
    draw_recurrence(T, key_decay=True, beta=False),
    lambda source, _: {"removal": source.unit(B, T, H, D), "rate": source.between(0.0, 1.0, B, T, H, D)},
)
draw_preconditioned = draw_more(draw_recurrence(T), lambda source, _: {"scale": source.between(0.6, 1.5, B, T, H, D)})
draw_momentum_delta = draw_more(
    draw_recurrence(T, beta=False),
    lambda source, found: {
        "p": found["k"] + 0.3 * source.normal(B, T, H, D),
        "lr": source.between(0.0, 1.0, B, T, H),
        "momentum": source.between(0.1, 0.9, B, T, H),
        "step_rate": source.between(0.1, 0.9, B, T, H),
    },
)


def draw_lact(t: int, hidden: int = 2 * D) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        return {
            "weights": source.matrices(gate=(D, hidden), up=(D, hidden), out=(hidden, D)),
            **source.qkv(t),
            "lr": {name: source.between(0.0, 0.5, B, t, H) for name in ("gate", "up", "out")},
        }

    return draw


def draw_in_place(t: int, hidden: int = 2 * D) -> Draw:
    def draw(source: Source) -> dict[str, Any]:
        weights = source.matrices(gate=(D, hidden), up=(D, hidden), out=(hidden, D))
        return {"weights": weights, "x": source.normal(B, t, H, D), "v": source.normal(B, t, H, D)}

    return draw


SILU, GELU = mlp(F.silu), mlp(F.gelu)

SYSTEMS = [
    System("ttt_linear", ttt, draw_ttt(48, None), {"predict": biased_linear}),
    System("ttt_linear/partial mini-batch", ttt, draw_ttt(41, None), {"predict": biased_linear}),
    System("ttt_mlp", ttt, draw_ttt(32, 4 * D), {"predict": biased_mlp}),
    System("titans/linear", titans, draw_titans(24, None), {"predict": linear, "batch": 8}),
    System("titans/linear, partial batch", titans, draw_titans(T, None), {"predict": linear, "batch": 8}),
    System("titans/MLP", titans, draw_titans(24, 2 * D), {"predict": SILU, "batch": 8}),
    System("titans/MLP, batch 1", titans, draw_titans(10, 2 * D), {"predict": GELU, "batch": 1}),
    System(
        "titans/titans-pytorch, batch of two chunks",
        titans_pytorch,
        draw_titans_pytorch(26, 4, True),
        {"predict": fast_norm(GELU), "chunk": 4, "batch": 8},
    ),
    System(
        "titans/titans-pytorch, no batch, no head",
        titans_pytorch,
        draw_titans_pytorch(26, 4, False),
        {"predict": GELU, "chunk": 4, "batch": None},
    ),
    System(
        "titans/titans-pytorch, window of chunks",
        titans_pytorch,
        draw_titans_pytorch(26, 4, False),
        {"predict": GELU, "chunk": 4, "batch": 8, "window": 3},
    ),
    System("atlas/linear", atlas, draw_atlas(18, 2, None), {"predict": linear, "window": 3, "batch": 6}),
    System("atlas/MLP", atlas, draw_atlas(12, 2, 5), {"predict": SILU, "window": 4, "batch": 6}),
    System("simple_gla", gated_linear_attention, draw_recurrence(T, beta=False)),
    System("retnet", gated_linear_attention, draw_retnet),
    System("mamba2", gated_linear_attention, draw_mamba2),
    System("gla", gated_linear_attention, draw_recurrence(T, beta=False, key_decay=True)),
    System("delta_net", delta_rule, draw_recurrence(T, decay=False)),
    System("gated_delta_net", delta_rule, draw_recurrence(T)),
    System("delta_product", delta_rule, draw_recurrence(T, writes=2)),
    System("delta_product/no decay", delta_rule, draw_recurrence(T, writes=3, decay=False)),
    System("kda", delta_rule, draw_recurrence(T, key_decay=True)),
    System("gdn2", gdn2, draw_gdn2),
    System("comba", comba, draw_comba),
    System("rwkv7", rwkv7, draw_rwkv7),
    System("preconditioned", preconditioned_delta_rule, draw_preconditioned),
    System("momentum_delta_rule", momentum_delta_rule, draw_momentum_delta),
    System("lact_video", lact_video, draw_lact(6 + 2 * 8), {"block": 8, "clean": 2}),
    System("lact_video/Muon", lact_video, draw_lact(4 + 2 * 8), {"block": 8, "clean": 4, "orthogonalize": True}),
    System("zipmap", zipmap, draw_lact(15)),
    System("zipmap/streaming", zipmap, draw_lact(15), {"window": 5}),
    System("tttlrm/full", tttlrm, draw_lact(15), {"chunk": 15}),
    System("tttlrm/ar", tttlrm, draw_lact(15), {"chunk": 5}),
    System("tttlrm/anchor", tttlrm, draw_lact(15), {"chunk": 5, "strength": 0.05, "joint": False}),
    System("tttlrm/anchor, one max", tttlrm, draw_lact(15), {"chunk": 5, "strength": 0.05, "joint": True}),
    *(
        System(
            f"elastic_lact/{importance}, {anchor}",
            elastic_lact,
            draw_lact(15),
            {"chunk": 5, "sees": sees, "importance": importance, "anchor": anchor},
        )
        for importance, sees in (("update", "past"), ("squared", "chunk"), ("path", "full"))
        for anchor in ("fixed", "copy", "average")
    ),
    System("in_place_ttt", in_place_ttt, draw_in_place(22), {"lr": 0.3, "chunk": 6}),
]
"""Every system, small."""
