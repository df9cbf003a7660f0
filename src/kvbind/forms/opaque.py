"""An inner loop as one operator, for what `torch.compile` makes for the CPU, and for `torch.export`.

A compiler that looks inside writes out every chunk and every step of Newton-Schulz: hundreds of nodes for each layer, others
for each length, which take long to compile and hardly gain, as nearly all of them are products. Behind an operator the
forms run as they do uncompiled, with the same rounding; its backward pass runs the forward one again. On GPUs kernels are
operators already.

An exported program holds the operator on every device, wherever an inner loop goes chunk by chunk: so it takes any length,
and runs on kernels where kvbind runs. ONNX, which has no such operator, gets the chunks written out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvbind.forms.evaluate import run as evaluate
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import runs_on
from kvbind.kernels.common.tracing import is_exported, is_for_onnx

STATE = "state."
"""Before the names of tensors that are of the state."""


def takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether a call is being compiled for the CPU, or exported in chunks, and is one that the operator can stand for."""
    if not torch.compiler.is_compiling() or not spec.text:
        return False
    if is_exported():
        if is_for_onnx() or spec.visibility == "full":
            return False
    elif call.q.device.type != "cpu" or runs_on(call.q.device):
        return False
    if "pending.mask" in call.state.tensors or (call.tokens.mask is not None and spec.visibility != "full"):
        return False
    # of a state whose pending tokens have another dtype, the next one's dtypes depend on how many there are
    held, given = call.state.tensors, call.tokens.spread().tensors()
    return all(held[f"pending.{name}"].dtype == x.dtype for name, x in given.items() if f"pending.{name}" in held)


def run(spec: InnerLoop, call: Operands, form: str) -> tuple[Tensor, State]:
    """What `kvbind.forms.evaluate.run` returns, by the operator.

    Args:
        spec: the inner loop.
        call: its operands, which it `takes`.
        form: as `ttt` takes it.
    """
    tensors = {"q": call.q, **call.tokens.spread().tensors()} | {STATE + name: x for name, x in call.state.tensors.items()}
    names, pending = _result_names(spec, call), call.state.pending_lengths
    bounds = None if call.cu_seqlens is None else list(call.cu_seqlens)
    output, *after = inner_loop(
        spec.text, form, list(pending), bounds, ",".join(tensors), ",".join(names), list(tensors.values())
    )
    lengths = (call.q.shape[2],) * len(pending) if bounds is None else tuple(b - a for a, b in pairwise(bounds))
    left = tuple((old + n) % (spec.room + 1) for old, n in zip(pending, lengths, strict=True))
    return output, State(spec, dict(zip(names, after, strict=True)), left)


def _result_names(spec: InnerLoop, call: Operands) -> list[str]:
    """The names of the tensors in the state after a call."""
    names = [name for name in call.state.tensors if not name.startswith("pending.")]
    if spec.room:
        names += [f"pending.{name}" for name in call.tokens.spread().tensors()]
    return names


@lru_cache(maxsize=256)
def _spec_of(text: str) -> InnerLoop:
    return InnerLoop.from_dict(json.loads(text))


def _evaluate(
    text: str,
    form: str,
    pending: Sequence[int],
    bounds: Sequence[int] | None,
    names: str,
    results: str,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs, and the state's tensors in the order of their names; arguments as `inner_loop` takes them."""
    spec, named = _spec_of(text), dict(zip(names.split(","), tensors, strict=True))
    held = {name.removeprefix(STATE): x for name, x in named.items() if name.startswith(STATE)}
    tokens = Tokens.of({name: x for name, x in named.items() if not name.startswith(STATE) and name != "q"})
    sequences = held["weights.out"].shape[0]
    lengths = tuple(pending) * (sequences if len(pending) == 1 else 1)
    call = Operands(named["q"], tokens, State(spec, held, lengths), None if bounds is None else tuple(bounds))
    output, after = evaluate(spec, call, form)  # type: ignore[arg-type]
    return [output, *(after.tensors[name] for name in results.split(","))]


@torch.library.custom_op("kvbind::inner_loop", mutates_args=())
def inner_loop(
    text: str,
    form: str,
    pending: Sequence[int],
    bounds: Sequence[int] | None,
    names: str,
    results: str,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Evaluate an inner loop.

    Args:
        text: `InnerLoop.text`.
        form: as `ttt` takes it.
        pending: how many tokens each sequence has pending, or one number for all.
        bounds: boundaries of packed sequences, or None.
        names: of `tensors`, with commas between them: "q", those of `Tokens.tensors`, and the state's behind `STATE`.
        results: names of the tensors of the state that is returned.
        tensors: heads first.

    Returns:
        Outputs `[B, H, T, Dv]` in the state's dtype, and the state's tensors.
    """
    # nothing returned may share memory with an argument
    found = _evaluate(text, form, pending, bounds, names, results, tensors)
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


@inner_loop.register_fake
def _(
    text: str,
    form: str,
    pending: Sequence[int],
    bounds: Sequence[int] | None,
    names: str,
    results: str,
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    spec, named = _spec_of(text), dict(zip(names.split(","), tensors, strict=True))
    q, v, start = named["q"], named["v"], named[f"{STATE}weights.out"]
    found = [start.new_empty((*q.shape[:3], v.shape[3]))]
    for name in results.split(","):
        part, _, rest = name.partition(".")
        if part == "pending":
            x, room = named[rest], spec.room
            found.append(x.new_empty((start.shape[0], x.shape[1], room, *x.shape[3:])))
        else:
            found.append(torch.empty_like(named[STATE + name], memory_format=torch.contiguous_format))
    return found


_library = torch.library.Library("kvbind", "FRAGMENT")
_library.define(
    "inner_loop_backward(str text, str form, SymInt[] pending, SymInt[]? bounds, str names, str results, Tensor[] tensors, "
    "Tensor[] grads) -> Tensor[]"
)


# below `custom_op`, whose bodies run where nothing can be differentiated
def _backward(
    text: str,
    form: str,
    pending: Sequence[int],
    bounds: Sequence[int] | None,
    names: str,
    results: str,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of all tensors that are floating-point."""
    with torch.enable_grad():
        copies = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
        found = _evaluate(text, form, pending, bounds, names, results, copies)
        moved = [(y, dy) for y, dy in zip(found, grads, strict=True) if y.requires_grad]
        ends, slopes = [y for y, _ in moved], [dy for _, dy in moved]
        leaves = [x for x in copies if x.requires_grad]
        drawn = torch.autograd.grad(ends, leaves, slopes, allow_unused=True, materialize_grads=True)
    return [dx.clone(memory_format=torch.contiguous_format) for dx in drawn]


_library.impl("inner_loop_backward", _backward, "CompositeExplicitAutograd")


def _backward_shapes(
    text: str,
    form: str,
    pending: Sequence[int],
    bounds: Sequence[int] | None,
    names: str,
    results: str,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x.is_floating_point()]


torch.library.register_fake("kvbind::inner_loop_backward", _backward_shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *ctx.fixed, tensors = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(torch.ops.kvbind.inner_loop_backward(*ctx.fixed, list(tensors), list(grads)))
    return *(None for _ in ctx.fixed), [next(found) if x.is_floating_point() else None for x in tensors]


inner_loop.register_autograd(_differentiate, setup_context=_keep)
