"""An inner loop as linear attention, in words: its operands, how its state evolves, what outputs read."""

from __future__ import annotations

from kvbind.inner.fields import Retention
from kvbind.inner.networks import GLU, MLP, DepthwiseConv, Linear, SwiGLU
from kvbind.inner.spec import InnerLoop


def operands(spec: InnerLoop) -> dict[str, str]:
    """Effective operands (theorems 5.1 to 5.3), in words of the spec's fields."""
    network, read = spec.network, "q_t" if spec.query == "query" else "k_t"
    moving = spec.update == "all" and bool(network.theta)
    head, apart = network.output_head, "refresh" in spec.extensions
    new, old = ("; Theta_new", "; Theta_p" if apart else "; Theta_c") if moving else ("", "")
    if isinstance(network, Linear | GLU):
        phi_q, phi_k = read, "k_i"
    elif isinstance(network, DepthwiseConv):
        phi_q, phi_k = f"the 3x3 neighbourhood of {read}, per channel", "the 3x3 neighbourhood of k_i, per channel"
    else:
        phi_q, phi_k = f"phi({read}{new})", f"phi(k_i{old})"
    at = "f_p" if apart else "f_c"
    g = "v_i" if spec.loss == "dot" else f"(v_i - {at}({'e_i' if spec.erase else 'k_i'}))"
    if head is not None and head.where != "read":
        g = f"{g} J, with J the slope of the head at k_i"
    if isinstance(network, GLU):
        g = f"{g} * silu(k_i W_gate{',c' if moving else ''})"
    elif network.has_gate:
        g = f"{g} * gate(k_i{old})"
    operands = {
        "q^_t": phi_q,
        "k^_i": phi_k,
        "v^_i": f"{'lr_i' if spec.token_lr else 'lr'} {g}",
        "S_0": "the starting last layer W",
    }
    if isinstance(network, MLP):
        operands["phi"] = " then ".join([f"{network.activation}(x W_{name})" for name in network.theta])
    elif isinstance(network, SwiGLU):
        operands["phi"] = "silu(x W_gate) * (x W_up)"
    if network.has_bias:
        operands["q^_t"], operands["k^_i"] = f"({operands['q^_t']}, 1)", f"({operands['k^_i']}, 1)"
        operands["S_0"] = "the starting last layer W, its bias as a last row"
    if spec.steps > 1:
        operands["k^_i"] += f", written {spec.steps} times over, once per step"
    if spec.writes > 1:
        operands["k^_i"] += f", {spec.writes} of each token, one after another"
    if apart:
        every = "call" if spec.refresh == "call" else f"{spec.refresh} tokens"
        operands["p"] = f"the last renewal of the weights that gradients are taken at, once per {every}"
    return operands


def state_rule(spec: InnerLoop) -> str:
    """How the state goes on from chunk to chunk: `S_c+1 = ...`."""
    of = "the chunk" if spec.window_size == 1 or spec.sums_updates else f"the last {spec.window_size} chunks"
    write = f"sum over {of} of k^_i^T v^_i"
    if spec.momentum:
        write = f"sum over chunks c' <= c of (product of momentum gates after c') {write}"
    if spec.sums_updates:
        write = f"sum over the last {spec.window_size} chunks of ({write})"
    if spec.orthogonalize is not None:
        write = f"NewtonSchulz({write})"
    elif spec.clip:
        write = f"clip({write})"
    if spec.step_rate:
        write = f"eta_c {write}"
    if spec.read_rate:
        return f"S_s'  = S_s {'+' if spec.sign > 0 else '-'} c (sum over the span of {write}), c of its last token"
    kept = "S_c"
    if isinstance(spec.retention, Retention) and spec.retention.per == "key":
        kept = "diag(a_c) S_c"
    elif spec.retention:
        kept = "a_c S_c"
    if spec.decays_before:
        kept += " (which gradients see too)"
    body = f"{kept} {'+' if spec.sign > 0 else '-'} {write}"
    if spec.anchor is not None:
        body = f"({body}), drawn back to its anchor A: (1 - p) S + p A with p = {spec.anchor.strength} w(F) of each weight"
    if spec.normalize is True:
        body = f"({body}) * (starting norm / new norm of each value channel), a decay that depends on the data"
    rows = isinstance(spec.retention, Retention) and spec.retention.per == "key"
    return f"S_c+1 = {body}{', with a gate in a_c for each row' if rows else ''}"


def output_rule(spec: InnerLoop) -> str:
    """What an output reads: `o_t = ...`."""
    gate = "silu(q_t W_gate) * " if isinstance(spec.network, GLU) else "gate(q_t) * " if spec.network.has_gate else ""
    seen = {
        "past": "S_c: the chunks before its own",
        "chunk": "S_c+1: its own chunk included",
        "token": "S_c and its own chunk's tokens up to t",
        "full": "S_1: all tokens that write" if spec.chunk is None else "the last S: all tokens that write",
    }[spec.visibility]
    if spec.read_rate:
        seen = "S_s + c_t (the span's writes up to t)"
    if spec.normalize == "read":
        seen += ", each value channel rescaled to its starting norm"
    head, read = spec.network.output_head, f"{gate}q^_t S"
    if head is not None and head.where != "loss":
        read = f"{'q_t + ' if head.residual else ''}LN({read})"
    return f"o_t   = {read}, with S = {seen}"


def parallel_kind(spec: InnerLoop) -> str:
    """How the parallel form works, of an inner loop that has one."""
    if spec.loss == "squared":
        return "as the delta rule: a triangular solve in each block of tokens (WY), then a scan over blocks"
    parts = ["all writes at once"]
    if spec.momentum:
        parts.append("a first-order scan for momentum")
    if spec.orthogonalize is not None:
        parts.append("one batched Newton-Schulz")
    elif spec.clip:
        parts.append("one batched clipping")
    parts.append("a decayed prefix sum" if spec.retention else "a prefix sum")
    if spec.visibility == "token":
        parts.append("a triangular term inside blocks")
    return ", ".join(parts)
