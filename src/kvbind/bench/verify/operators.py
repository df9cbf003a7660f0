"""`kvbind bench verify`: kernels held to the PyTorch forms in float64, at full size.

Three evaluations of one call, on the same rounded operands:

- *reference*: PyTorch's recurrent form in float64 (`KVBIND_KERNELS=0`); under token visibility at full size, where it needs
  a state for every token, the parallel form in float64, which other tests hold to it.
- *ours*: `ttt` as it comes.
- *twin*: the PyTorch form with operands, state and every product in the working precision, from `twin`.

Newton-Schulz runs in float64 in the reference, in float32 for float32 operands, and for bfloat16 operands in bfloat16, as
released, unless a case says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from kvbind.bench.kernels.speed import release
from kvbind.bench.layers.operators import Piece, pieces
from kvbind.forms import fla
from kvbind.forms.analysis import parallel_obstacles
from kvbind.forms.api import Form, ttt
from kvbind.forms.parallel import parallel
from kvbind.forms.recurrent import recurrent
from kvbind.forms.state import State
from kvbind.forms.validation import Operands, check_operands
from kvbind.inner import systems
from kvbind.inner.networks import MLP, Linear, SwiGLU
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common import interpreted
from kvbind.precision import matmul_precision

DTYPES = ("float32", "bfloat16")

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Bounds on relative errors in norm."""

TWINS = 2.0
"""Bound in units of the twin's own error."""

SHAPED_GRADIENT, SHAPED_TWINS = 1e-4, 4.0
"""Both for gradients through Newton-Schulz, which magnifies rounding some hundred times: there the errors of two correct
evaluations differ by more than a factor of two, and PyTorch's own form exceeds it."""

RULES = (
    "float32: output, state and every gradient within 1e-5; through Newton-Schulz output and state within that or twice the "
    "twin's own error, gradients within 1e-4 or four times it. bfloat16, float16: all within twice the twin's own error or "
    "1e-5, output and state also within 1e-2; through Newton-Schulz within twice the twin's own error, gradients within "
    "four times it. Norms and pending tokens in the state within 1e-5 always."
)
"""Relative errors in norm; what is not finite breaks them."""


