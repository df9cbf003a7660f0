"""Inner loops on the kernels of `kvbind.kernels`: which of them a call can take, and how its operands become theirs.

A kernel is taken where it computes the same form of the same inner loop. Its products take operands in q's dtype (bfloat16
or float32) with sums, scans, gates and states in float32; the PyTorch forms first turn operands into float32.
`KVBIND_KERNELS=0` keeps to those.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from kvbind.forms.analysis import parallel_obstacles
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.networks import GLU, MLP, Linear, Network, SwiGLU, gated
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common import runs_on

Engine = Callable[[InnerLoop, Operands], tuple[Tensor, State]]

SHORT_CHUNK = 64
"""Below this many tokens in a chunk, a state for every chunk costs more than attention inside blocks."""

NARROWEST = 16
"""The least width of an operand of a matrix unit."""

DTYPES = (torch.bfloat16, torch.float32)


def engine(spec: InnerLoop, call: Operands, form: str) -> Engine | None:
    """What runs this call on kernels in this form ("recurrent" or "parallel"), or None where nothing does."""
    if not operands_fit(call):
        return None
    if form == "parallel" and chunked_fits(spec):
        return chunked_form
    return None


def takes_packed(spec: InnerLoop, call: Operands, form: str) -> bool:
    """Whether packed sequences of any lengths run in one go: on kernels, where none has tokens pending."""
    fits = form != "recurrent" and not parallel_obstacles(spec) and chunked_fits(spec)
    return fits and not any(call.state.pending_lengths) and operands_fit(call)


def operands_fit(call: Operands) -> bool:
    """Whether kernels run on a call's device, dtypes and widths at all."""
    q, tokens, out = call.q, call.tokens, call.state.tensors["weights.out"]
    if not runs_on(q.device) or q.dtype not in DTYPES or len({q.dtype, tokens.k.dtype, tokens.v.dtype}) > 1:
        return False
    return out.dtype == torch.float32 and min(q.shape[-1], *out.shape[-2:]) >= NARROWEST and q.numel() > 0


def chunked_fits(spec: InnerLoop) -> bool:
    """Whether an inner loop that has a parallel form is one of `kvbind.kernels.chunked`."""
    network = spec.network
    return (
        isinstance(network, Linear | SwiGLU | GLU)
        or (isinstance(network, MLP) and network.depth == 1)
    ) and (
        spec.loss == "dot"
        and not spec.clip
        and not spec.normalize
        and spec.visibility in ("past", "chunk")
        and spec.chunk is not None
        and spec.chunk >= SHORT_CHUNK
        and (spec.orthogonalize is None or orthogonal_dtype(spec.orthogonalize) is not None)
    )  # fmt: skip


def orthogonal_dtype(rule: NewtonSchulz) -> torch.dtype | None:
    """The precision of Newton-Schulz's products as kernels take it, or None where they have no such."""
    return rule.dtype if rule.dtype in (torch.bfloat16, torch.float16, torch.float32) else None


