"""The peer of mini-batches under squared error: the dual form of one as a user would write and compile it, in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvbind.bench.harness.named_operands import NARROW, Leaves
from kvbind.inner.activations import activation_of
from kvbind.inner.networks import MLP
from kvbind.inner.spec import InnerLoop


def products_between(gates: Tensor) -> tuple[Tensor, Tensor]:
    """Of gates `[n, L, 1]` the products over every stretch, lower triangular `[n, L, L]`, and those from the start."""
    logs = gates.log().cumsum(1)
    return (logs - logs.mT).exp().tril(), logs.exp()


def span_step(
    q: Tensor, k: Tensor, v: Tensor, rates: Leaves, gates: Leaves, weights: Leaves, buffers: Leaves, spec: InnerLoop
) -> tuple[Tensor, Leaves, Leaves]:
    """One mini-batch `[n, L, D]`: gradients of all its tokens at its starting weights, then what every query reads.

    Args:
        q: what the tokens of n heads read.
        k: keys.
        v: values.
        rates: learning rate of each weight, `[n, L, 1]`.
        gates: likewise: `read_rate`, or `retention` and `momentum`.
        weights: `[n, in, out]` by name.
        buffers: momentum, of those that are updated.
        spec: the inner loop.
    """
    names, head, bias = spec.network.matrices, spec.network.output_head, spec.network.has_bias
    activation = activation_of(spec.network.activation) if isinstance(spec.network, MLP) else None
    low = {name: x.to(q.dtype) for name, x in weights.items()}

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ low[name] + low[f"{name}.bias"] if bias else x @ low[name]

    def act(x: Tensor) -> Tensor:
        return x if activation is None else activation[0](x)

    inputs, before = [k], []
    for name in names[:-1]:
        before.append(layer(name, inputs[-1]))
        inputs.append(act(before[-1]))
    z = layer(names[-1], inputs[-1])
    d = v - (z if head is None else head.apply(weights, z, k))
    if head is not None:
        d = head.pull(weights, z, d)[0]
    written: Leaves = {}
    for i, name in reversed(list(enumerate(names))):
        written[name] = (rates[name] * d).to(q.dtype)
        if bias:
            written[f"{name}.bias"] = rates[f"{name}.bias"] * d
        if i:
            d = d.to(q.dtype) @ low[name].mT
            d = d if activation is None else d * activation[1](before[i - 1])

    if spec.read_rate:
        seen = gates["read_rate"].expand(-1, -1, q.shape[1]).tril()
        on_state = torch.ones_like(gates["read_rate"])
        on_buffer = chain = reach = None
    else:
        keep, on_state = products_between(gates["retention"])
        chain, reach = products_between(gates["momentum"])
        seen, on_buffer = keep @ chain, keep @ reach
    x = q
    for i, name in enumerate(names):
        scores = (seen * (x @ inputs[i].mT)).to(q.dtype)
        z = on_state * layer(name, x) + scores @ written[name]
        if bias:
            z = z + seen @ written[f"{name}.bias"]
        if on_buffer is not None:
            z = z + on_buffer * (x @ buffers[name].to(q.dtype))
        x = (z if name == names[-1] else act(z)).to(q.dtype)
    output = z if head is None else head.apply(weights, z, q)

    after, moved = dict(weights), dict(buffers)
    for i, name in enumerate(names):
        for which, source in ((name, inputs[i]), (f"{name}.bias", torch.ones_like(q[..., :1]))):
            if which not in written:
                continue
            end = (seen[:, -1:].mT * source).to(q.dtype)
            after[which] = on_state[:, -1:] * weights[which] + end.mT @ written[which].to(q.dtype)
            if on_buffer is not None:
                assert chain is not None
                assert reach is not None
                entering = (chain[:, -1:].mT * source).to(q.dtype)
                after[which] = after[which] + on_buffer[:, -1:] * buffers[which]
                moved[which] = reach[:, -1:] * buffers[which] + entering.mT @ written[which].to(q.dtype)
    return output.to(q.dtype), after, moved


def span_peer(leaves: Leaves, spec: InnerLoop, step: Callable[..., Any]) -> Tensor:
    """A loop over mini-batches, each a call of `step`, `[B, T, H, Dv]`."""
    batch, length, heads, _ = leaves["q"].shape
    assert isinstance(spec.refresh, int)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * heads, length, -1)

    def repeated(x: Tensor) -> Tensor:
        x = x if x.dim() == 3 else x.unsqueeze(1)
        return x.repeat(batch, 1, 1)

    tokens = [flat(leaves[name]) for name in NARROW]
    rates = {name: flat(leaves[f"lr.{name}"][..., None]) for name in spec.updated}
    gates = {name: flat(leaves[name][..., None]) for name in spec.gates}
    weights = {name: repeated(leaves[f"weights.{name}"]) for name in spec.network.tensors}
    buffers = {name: torch.zeros_like(weights[name]) for name in spec.updated if spec.momentum}
    outputs = []
    for at in range(0, length, spec.refresh):
        here = slice(at, at + spec.refresh)
        output, weights, buffers = step(
            *(x[:, here] for x in tokens), {name: x[:, here] for name, x in rates.items()},
            {name: x[:, here] for name, x in gates.items()}, weights, buffers, spec,
        )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, 1).view(batch, heads, length, -1).transpose(1, 2)