@dataclass(frozen=True)
class Case:
    """One inner loop at one size.

    Attributes:
        name: of the case.
        spec: the inner loop.
        size: of the call.
        form: that is verified.
        reference: form of the float64 reference.
        hidden: hidden width, where it is not the keys'.
        value_width: width of the values, where it is not the keys'.
        splits: places at which the sequence is cut into calls that hand on their state.
        cu_seqlens: boundaries of packed sequences.
        update_tokens: tokens that write, of visibility "full".
        wide_newton_schulz: Newton-Schulz runs in float32 for bfloat16 operands too.
        small_gates: gates are between 1 and 1e-30, many of them small.
        layout: of queries, keys and values, of `kvbind.bench.harness.named_operands.LAYOUTS`.
        also: dtypes in which it is verified besides `DTYPES`.
        fla: ours is what runs on flash-linear-attention's operator, which takes bfloat16 alone.
    """

    name: str
    spec: InnerLoop
    size: Size
    form: Form
    reference: Form = "recurrent"
    hidden: int | None = None
    value_width: int | None = None
    splits: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...] | None = None
    update_tokens: slice | None = None
    wide_newton_schulz: bool = False
    small_gates: bool = False
    layout: str = "tokens"
    also: tuple[str, ...] = ()
    fla: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `ttt` that are no operands."""
        given = {"cu_seqlens": self.cu_seqlens, "update_tokens": self.update_tokens}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"form": self.form, "reference": self.reference, "newton_schulz": self.spec.orthogonalize is not None}

    def spec_in(self, dtype: torch.dtype) -> InnerLoop:
        """The inner loop for operands of `dtype`."""
        if self.spec.orthogonalize is None:
            return self.spec
        if self.wide_newton_schulz and dtype == torch.bfloat16:
            dtype = torch.float32
        return self.spec.replace(orthogonalize=self.spec.orthogonalize.replace(dtype=dtype))


@dataclass(frozen=True)
class Scale:
    """The sizes that cases are made of.

    Attributes:
        width: of a head; that of the 760M model's layer.
        heads: fast heads.
        chunk: tokens in a chunk.
        narrow: a small width, a power of two.
        odd: a small width that is none.
        many: sequences in a batch of many.
        short: tokens of cases that keep a state for every token or loop over tokens.
        grid: side of an image in tokens.
    """

    width: int
    heads: int
    chunk: int
    narrow: int
    odd: int
    many: int
    short: int
    grid: int


FULL = Scale(width=384, heads=4, chunk=2048, narrow=64, odd=96, many=8, short=293, grid=14)
SMALL = Scale(width=32, heads=2, chunk=64, narrow=16, odd=24, many=2, short=133, grid=8)


def cases(scale: Scale) -> list[Case | Piece]:
    """Everything that is verified: inner loops over four chunks each, or four and an incomplete one; pieces of the layer."""
    s = scale
    found: list[Case | Piece] = []
    chunk, small_chunk = s.chunk, max(s.chunk // 4, 64)
    whole, ragged = 4 * chunk, 4 * chunk + chunk // 3 + 1
    full = Size(1, whole, s.heads, s.width)

    def add(name: str, spec: InnerLoop, size: Size = full, *, both: bool = True, **fields: Any) -> None:
        forms: list[Form] = ["recurrent"]
        if not parallel_obstacles(spec) and spec.visibility != "full":
            forms = ["recurrent", "parallel"] if both else ["parallel"]
        found.extend(Case(f"{name}, {form}", spec, size, form, **fields) for form in forms)

    def at(width: int, batch: int = 1, tokens: int = ragged) -> Size:
        return Size(batch, tokens, s.heads, width)

    rungs = systems.ladder(systems.lact_llm(chunk))
    small = systems.ladder(systems.lact_llm(small_chunk))
    rung0, rung2, rung6 = rungs["rung0"], rungs["rung2"], rungs["rung6"]
    for name, spec in rungs.items():
        add(name.replace("rung", "rung "), spec)
    add("rung 2, Newton-Schulz in float32", rung2, wide_newton_schulz=True)

    for name, spec in (("rung 0", rung0), ("rung 2", rung2), ("rung 6", rung6)):
        add(f"{name}, ragged end", spec, replace(full, tokens=ragged))
        add(f"{name}, visibility chunk", spec.replace(visibility="chunk"), replace(full, tokens=ragged))
        add(f"{name}, ascent", spec.replace(direction="ascent"))
        cuts = (chunk - chunk // 4, chunk - chunk // 4 + 1, 3 * chunk + 1)
        add(f"{name}, state through four calls", spec, replace(full, tokens=ragged), splits=cuts)
        bounds = (0, 1, 1, chunk // 2, 2 * chunk + chunk // 2, ragged)
        add(f"{name}, packed sequences", spec, replace(full, tokens=ragged), cu_seqlens=bounds)
    add("rung 0, reads keys", rung0.replace(query="key"))
    add("rung 0, two steps", rung0.replace(steps=2))
    add("rung 0, norms of what is read", rung0.replace(normalize="read"))
    add("rung 2, norms of what is read", rung2.replace(normalize="read"))
    add("rung 2, clipped", rung2.replace(orthogonalize=None, clip=True))
    add("rung 2, retention", rung2.replace(retention=True))
    add("rung 6, retention and momentum", rung6.replace(retention=True, momentum=True))

    ends = {
        name: replace(at(s.width), tokens=4 * small_chunk + small_chunk // 3 + 1) for name in ("rung0", "rung2", "rung6")
    }
    for name, size in ends.items():
        title = name.replace("rung", "rung ")
        add(f"{title}, width {s.narrow}", small[name], replace(size, width=s.narrow))
        add(f"{title}, width {s.odd}", small[name], replace(size, width=s.odd))
        add(f"{title}, batch {s.many}", small[name], replace(size, width=s.narrow, batch=s.many))
        add(f"{title}, values half as wide", small[name], size, value_width=s.width // 2)
    for name in ("rung0", "rung2"):
        title = name.replace("rung", "rung ")
        add(f"{title}, hidden twice as wide", small[name], ends[name], hidden=2 * s.width)

    plain = InnerLoop(network=SwiGLU(), chunk=small_chunk)
    add("SwiGLU, no shaping", plain.replace(update="last"), ends["rung2"])
    add("MLP, last layer", plain.replace(network=MLP(), update="last", momentum=True), ends["rung2"])
    memory = InnerLoop(network=MLP("silu"), loss="squared", momentum=True, retention=True, chunk=64)
    for name, spec in (
        ("MLP, momentum and retention", memory),
        ("MLP of depth 2, momentum and retention", memory.replace(network=MLP("silu", 2))),
        ("MLP, momentum, retention and orthogonalization", memory.replace(orthogonalize=NewtonSchulz())),
    ):
        add(name, spec, at(s.odd, tokens=s.short))

    # narrow operands of equal chunks are fetched by the accelerator, wherever tokens lie
    three = Size(3, ends["rung2"].tokens, max(s.heads // 2, 1), s.width // 2)
    for title in ("rung 2", "rung 3", "rung 4", "rung 5", "rung 6"):
        spec, short = (of[title.replace(" ", "")] for of in (rungs, small))
        equal: dict[str, Any] = {"both": False, "also": ("float16",)}
        add(f"equal chunks, {title}, head by head", spec, layout="heads", **equal)
        add(f"equal chunks, {title}, visibility chunk", spec.replace(visibility="chunk"), layout="heads", **equal)
        add(f"equal chunks, {title}, three ragged rows", short, three, **equal)
        every = short.replace(retention=True, momentum=True, token_lr=True)
        add(f"equal chunks, {title}, every gate", every, replace(three, tokens=4 * small_chunk), layout="heads", **equal)
        add(f"equal chunks, {title}, every gate, ascent", every.replace(direction="ascent"), three, layout="heads", **equal)

    # the recurrent form keeps a state for every token, or loops over them
    narrow, causal = at(s.narrow, 2, s.short), systems.linear_attention()
    gated = InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True)
    add("linear attention", causal, narrow)
    add("linear attention in chunks", causal.replace(chunk=16, token_lr=True), narrow, both=False)
    add("linear attention, momentum and retention", gated.replace(momentum=True), narrow, both=False)
    add("linear attention, retention", gated, narrow, both=False)
    add("linear attention, retention gates of all sizes", gated, narrow, both=False, small_gates=True)
    for split in (1, 3, 6):
        size = replace(full, heads=split * s.heads, width=s.width // split)
        add(f"linear attention, {size.heads} heads", causal, size, both=False, reference="parallel")
    add("linear attention, state through three calls", causal, narrow, both=False, splits=(1, s.short // 2))
    packed = (0, 3, 3, s.short // 2, s.short)
    add("linear attention, packed sequences", causal, replace(narrow, batch=1), both=False, cu_seqlens=packed)
    add("SwiGLU under token visibility", plain.replace(update="last", visibility="token", chunk=16), narrow, both=False)
    add("DeltaNet", systems.delta_net(), narrow)
    add("DeltaNet with retention", systems.delta_net().replace(retention=True), narrow, both=False)
    add("DeltaNet in chunks", systems.delta_net(16), narrow, both=False)
    add("MLP under squared error, by tokens", systems.delta_net(16).replace(network=MLP("gelu_tanh")), narrow)

    # one state after another is what these are, and the kernels go by chunks
    token = Size(2, s.short, s.heads, 2 * s.narrow)
    packed_delta: dict[str, Any] = {"both": False, "cu_seqlens": packed}
    rules = {
        "delta rule": systems.delta_net(),
        "delta rule, gated": systems.gated_delta_net(),
        "delta rule, erased elsewhere": systems.comba(),
        "delta rule, gates by channel": systems.kda(),
        "delta rule, erased elsewhere by channel": systems.gdn2(),
    }
    for name, spec in rules.items():
        add(name, spec, token, both=False, also=("float16",))
        add(f"{name}, packed sequences", spec, replace(token, batch=1), **packed_delta)
        if spec.retention:
            add(f"{name}, gates of all sizes", spec, token, both=False, small_gates=True)
    add("delta rule, several writes", systems.delta_product(), replace(token, width=s.narrow), both=False)
    add("delta rule, several writes by channel", systems.rwkv7(), replace(token, width=s.narrow), both=False)
    add("delta rule, ascent", rules["delta rule"].replace(direction="ascent"), token, both=False)
    gated_delta, by_channel = rules["delta rule, gated"], rules["delta rule, gates by channel"]
    for name, spec in (("gated", gated_delta), ("gates by channel", by_channel)):
        add(f"delta rule, {name}, head by head", spec, token, both=False, layout="heads")
        add(f"delta rule, {name}, width {s.odd}", spec, replace(token, width=s.odd), both=False)
        add(f"delta rule, {name}, values half as wide", spec, token, both=False, value_width=s.narrow)
        add(f"delta rule, {name}, state through three calls", spec, token, both=False, splits=(2, s.short // 2))
    add("linear attention, retention by channel", systems.gla(), token, both=False)

    views = Size(2, ragged, s.heads, s.width)
    add("LaCT view synthesis", systems.lact_nvs(), views, hidden=2 * s.width, update_tokens=slice(0, whole // 2))
    wide = Size(2, small_chunk * 4, 1, 2 * s.width)
    add(
        "LaCT view synthesis, one wide head",
        systems.lact_nvs(),
        wide,
        hidden=4 * s.width,
        update_tokens=slice(0, 2 * small_chunk),
    )
    image = Size(s.many, s.grid**2, s.heads, s.narrow)
    add("ViTTT, GLU", systems.vittt(), image)
    add("ViTTT, GLU, last layer", systems.vittt().replace(update="last"), image)
    add("GLU in chunks", systems.vittt().replace(visibility="past", chunk=64, update="last"), image)
    add("ViTTT, depthwise convolution", systems.vittt("conv"), replace(image, heads=1))
    return found + fla_cases(narrow) + pieces(ragged, s.heads, s.width)


Call = Callable[..., tuple[Tensor, State]]


def evaluate(case: Case, spec: InnerLoop, leaves: Leaves, slopes: Leaves, form: Form, call: Call) -> Evaluation:
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


def fla_cases(narrow: Size) -> list[Case]:
    """What flash-linear-attention's operators compute, where they are installed.

    Args:
        narrow: a batch of more than one, that keeps a state for every token.
    """
    if fla.unusable() is not None:
        return []
    specs = {
        "linear attention": systems.linear_attention(),
        "simple GLA": systems.simple_gla(),
        "GLA": systems.gla(),
        "DeltaNet": systems.delta_net(),
        "gated DeltaNet": systems.gated_delta_net(),
        "KDA": systems.kda(),
    }
    found = []
    for name, spec in specs.items():
        title, half = f"flash-linear-attention, {name}", narrow.tokens // 2
        found.append(Case(title, spec, narrow, "parallel", fla=True))
        found.append(Case(f"{title}, state through three calls", spec, narrow, "parallel", splits=(2, half), fla=True))
        packed = (0, 3, half, narrow.tokens)
        found.append(
            Case(f"{title}, packed sequences", spec, replace(narrow, batch=1), "parallel", cu_seqlens=packed, fla=True)
        )
    return found


def slope_of(slopes: Leaves, name: str, result: Tensor) -> Tensor:
    """What a result is multiplied by, the same in every precision; drawn when first asked for."""
    if name not in slopes:
        generator = torch.Generator(result.device).manual_seed(len(slopes))
        drawn = torch.randn(result.shape, generator=generator, device=result.device)
        slopes[name] = drawn.to(torch.bfloat16)
    return slopes[name].to(result.dtype)


def twin(dtype: torch.dtype) -> Call:
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


def problems(errors: dict[str, Any], twins: dict[str, Any], dtype: str, *, shaped: bool) -> list[str]:
    """What breaks `RULES`.

    Args:
        errors: ours, from `relative_errors`.
        twins: the twin's.
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
            by_twin = max(TWINS * own, BOUNDS["float32"])
            return by_twin if gradient else min(BOUNDS[dtype], by_twin)
        by_twin = (SHAPED_TWINS if gradient else TWINS) * own
        return by_twin if dtype != "float32" else max(SHAPED_GRADIENT if gradient else BOUNDS[dtype], by_twin)

    for name in ("output", "state"):
        hold(name, errors[name], bound(twins[name], False))
    hold("norms and pending tokens", errors["kept"], BOUNDS["float32"])
    for name, error in errors["gradients"].items():
        hold(f"gradient of {name}", error, bound(twins["gradients"][name], True))
    return found


