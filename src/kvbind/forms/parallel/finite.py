"""What is not finite, kept from whatever does not see it.

A product with a matrix of zeros above its diagonal is causal only while everything is finite: 0 times NaN is NaN, and so are
the gradients of what nobody reads. Here selection takes the place of multiplication by zero:

- `seen_product` is that product, with rows that may not be seen taken out;
- `guarded` and `guarded_packed` run a form on operands without the tokens that hold what is not finite, and make NaN of the
  outputs and states that see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop

Form = Callable[[InnerLoop, Tensor, Tokens, State], tuple[Tensor, State]]


def known_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are known to be finite: looked at on a CPU alone, and not while anything is traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or any(x.device.type != "cpu" for x in tensors):
        return False
    try:
        # a sum is finite only of finite numbers, and takes half as long as looking at each
        return all(math.isfinite(float(x.detach().sum(dtype=_wide(x)))) for x in tensors)
    except RuntimeError:
        # tensors without numbers, as transforms have them
        return False


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def seen_product(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """`weights @ values` of which row i depends on the values that it sees alone, and is NaN where one is not finite.

    Args:
        weights: `[..., n, m]`, 0 where a row does not see a value.
        values: `[..., m, d]`.
        seen: which values each row sees, bool `[n, m]`.
    """
    if known_finite(values):
        return weights @ values
    wrong = ~values.isfinite().all(-1)
    product = weights @ values.masked_fill(wrong[..., None], 0.0)
    return spoilt(product, (seen & wrong[..., None, :]).any(-1)[..., None])


class _Spoilt(torch.autograd.Function):
    """NaN in some places; their gradients are NaN too, but for those of 0, of what nobody reads."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, where: Tensor) -> Tensor:
        return x.masked_fill(where, math.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (where,) = ctx.saved_tensors
        return grad.masked_fill(where & (grad != 0), math.nan), None


def spoilt(x: Tensor, where: Tensor) -> Tensor:
    """`x` with NaN in the places that `where`, which broadcasts to it, marks."""
    marked: Tensor = _Spoilt.apply(x, where)
    return marked


def guarded(form: Form, spec: InnerLoop, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run a form so that outputs depend on what they see alone, gradients included.

    Outputs that see a token of which a number is not finite are NaN, and so are fast weights that it was written to.

    Args:
        form: the form.
        spec: as the form takes it, and so are the others.
        q: what is read.
        tokens: what writes.
        state: where the sequences stopped.
    """
    # a token on its own, as in decoding, has none behind it; on a GPU looking at it would take longer than the token
    alone = q.is_cuda and q.shape[2] == 1 and not torch.is_grad_enabled()
    if alone or known_finite(q, *tokens.tensors().values(), *state.tensors.values()):
        return form(spec, q, tokens, state)
    pending = state.pending()
    old = 0 if pending is None else len(pending)
    started, begun_wrong = _clean_state(state, pending)
    cleaned, wrong = _clean_tokens(tokens)
    read_wrong = ~q.isfinite().all(-1)
    output, after = form(spec, q.masked_fill(read_wrong[..., None], 0.0), cleaned, started)

    per_token = spec.writes
    written = wrong if tokens.mask is None or isinstance(spec.network, DepthwiseConv) else wrong & tokens.mask
    if isinstance(spec.network, DepthwiseConv):
        read_wrong = read_wrong.any(-1, keepdim=True)
    if pending is not None:
        written = torch.cat((_clean_tokens(pending)[1], written), dim=2)
    written = written.unflatten(2, (-1, per_token)).any(-1) if per_token > 1 else written
    sees = begun_wrong | read_wrong | _seen(spec, written, old, q.shape[2])
    total = written.shape[2]
    complete = total if spec.visibility == "full" or spec.span is None else total // spec.span * spec.span
    ends_wrong = begun_wrong[..., 0] | written[:, :, :complete].any(-1)
    return spoilt(output, sees[..., None]), _spoilt_state(spec, after, ends_wrong, written[:, :, complete:])


def guarded_packed(
    form: Form, spec: InnerLoop, q: Tensor, tokens: Tokens, state: State, bounds: tuple[int, ...]
) -> tuple[Tensor, State]:
    """What `guarded` does, of sequences packed into one row, all of whose tokens write and are then read.

    Args:
        form: the form.
        spec: an inner loop with `visibility="token"` and `chunk=1`.
        q: what is read, `[1, H, T, Dk]`.
        tokens: what writes.
        state: where the sequences start.
        bounds: their boundaries.
    """
    if known_finite(q, *tokens.tensors().values(), *state.tensors.values()):
        return form(spec, q, tokens, state)
    started, begun = _clean_state(state, None)
    cleaned, wrong = _clean_tokens(tokens)
    read_wrong = ~q.isfinite().all(-1)
    output, after = form(spec, q.masked_fill(read_wrong[..., None], 0.0), cleaned, started)
    edges = torch.tensor(bounds, device=q.device)
    sequence = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=q.device), edges.diff(), output_size=bounds[-1])
    # how many wrong tokens there are before each boundary, and before each token within its own sequence
    before = torch.nn.functional.pad(wrong.cumsum(-1), (1, 0))[..., edges]
    so_far = wrong.cumsum(-1) - before[..., sequence]
    begun = begun[..., 0].mT[None]
    sees = begun[..., sequence] | read_wrong | (so_far > 0)
    ends = (begun | (before.diff(dim=-1) > 0))[0].mT
    return spoilt(output, sees[..., None]), _spoilt_state(spec, after, ends, wrong[:, :, :0])


def _clean_tokens(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """Tokens with zeros in place of those that hold what is not finite, and which these are, `[B, H, T]`."""
    wrong = ~(tokens.k.isfinite().all(-1) & tokens.v.isfinite().all(-1))
    for x in (*tokens.rates.values(), *tokens.gates.values()):
        if isinstance(x, Tensor):
            finite = x.isfinite()
            wrong = wrong | ~(finite.all(-1) if x.dim() > 3 else finite)
    cleaned = replace(tokens, mask=None).map(lambda x: x.masked_fill(as_factor(wrong, x), 0.0))
    return replace(cleaned, mask=tokens.mask), wrong


def _clean_state(state: State, pending: Tokens | None) -> tuple[State, Tensor]:
    """A state of finite numbers, and of which sequences and heads the fast weights were not, `[B, H, 1]`."""
    held = {name: x for name, x in state.tensors.items() if not name.startswith("pending.")}
    wrong = torch.stack([~x.isfinite().flatten(2).all(-1) for x in held.values()]).any(0)
    tensors = dict(state.tensors) | {name: x.masked_fill(as_factor(wrong, x), 0.0) for name, x in held.items()}
    if pending is not None:
        cleaned, _ = _clean_tokens(Tokens.of(state.group("pending.")))
        tensors |= {f"pending.{name}": x for name, x in cleaned.tensors().items()}
    return State(state.spec, tensors, state.pending_lengths), wrong[..., None]


def _seen(spec: InnerLoop, wrong: Tensor, old: int, queries: int) -> Tensor:
    """Which queries `[B, H, T]` see a wrong token, of writers `[B, H, old + T]`."""
    if spec.visibility == "full" or spec.chunk is None:
        return wrong.any(-1, keepdim=True).expand(*wrong.shape[:2], queries)
    if spec.visibility == "token":
        return (wrong.cumsum(-1) > 0)[..., old:]
    total = wrong.shape[-1]
    padded = torch.nn.functional.pad(wrong, (0, -total % spec.chunk))
    so_far = padded.unflatten(-1, (-1, spec.chunk)).any(-1).cumsum(-1) > 0
    if spec.visibility == "past":
        so_far = torch.nn.functional.pad(so_far, (1, 0))[..., :-1]
    return so_far.repeat_interleave(spec.chunk, dim=-1)[..., old:total]


def _spoilt_state(spec: InnerLoop, state: State, wrong: Tensor, waiting: Tensor) -> State:
    """A state with NaN in the fast weights of some sequences and heads `[B, H]`, and in the keys of pending tokens."""
    tensors = dict(state.tensors)
    for name in spec.updated:
        for full in [f"{part}.{name}" for part in ("weights", "momentum", "accumulated", "window", "anchor", "importance")]:
            if full in tensors:
                tensors[full] = spoilt(tensors[full], as_factor(wrong, tensors[full]))
    if "pending.k" in tensors and waiting.shape[-1]:
        keys = tensors["pending.k"]
        where = torch.nn.functional.pad(waiting, (0, keys.shape[2] - waiting.shape[2]))
        tensors["pending.k"] = spoilt(keys, where[..., None])
    return State(state.spec, tensors, state.pending_lengths)
