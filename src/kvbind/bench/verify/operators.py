"""`kvbind bench verify`: kernels held to the PyTorch forms in float64, at full size.

Three evaluations of one call, on the same rounded operands:

- *reference*: PyTorch's recurrent form in float64 (`KVBIND_KERNELS=0`); under token visibility at full size, where it needs
  a state for every token, the parallel form in float64, which other tests hold to it.
- *ours*: `ttt` as it comes.
- *PyTorch*: the PyTorch form with operands, state and every product in the working precision, from `pytorch_in`.

Newton-Schulz runs in float64 in the reference, in float32 for float32 operands, and for bfloat16 operands in bfloat16, as
released, unless a case says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvbind.bench.harness.device_time import first_line
from kvbind.bench.harness.errors import Evaluation, moves, relative_errors
from kvbind.bench.harness.kernel_switch import FLA, VARIABLE, operators_of, switched, without_kernels
from kvbind.bench.harness.named_operands import Leaves, arguments, draw_leaves, in_precision, laid_out, weights_of
from kvbind.bench.harness.operands import Size
from kvbind.bench.harness.process_pool import spread
from kvbind.bench.harness.record import growing, provenance
from kvbind.bench.harness.timing import release
from kvbind.bench.layers.operators import LayerOperator
from kvbind.bench.verify.cases import FULL, SMALL, VerifyCase, cases
from kvbind.forms.api import ttt
from kvbind.forms.evaluate import Form
from kvbind.forms.on_kernels import fla
from kvbind.forms.parallel.form import parallel
from kvbind.forms.recurrent import recurrent
from kvbind.forms.state import State
from kvbind.forms.validation import Operands, check_operands
from kvbind.inner import systems
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import has_triton, interpreted
from kvbind.precision import matmul_precision

DTYPES = ("float32", "bfloat16")

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Bounds on relative errors in norm."""

TIMES = 2.0
"""Bound in units of PyTorch's own error in the same precision."""

SHAPED_GRADIENT, SHAPED_TIMES = 1e-4, 4.0
"""Both for gradients through Newton-Schulz, which magnifies rounding some hundred times: there the errors of two correct
evaluations differ by more than a factor of two, and PyTorch's own form exceeds it."""

RULES = (
    "float32: output, state and every gradient within 1e-5; through Newton-Schulz output and state within that or twice the "
    "error of PyTorch in float32, gradients within 1e-4 or four times it. bfloat16, float16: all within twice the error of "
    "PyTorch in that precision or 1e-5, output and state also within 1e-2; through Newton-Schulz within twice that error, "
    "gradients within four times it. Norms and pending tokens in the state within 1e-5 always."
)
"""Relative errors in norm; what is not finite breaks them."""


Call = Callable[..., tuple[Tensor, State]]


def evaluate(case: VerifyCase, spec: InnerLoop, leaves: Leaves, slopes: Leaves, form: Form, call: Call) -> Evaluation:
    """Run a case, in the calls that it is cut into, and take the gradients of one number that all results enter.

    Args:
        case: what to run.
        spec: its inner loop, in the precision of this evaluation.
        leaves: with gradients.
        slopes: by which output ("output") and the states' tensors are multiplied.
        form: to run.
        call: `ttt`, or another function of its arguments.
    """
    edges = (0, *case.splits, case.size.tokens)
    state, outputs = None, []
    for start, stop in pairwise(edges):
        given = arguments(spec, leaves, start, stop)
        y, state = call(spec, weights_of(leaves), state=state, form=form, **given, **case.options)
        outputs.append(y)
    assert state is not None
    output = torch.cat(outputs, dim=1)
    results = {"output": output} | {name: x for name, x in state.tensors.items() if moves(name)}
    moved = [name for name, x in results.items() if x.requires_grad]
    grads = torch.autograd.grad(
        [results[name] for name in moved],
        list(leaves.values()),
        [slope_of(slopes, name, results[name]) for name in moved],
        allow_unused=True,
        materialize_grads=True,
    )
    return Evaluation(
        output.detach(),
        {name: x.detach() for name, x in state.tensors.items()},
        dict(zip(leaves, grads, strict=True)),
    )


