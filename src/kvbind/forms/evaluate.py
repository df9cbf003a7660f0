"""How a checked call is evaluated: in which form, on kernels or in PyTorch, and which sequences together."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from kvbind.forms.obstacles import best_form
from kvbind.forms.on_kernels import dispatch
from kvbind.forms.parallel.finite import guarded
from kvbind.forms.parallel.form import masks_in_parallel, parallel
from kvbind.forms.parallel.spanwise import in_spans
from kvbind.forms.recurrent import recurrent
from kvbind.forms.state import State
from kvbind.forms.validation import Operands
from kvbind.inner.spec import InnerLoop

Form = Literal["auto", "recurrent", "parallel", "dual"]

FORMS: tuple[Form, ...] = get_args(Form)


def idles(spec: InnerLoop, call: Operands) -> bool:
    """Whether some tokens of causal chunks do not write, which kernels are not made for."""
    return spec.visibility != "full" and (call.tokens.mask is not None or "pending.mask" in call.state.tensors)


def chosen_form(spec: InnerLoop, form: Form, tokens: int) -> Literal["recurrent", "parallel", "dual"]:
    """The form in which this many tokens, pending ones included, are run."""
    if form != "auto":
        return form
    if spec.chunk is None or tokens <= spec.chunk:
        return "recurrent"
    return best_form(spec)


def _evaluate(spec: InnerLoop, call: Operands, form: Form) -> tuple[Tensor, State]:
    """Run a call whose sequences all have equally many pending tokens, on a kernel where one fits.

    Packed sequences of different lengths come here only where `dispatch.takes_packed` says so.
    """
    asked = form
    form, idle = chosen_form(spec, form, call.state.pending_lengths[0] + call.q.shape[2]), idles(spec, call)
    kernels = None if idle else dispatch.engine(spec, call, form)
    if kernels is not None:
        return kernels(spec, call)
    run = recurrent
    if not idle or masks_in_parallel(spec):
        run = {"recurrent": recurrent, "parallel": parallel, "dual": in_spans}[form]
    if run is in_spans and asked == "auto" and torch.compiler.is_compiling():
        # which cannot trace the dual form's bookkeeping
        run = recurrent
    return guarded(run, spec, call.q.to(call.state.dtype), call.tokens, call.state)


def run(spec: InnerLoop, call: Operands, form: Form) -> tuple[Tensor, State]:
    """Run a call, sequences of equal length and equally many pending tokens together."""
    lengths, total = call.state.pending_lengths, call.q.shape[2]
    together = call.cu_seqlens is None or (
        not idles(spec, call) and dispatch.takes_packed(spec, call, chosen_form(spec, form, total))
    )
    if len(set(lengths)) == 1 and together:
        return _evaluate(spec, call, form)

    bounds = call.cu_seqlens or (0, total)
    packed = call.cu_seqlens is not None
    groups = defaultdict(list)
    for i, pending in enumerate(lengths):
        groups[pending, bounds[i + 1] - bounds[i] if packed else total].append(i)

    outputs: dict[int, Tensor] = {}
    states, order = [], []
    for members in groups.values():

        def take(x: Tensor, rows: int = 1, members: list[int] = members) -> Tensor:
            if packed:
                return torch.cat([x[:, :, rows * bounds[i] : rows * bounds[i + 1]] for i in members])
            return x[members]

        part = Operands(take(call.q), call.tokens.map(partial(take, rows=spec.writes)), call.state[members], None)
        output, after = _evaluate(spec, part, form)
        outputs |= dict(zip(members, output.split(1), strict=True))
        states.append(after)
        order += members
    back = sorted(range(len(order)), key=order.__getitem__)
    joined = [outputs[i] for i in range(len(order))]
    return torch.cat(joined, dim=2 if packed else 0), State.cat(states)[back]
