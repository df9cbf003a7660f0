"""Operands in the layouts that kernels take, and the state that is left of a call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.network import Network, gated
from kvbind.inner.networks import GLU, MLP, SwiGLU
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def as_rows(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` as the kernels take it: `[B * T, H, ...]`, channels side by side."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.dim() == 2 or rows.stride(-1) == 1 else rows.contiguous()


def of_each_token(rate: Tensor | float, tokens: Tokens) -> Tensor:
    """A rate as a tensor `[B, H, T]`; float32 of a number, whatever PyTorch's default dtype is."""
    if isinstance(rate, Tensor):
        return rate
    return torch.full(tokens.k.shape[:3], float(rate), dtype=torch.float32, device=tokens.k.device)


def rate_column(rate: Tensor | float, tokens: Tokens) -> Tensor | None:
    """A rate as kernels take it, `[B, H, T]` float32, zero for tokens that do not write; None for the constant 1."""
    if not isinstance(rate, Tensor) and rate == 1 and tokens.mask is None:
        return None
    rate = of_each_token(rate, tokens)
    return rate if tokens.mask is None else rate * tokens.mask


def glu_operands(network: Network, fast: FastWeights, q: Tensor, tokens: Tokens) -> tuple[Tensor | None, Tokens]:
    """What multiplies the outputs of a GLU, or None for other networks, and its tokens with gated values."""
    if not isinstance(network, GLU):
        return None, tokens
    values = gated(network.gate(fast.weights, tokens.k.float()), tokens.v.float()).to(tokens.v.dtype)
    return network.gate(fast.weights, q.float()), replace(tokens, v=values)


def heads_last(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` to `[B, T, H, ...]`, channels side by side."""
    x = x.transpose(1, 2)
    return x if x.dim() == 3 or x.stride(-1) == 1 else x.contiguous()


def masked_rate(tokens: Tokens, matrix: str) -> Tensor | float:
    """A matrix's rate, a number or `[B, T, H]`, zero for tokens that do not write."""
    rate = tokens.rates[matrix]
    if tokens.mask is None:
        return heads_last(rate) if isinstance(rate, Tensor) else float(rate)
    column = rate_column(rate, tokens)
    assert column is not None
    return heads_last(column).contiguous()


def static_layers(network: Network, fast: FastWeights) -> tuple[Tensor | None, bool]:
    """The matrices before the last, `[1 or 2, S or 1, H, D, F]`, and whether all sequences share them."""
    matrices = [fast.weights[name] for name in network.theta] if isinstance(network, SwiGLU | MLP) else []
    shared = all(x.shape[0] == 1 or x.stride(0) == 0 for x in matrices)
    if not matrices:
        return None, True
    return torch.stack([x[:1] if shared else x for x in matrices]), shared


def activation_of(network: Network) -> str:
    """The activation of a network's features, as kernels name it."""
    return "silu" if isinstance(network, SwiGLU) else network.activation if isinstance(network, MLP) else "identity"


def contiguous_matrices(matrices: Tensor) -> Tensor:
    """Matrices `[S, H, F, Dv]` that are each contiguous; sequences that share one go on doing so."""
    if matrices.stride(-1) == 1 and matrices.stride(-2) == matrices.shape[-1]:
        return matrices
    if matrices.stride(0) == 0:
        return matrices[:1].contiguous().expand(matrices.shape)
    return matrices.contiguous()


def state_after(
    spec: InnerLoop,
    fast: FastWeights,
    tokens: Tokens,
    lengths: tuple[int, ...],
    earlier: tuple[int, ...],
    bounds: tuple[int, ...] | None,
) -> State:
    """The state after a call: the weights, and the tokens of each sequence's incomplete chunk.

    Args:
        spec: the inner loop.
        fast: the weights.
        tokens: what wrote: of each sequence those that were pending and the call's.
        lengths: the call's tokens of each sequence.
        earlier: how many of each were pending before; of packed ones only the first's.
        bounds: boundaries of the call's packed sequences.
    """
    if spec.chunk is None:
        return State.of(spec, fast, None, 0)
    chunk = spec.chunk
    if bounds is None:
        rest = (earlier[0] + lengths[0]) % chunk
        return State.of(spec, fast, tokens.span(len(tokens) - rest, len(tokens)) if rest else tokens, rest)
    rests = [(old + n) % chunk for old, n in zip(earlier, lengths, strict=True)]
    if not any(rests):
        return State.of(spec, fast, tokens, 0)
    spread, device = tokens.spread(), tokens.k.device
    stops, counts = torch.tensor(bounds[1:], device=device) + earlier[0], torch.tensor(rests, device=device)
    places = torch.arange(chunk - 1, device=device)
    rows = (stops - counts)[:, None] + places
    there = places < counts[:, None]
    rows = torch.where(there, rows, 0)

    def gather(x: Tensor) -> Tensor:
        picked = x[0][:, rows].transpose(0, 1)
        mask = there[:, None].reshape(there.shape[0], 1, -1, *(1,) * (picked.dim() - 3))
        return torch.where(mask, picked, torch.zeros((), dtype=x.dtype, device=device))

    state = State.of(spec, fast, spread.map(gather), chunk - 1)
    return State(spec, state.tensors, tuple(rests))