def on_fla(spec: InnerLoop, weights: Leaves, **given: Any) -> tuple[Tensor, State]:
    """`ttt` on flash-linear-attention's operator.

    Raises:
        RuntimeError: it takes no such call.
    """
    operands: Any = {name: given[name] for name in ("q", "k", "v", "lr")}
    gates = {name: given[name] for name in spec.gates}
    options: Any = {name: given.get(name) for name in ("state", "cu_seqlens", "update_tokens")}
    call = check_operands(spec, weights, gates=gates, **operands, **options)
    reason = fla.obstacle(spec, call)
    if reason is not None:
        raise RuntimeError(reason)
    with switched(FLA, "force"):
        return ttt(spec, weights, **given)


def slope_of(slopes: Leaves, name: str, result: Tensor) -> Tensor:
    """What a result is multiplied by, the same in every precision; drawn when first asked for."""
    if name not in slopes:
        generator = torch.Generator(result.device).manual_seed(len(slopes))
        drawn = torch.randn(result.shape, generator=generator, device=result.device)
        slopes[name] = drawn.to(torch.bfloat16)
    return slopes[name].to(result.dtype)


def pytorch_in(dtype: torch.dtype) -> Call:
    """`ttt` by the PyTorch forms with operands, rates, gates and state in `dtype`, so that every product is too.

    `ttt` itself keeps state, rates and gates in float32 at the least. Packed sequences run one after another, and the
    delta rule under bfloat16 in its recurrent form, as there is no triangular solver for it.
    """

    def call(spec: InnerLoop, weights: Leaves, *, state: State | None, form: Form, **given: Any) -> tuple[Tensor, State]:
        bounds = given.pop("cu_seqlens", None)
        if bounds is not None:
            parts = [
                call(spec, weights, state=None, form=form, **_span(given, start, stop)) for start, stop in pairwise(bounds)
            ]
            return torch.cat([y for y, _ in parts], dim=1), State.cat([after for _, after in parts])
        chosen = given.pop("update_tokens", None)
        q, k, v, lr = (given[name] for name in ("q", "k", "v", "lr"))
        gates = {name: given[name] for name in spec.gates}
        checked = check_operands(spec, weights, q, k, v, lr, gates, state, None, chosen)
        solves = spec.loss == "squared" and dtype == torch.bfloat16
        engine = parallel if form == "parallel" and not solves else recurrent
        low = _cast(checked, dtype)
        output, after = engine(spec, low.q, low.tokens, low.state)
        return output.transpose(1, 2).to(q.dtype), after

    return call