def described(case: Case | Piece, dtype: str) -> dict[str, Any]:
    """A case as plain data."""
    return {"case": case.name, "dtype": dtype, **case.facts}


Evaluations = tuple[Callable[[], Evaluation], Callable[[], Evaluation], Callable[[], Evaluation]]
"""The reference, the twin and ours, to be run."""


def verify(case: Case | Piece, dtype: str, device: torch.device) -> dict[str, Any]:
    """One case in one dtype: errors of ours and of the twin, the operators that ran, and what breaks the rules."""
    narrow = getattr(torch, dtype)
    exact, low, ours = of_piece(case, narrow, device) if isinstance(case, Piece) else of_case(case, narrow, device)
    with without_kernels():
        reference = exact()
        twins = relative_errors(low(), reference)
    results: list[Evaluation] = []
    operators = operators_of(lambda: results.append(ours()))
    errors = relative_errors(results[0], reference)
    found = problems(errors, twins, dtype, shaped=case.facts["newton_schulz"])
    return described(case, dtype) | {
        "operators": operators, "errors": errors, "twin_errors": twins, "problems": found, "passed": not found
    }  # fmt: skip


def of_piece(case: Piece, narrow: torch.dtype, device: torch.device) -> Evaluations:
    """Of a piece of the layer, whose twin is what runs without kernels."""
    leaves = case.draw(device, narrow)
    low = partial(case.evaluate, leaves, narrow)
    return partial(case.evaluate, leaves, torch.float64), low, low


def of_case(case: Case, narrow: torch.dtype, device: torch.device) -> Evaluations:
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
        lambda: of(spec, case.form, twin(narrow), narrow, wide),
        lambda: of(spec, case.form, on_fla if case.fla else ttt, narrow, wide),
    )


def attempt(case: Case | Piece, dtype: str, device: torch.device) -> dict[str, Any]:
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
        for dtype in (*dtypes, *(case.also if every and isinstance(case, Case) else ()))
        if dtype != "float32" or not (isinstance(case, Case) and case.fla)
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
    return f"`ttt` used none (kernels need an NVIDIA GPU, Triton, and {VARIABLE} other than 0)"