def as_rows(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` as the kernels take it: `[B * T, H, ...]`, channels side by side."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if rows.dim() == 2 or rows.stride(-1) == 1 else rows.contiguous()


def chunked_form(spec: InnerLoop, call: Operands) -> tuple[Tensor, State]:
    """The chunkwise parallel form on kernels.

    Args:
        spec: an inner loop that `chunked_fits`.
        call: its sequences all have equally much pending; packed ones nothing.

    Returns:
        Outputs `[B, H, T, Dv]`, and the state after this call.
    """
    from kvbind.kernels.chunked import chunked
    from kvbind.kernels.spans import TILE, chunked_layout

    assert spec.chunk is not None
    q, tokens, state, bounds = call.q, call.tokens, call.state, call.cu_seqlens
    pending = state.pending()
    joined = tokens if pending is None else pending.append(tokens)
    kept, new, total = 0 if pending is None else len(pending), q.shape[2], len(joined)
    lengths = (new,) * q.shape[0] if bounds is None else tuple(b - a for a, b in itertools.pairwise(bounds))
    fast, network = state.fast, spec.network
    count, heads = len(lengths), q.shape[1]

    theta, shared = theta_of(network, fast)
    start = fast.weights["out"]
    tiles = -(-start.shape[-2] // TILE) * -(-start.shape[-1] // TILE)
    layout = chunked_layout(
        lengths, (kept,) * count, tuple(kept + n for n in lengths), spec.chunk, spec.visibility == "chunk", shared,
        heads * tiles, q.device,
    )  # fmt: skip

    def per_chunk(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else layout.chunk_means(as_rows(gate).float())

    rate, k, v = joined.rates["out"], joined.k, joined.v
    sign, rates = spec.sign, None
    if isinstance(rate, Tensor):
        rates = as_rows(rate).contiguous()
    elif rate != 1:
        rates = torch.full((count and k.shape[0] * total, heads), float(rate), device=k.device)
    gate_of = {x: network.gate(fast.weights, y.float()) for x, y in (("q", q), ("k", k))} if isinstance(network, GLU) else {}
    if gate_of:
        v = gated(gate_of["k"], v.float()).to(v.dtype)
    moving = spec.momentum
    output, end, velocity = chunked(
        as_rows(q), as_rows(k), as_rows(v), layout, dense(start), theta=theta, activation=activation_of(network),
        rates=rates, momentum=per_chunk(joined.momentum), velocity=dense(fast.momentum["out"]) if moving else None,
        retention=per_chunk(joined.retention), coefficients=spec.orthogonalize.coefficients if spec.orthogonalize else (),
        orthogonal_dtype=(spec.orthogonalize and orthogonal_dtype(spec.orthogonalize)) or torch.bfloat16, sign=sign,
    )  # fmt: skip
    after = FastWeights(dict(fast.weights) | {"out": end}, {"out": velocity} if moving else {}, fast.norms)
    shaped = output.unflatten(0, (q.shape[0], new)).transpose(1, 2)
    return gated(gate_of.get("q"), shaped), settle(spec, after, joined, lengths, kept, bounds)


def theta_of(network: Network, fast: FastWeights) -> tuple[Tensor | None, bool]:
    """The matrices before the last, `[1 or 2, S or 1, H, D, F]`, and whether all sequences share them."""
    matrices = [fast.weights[name] for name in network.theta] if isinstance(network, SwiGLU | MLP) else []
    shared = all(x.shape[0] == 1 or x.stride(0) == 0 for x in matrices)
    if not matrices:
        return None, True
    return torch.stack([x[:1] if shared else x for x in matrices]), shared


def activation_of(network: Network) -> str:
    """The activation of a network's features, as kernels name it."""
    return "silu" if isinstance(network, SwiGLU) else network.activation if isinstance(network, MLP) else "identity"


def dense(matrices: Tensor) -> Tensor:
    """Matrices `[S, H, F, Dv]` that are each contiguous; sequences that share one go on doing so."""
    if matrices.stride(-1) == 1 and matrices.stride(-2) == matrices.shape[-1]:
        return matrices
    if matrices.stride(0) == 0:
        return matrices[:1].contiguous().expand(matrices.shape)
    return matrices.contiguous()


def settle(
    spec: InnerLoop, fast: FastWeights, tokens: Tokens, lengths: tuple[int, ...], kept: int, bounds: tuple[int, ...] | None
) -> State:
    """The state after a call: the weights, and the tokens of each sequence's incomplete chunk."""
    assert spec.chunk is not None
    chunk = spec.chunk
    if bounds is None:
        rest = (kept + lengths[0]) % chunk
        return State.of(spec, fast, tokens.span(len(tokens) - rest, len(tokens)), rest)
    rests = [n % chunk for n in lengths]
    spread, device = tokens.spread(), tokens.k.device
    stops, counts = torch.tensor(bounds[1:], device=device), torch.tensor(rests, device=device)
    places = torch.arange(chunk - 1, device=device)
    rows = (stops - counts)[:, None] + places
    there = places < counts[:, None]
    rows = torch.where(there, rows, 0)

    def gather(x: Tensor) -> Tensor:
        picked = x[0][:, rows].transpose(0, 1)
        mask = there[:, None].reshape(there.shape[0], 1, -1, *(1,) * (picked.dim() - 3))
        return torch.where(mask, picked, torch.zeros((), dtype=x.dtype, device=device))

    state = State.of(spec, fast, spread.map(gather) if chunk > 1 else None, 0)
    return State(spec, state.tensors, tuple(rests))