def _span(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Arguments for the tokens of one packed sequence."""

    def cut(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: cut(y) for name, y in x.items()}
        return x[:, start:stop] if isinstance(x, Tensor) else x

    return {name: cut(x) for name, x in given.items()}


def _cast(call: Operands, dtype: torch.dtype) -> Operands:
    # rates that are numbers would join pending ones in float32
    def change(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return replace(call, q=change(call.q), tokens=call.tokens.spread().map(change), state=call.state.map(change))


def problems(errors: dict[str, Any], pytorch: dict[str, Any], dtype: str, *, shaped: bool) -> list[str]:
    """What breaks `RULES`.

    Args:
        errors: ours, from `relative_errors`.
        pytorch: of PyTorch in the same precision.
        dtype: of the operands.
        shaped: the inner loop has Newton-Schulz.
    """
    found = []

    def hold(name: str, error: float, bound: float) -> None:
        # not (error <= bound) is also true of NaN
        if not error <= bound:
            found.append(f"{name}: {error:.1e} > {bound:.1e}")

    def bound(own: float, gradient: bool) -> float:
        if not shaped and dtype == "float32":
            return BOUNDS[dtype]
        if not shaped:
            # some gradients come from float32 alone, whose own errors say little
            by_pytorch = max(TIMES * own, BOUNDS["float32"])
            return by_pytorch if gradient else min(BOUNDS[dtype], by_pytorch)
        by_pytorch = (SHAPED_TIMES if gradient else TIMES) * own
        return by_pytorch if dtype != "float32" else max(SHAPED_GRADIENT if gradient else BOUNDS[dtype], by_pytorch)

    for name in ("output", "state"):
        hold(name, errors[name], bound(pytorch[name], False))
    hold("norms and pending tokens", errors["kept"], BOUNDS["float32"])
    for name, error in errors["gradients"].items():
        hold(f"gradient of {name}", error, bound(pytorch["gradients"][name], True))
    return found


def described(case: VerifyCase | LayerOperator, dtype: str) -> dict[str, Any]:
    """A case as plain data."""
    return {"case": case.name, "dtype": dtype, **case.facts}


Evaluations = tuple[Callable[[], Evaluation], Callable[[], Evaluation], Callable[[], Evaluation]]
"""The reference, PyTorch in the working precision, and ours, to be run."""


def verify(case: VerifyCase | LayerOperator, dtype: str, device: torch.device) -> dict[str, Any]:
    """One case in one dtype: errors of ours and of PyTorch, the operators that ran, and what breaks the rules."""
    narrow = getattr(torch, dtype)
    exact, low, ours = of_piece(case, narrow, device) if isinstance(case, LayerOperator) else of_case(case, narrow, device)
    with without_kernels():
        reference = exact()
        pytorch = relative_errors(low(), reference)
    results: list[Evaluation] = []
    operators = operators_of(lambda: results.append(ours()))
    errors = relative_errors(results[0], reference)
    found = problems(errors, pytorch, dtype, shaped=case.facts["newton_schulz"])
    return described(case, dtype) | {
        "operators": operators, "errors": errors, "pytorch_errors": pytorch, "problems": found, "passed": not found
    }  # fmt: skip


def of_piece(case: LayerOperator, narrow: torch.dtype, device: torch.device) -> Evaluations:
    """Of a piece of the layer, of which PyTorch's is what runs without kernels."""
    leaves = case.draw(device, narrow)
    low = partial(case.evaluate, leaves, narrow)
    return partial(case.evaluate, leaves, torch.float64), low, low


def of_case(case: VerifyCase, narrow: torch.dtype, device: torch.device) -> Evaluations:
    """Of an inner loop."""
    wide, exact = torch.float32, torch.float64
    drawn = draw_leaves(case.spec, case.size, device, hidden=case.hidden, value_width=case.value_width, dtype=exact)
    if case.small_gates:
        generator = torch.Generator(device).manual_seed(0)
        for name in case.spec.gates:
            shape = drawn[name].shape
            drawn[name] = 10 ** (-30 * torch.rand(shape, generator=generator, dtype=exact, device=device).square())
    rounded = laid_out(in_precision(drawn, narrow, wide), case.layout)
    del drawn
    slopes: Leaves = {}

    def of(spec: InnerLoop, form: Form, call: Call, low: torch.dtype, high: torch.dtype) -> Evaluation:
        return evaluate(case, spec, in_precision(rounded, low, high, grad=True), slopes, form, call)

    spec = case.spec_in(narrow)
    return (
        lambda: of(case.spec_in(exact), case.reference, ttt, exact, exact),
        lambda: of(spec, case.form, pytorch_in(narrow), narrow, wide),
        lambda: of(spec, case.form, on_fla if case.fla else ttt, narrow, wide),
    )


def attempt(case: VerifyCase | LayerOperator, dtype: str, device: torch.device) -> dict[str, Any]:
    """`verify`, with TF32 off; a case that fails with an error is a row that says so, and does not stop the others."""
    try:
        with matmul_precision("highest"):
            return verify(case, dtype, device)
    except Exception as problem:  # whatever it is
        return described(case, dtype) | {"passed": False, "problems": [first_line(problem)]}
    finally:
        release()


def _attempt_by_place(place: int, small: bool, dtype: str, device: str) -> dict[str, Any]:
    """`attempt` for processes that are told where a case stands in `cases`."""
    return attempt(cases(SMALL if small else FULL)[place], dtype, torch.device(device))


def attempts(
    chosen: Sequence[tuple[int, str]], device: torch.device, *, small: bool, workers: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Verify cases, in this process or in several that share the device.

    Nearly all of a case's time is Python's, so that several processes finish sooner than one.

    Args:
        chosen: cases by their place in `cases`, with a dtype.
        device: where to run.
        small: as `verified` takes it.
        workers: how many processes; 1 for this one.
        deadline: by `time.monotonic`, after which no further case is begun.

    Yields:
        The row of each case, as they are done.
    """
    listed = cases(SMALL if small else FULL)
    if workers == 1:
        for index, dtype in chosen:
            if time.monotonic() > deadline:
                return
            yield attempt(listed[index], dtype, device)
        return
    jobs = [((index, small, dtype, str(device)), described(listed[index], dtype)) for index, dtype in chosen]
    yield from spread(_attempt_by_place, jobs, workers, deadline)


def verified(
    device: torch.device,
    *,
    dtypes: Sequence[str] | None = None,
    small: bool = False,
    only: str = "",
    budget: float = 540.0,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:
    """Verify every case; the record as it is `growing`.

    Args:
        device: where to run.
        dtypes: of the operands; default all that the device computes in, and what a case asks for besides; float32 alone
            where kernels are interpreted.
        small: sizes for kernels that are interpreted.
        only: run only cases whose name has this in it.
        budget: seconds after which no further case is begun. The record then says `complete: false`.
        workers: processes that share the device.

    Yields:
        The record: where it comes from, the rules, `kernels` (whether any runs on this device; without, there are no rows,
        and `why_off` says why), and a row for each case and dtype.

    Raises:
        ValueError: `only` is in no case's name, or bfloat16 is asked of interpreted kernels.
    """
    deadline = time.monotonic() + budget
    every = dtypes is None and not interpreted()
    if dtypes is None:
        dtypes = DTYPES[:1] if interpreted() else DTYPES
    elif interpreted() and "bfloat16" in dtypes:
        raise ValueError("dtype must be float32 under TRITON_INTERPRET=1, whose bfloat16 arithmetic is not that of a GPU")
    listed = cases(SMALL if small else FULL)
    chosen = [
        (index, dtype)
        for index, case in enumerate(listed)
        if only in case.name
        for dtype in (*dtypes, *(case.also if every and isinstance(case, VerifyCase) else ()))
        if dtype != "float32" or not (isinstance(case, VerifyCase) and case.fla)
    ]
    if not chosen:
        raise ValueError(f"only must be part of a case's name, such as 'rung 2' or 'packed'; got {only!r}")
    reason = why_off(device)
    about = provenance(device, ("triton", *fla.PACKAGES)) | {
        "config": {"small": small, "only": only, "dtypes": list(dtypes)},
        "rules": RULES,
        "kernels": reason is None,
        "why_off": reason,
    }
    rows = attempts(chosen if reason is None else (), device, small=small, workers=workers, deadline=deadline)
    order = {(listed[index].name, dtype): place for place, (index, dtype) in enumerate(chosen)}
    for record in growing(about, len(chosen), rows):
        yield record | {"rows": sorted(record["rows"], key=lambda row: order[row["case"], row["dtype"]])}


def why_off(device: torch.device) -> str | None:
    """Why no kernel runs on this device, found by trying; None where one does."""
    spec = systems.ladder(systems.lact_llm(chunk=64))["rung2"].replace(orthogonalize=NewtonSchulz(dtype=torch.float32))
    leaves = in_precision(draw_leaves(spec, Size(1, 128, 1, 32), device), torch.float32, torch.float32)

    def run() -> object:
        return ttt(spec, weights_of(leaves), form="parallel", **arguments(spec, leaves))

    if operators_of(run):
        return None
    if not has_triton():
        return "Triton is not installed (pip install 'kvbind[gpu]')"
    return f"`ttt` used none (kernels need an NVIDIA GPU, Triton, and {VARIABLE} other than 0)"
