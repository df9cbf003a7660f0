"""The theorems: every named inner loop, beside the linear attention that is read off it.

Each inner loop runs on random operands in its recurrent form. `kvbind.linearize` reads effective queries, keys, values, the
starting state and all decays off its trajectory, and the linear attention is evaluated from these alone: as a state that
writes add up in, and as a matrix of attention weights applied to the values. Where an inner loop has a parallel form, it is
compared too. In float64 the outputs must be the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbind import GLU, DepthwiseConv, InnerLoop, LinearAttention, explain, linearize, systems
from kvbind.bench.harness.named_operands import NARROW, arguments, draw_leaves, in_precision, run, weights_of
from kvbind.bench.harness.operands import Size
from kvbind.bench.verify.accuracy import relative_error
from kvbind.experiments import plotting
from kvbind.experiments.outcomes.claims import Verdict
from kvbind.experiments.plotting import picture
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.subjects import NONE
from kvbind.inner.gates import decays
from kvbind.inner.value import check_choice

LIMIT, FLOAT32_LIMIT, LEAST_WRITTEN = 1e-10, 1e-3, 0.01
"""Relative errors below which outputs count as the same, and the share of them that writes must make up."""

RULE = (
    f"relative error below {LIMIT:g} in float64 and {FLOAT32_LIMIT:g} in float32 in every case, and writes make up at least "
    f"{LEAST_WRITTEN:.0%} of the outputs"
)


EQUAL = 1e-18
"""Where the figure has outputs that are equal bit for bit."""


@dataclass(frozen=True)
class Setting:
    """The sizes of a check.

    Attributes:
        batch: sequences.
        tokens: per sequence; a square, as the depthwise convolution reads a grid.
        heads: of each sequence.
        width: channels of queries, keys and values, per head.
        hidden: width of fast networks.
        chunk: tokens in a chunk at most; no divisor of `tokens`, so that the last one stays incomplete.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    hidden: int
    chunk: int


SETTINGS = {"smoke": Setting(2, 64, 2, 16, 24, 12), "small": Setting(2, 256, 2, 32, 48, 24)}
"""By scale."""


@dataclass(frozen=True)
class Claim:
    """A theorem, or the part of one that a field of the inner loop brings in.

    Attributes:
        name: short.
        says: the claim, in a sentence.
        concerns: whether it says something of an inner loop.
    """

    name: str
    says: str
    concerns: Callable[[InnerLoop], bool]


CLAIMS = (
    Claim(
        "theorem 5.1", "one step is an attention: each write enters the last layer once", lambda s: s.visibility == "full"
    ),
    Claim("theorem 5.2", "unrolled: features and values along the trajectory", lambda s: s.visibility != "full"),
    Claim(
        "theorem 5.3", "momentum weights each value by what it has released", lambda s: s.momentum and s.visibility != "full"
    ),
    Claim("orthogonalization", "a polynomial maps each update's write", lambda s: s.orthogonalize is not None),
    Claim("weight normalization", "a decay on value channels, on the data's own terms", lambda s: bool(s.normalize)),
    Claim("clipping", "a factor on each update's value channels", lambda s: s.clip),
    Claim("decay", "a factor on the whole state", lambda s: decays(s.gates)[1] is not None),
    Claim("squared error", "values are what the state does not predict yet", lambda s: s.loss == "squared"),
    Claim("gated linear unit", "gates on values and outputs", lambda s: isinstance(s.network, GLU)),
    Claim("depthwise convolution", "sliding-window attention per channel", lambda s: isinstance(s.network, DepthwiseConv)),
    Claim("gradient ascent", "the sign of all values", lambda s: s.direction == "ascent"),
    Claim("key for query", "the effective query is read at the key", lambda s: s.query == "key"),
    Claim("several steps", "each token writes once per step", lambda s: s.steps > 1),
)

PARALLEL = Claim("appendix H", "the parallel form gives the recurrent form's outputs", lambda s: explain(s).parallel)


@dataclass(frozen=True)
class Errors:
    """Relative errors of one precision, against the recurrent form in the same.

    Attributes:
        state: of the linear attention as a state that writes add up in.
        matrix: of its attention weights applied to the values.
        parallel: of the parallel form; None where there is none.
    """

    state: float
    matrix: float
    parallel: float | None

    @property
    def largest(self) -> float:
        """Of the linear attention, in whichever way."""
        return max(self.state, self.matrix)


@dataclass(frozen=True)
class Checked:
    """An inner loop that was checked.

    Attributes:
        spec: the inner loop.
        float64: errors in float64.
        float32: errors in float32.
        written: the norm of what writes bring to the outputs, over that of the outputs.
        operator: the token-mixing weights `[T, T]` of the first sequence and head, averaged over channels.
    """

    spec: InnerLoop
    float64: Errors
    float32: Errors
    written: float
    operator: Tensor


def inner_loops(chunk: int) -> dict[str, InnerLoop]:
    """Every named system, the ladder, the paper's controls, and one step of each system, in chunks of at most `chunk`."""

    def short(spec: InnerLoop) -> InnerLoop:
        return spec if spec.chunk is None else spec.replace(chunk=min(spec.chunk, chunk))

    found = {name: short(make()) for name, make in systems.SYSTEMS.items()}
    full = found["lact_llm"]
    rungs = list(systems.ladder(full).values())
    found |= {f"rung {i} of lact_llm": rung for i, rung in enumerate(rungs) if i > 0}
    found |= {
        "lact_llm, ascent": full.replace(direction="ascent"),
        "lact_llm, key for query": full.replace(query="key"),
        "lact_llm, norms at reads": full.replace(normalize="read"),
        "lact_llm, 4 steps": full.replace(steps=4),
    }
    causal = {name: found[name] for name in systems.SYSTEMS if found[name].visibility != "full"}
    return found | {f"{name}, one step": spec.one_write() for name, spec in causal.items()}


def check(spec: InnerLoop, setting: Setting, seed: int) -> Checked:
    """Run an inner loop in both precisions and compare it with the linear attention that it is."""
    size = Size(setting.batch, setting.tokens, setting.heads, setting.width)
    leaves = draw_leaves(spec, size, torch.device("cpu"), hidden=setting.hidden, dtype=torch.float64, seed=seed)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        own, given = in_dtype(spec, dtype), in_precision(leaves, dtype, dtype)
        expected = run(own, given, "recurrent")[0]
        options = arguments(own, given)
        attention = linearize(own, weights_of(given), *(options.pop(name) for name in NARROW), **options)
        parallel = relative_error(run(own, given, "parallel")[0], expected) if explain(own).parallel else None
        errors[dtype] = Errors(
            relative_error(attention.output().reshape(expected.shape), expected),
            relative_error(attended(attention).reshape(expected.shape), expected),
            parallel,
        )
    written = relative_error(attention.initial_output().reshape(expected.shape), expected)
    return Checked(spec, errors[torch.float64], errors[torch.float32], written, attention.matrix()[0, 0])


def in_dtype(spec: InnerLoop, dtype: torch.dtype) -> InnerLoop:
    """`spec` with its Newton-Schulz, if any, in `dtype`."""
    return spec if spec.orthogonalize is None else spec.replace(orthogonalize=spec.orthogonalize.replace(dtype=dtype))


def attended(attention: LinearAttention) -> Tensor:
    """Attention weights applied to the effective values, and what the starting state gives: `[B, T, H, Dv]`."""
    once = attention.k.shape[1] == attention.q.shape[1]  # with several steps a token writes several values
    weights = attention.matrix if once else attention.weights
    v = attention.v.transpose(1, 2)
    channels = [weights(d) @ v[..., d, None] for d in range(v.shape[-1])]
    mixed = torch.cat(channels, dim=-1).transpose(1, 2) + attention.initial_output()
    return mixed if attention.head is None else attention.head(mixed)


def reproduce(**options: Any) -> dict[str, Any]:
    """Check every theorem on every inner loop, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the operands are random, the same for every task.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a scale other than those of `SETTINGS`, or data or edits, which this has no use for.
    """
    request = Request(**options)
    check_choice("scale", request.scale, tuple(SETTINGS))
    for name in ("data", "overrides", "measure"):
        if getattr(request, name):
            raise ValueError(f"{name} must not be given: theorems trains nothing; got {getattr(request, name)!r}")
    setting = SETTINGS[request.scale]
    out = request.out or Path(f"runs/theorems-{request.scale}")
    out.mkdir(parents=True, exist_ok=True)
    specs = inner_loops(setting.chunk)
    request.say(f"The theorems, scale {request.scale}: {len(specs)} inner loops x {request.seeds} draw(s); report in {out}")
    checked = {name: [check(spec, setting, seed) for seed in range(request.seeds)] for name, spec in specs.items()}

    shown = {name: checks[0] for name, checks in checked.items() if not name.endswith("one step")}
    draw_operators(out / "operators.png", shown)
    draw_errors(out / "errors.png", checked)
    header = ["inner loop", "written", "state\nfloat64", "matrix\nfloat64", "parallel\nfloat64", "largest\nfloat32"]
    lines = [
        [
            name,
            f"{min(x.written for x in checks):.0%}",
            f"{max(x.float64.state for x in checks):.1e}",
            f"{max(x.float64.matrix for x in checks):.1e}",
            NONE if checks[0].float64.parallel is None else f"{max(x.float64.parallel or 0.0 for x in checks):.1e}",
            f"{max(x.float32.largest for x in checks):.1e}",
        ]
        for name, checks in checked.items()
    ]
    findings = Findings(
        experiment="theorems",
        title=f"The theorems, scale {request.scale}",
        lead="Every inner loop is a linear attention: relative errors of its outputs, as that attention gives them, against "
        "the inner loop's own. Written is the share of the outputs that "
        "comes from tokens and not from the starting weights, by norm.",
        config=asdict(setting) | {"seeds": request.seeds},
        data={"task": None, "cases": [as_data(name, checks) for name, checks in checked.items()]},
        verdicts=judge(checked),
        tables={"Each inner loop": (header, lines)},
        pictures={
            "The operators": ("operators.png", "token-mixing weights of every inner loop"),
            "Errors": ("errors.png", "relative errors of every inner loop, by precision"),
        },
    )
    return write_findings(out, request, findings, torch.device("cpu"))


def judge(checked: Mapping[str, list[Checked]]) -> list[Verdict]:
    """A verdict per claim, over every inner loop that it concerns."""
    verdicts = []
    for claim in (*CLAIMS, PARALLEL):
        cases = {name: checks for name, checks in checked.items() if claim.concerns(checks[0].spec)}
        checks = [x for own in cases.values() for x in own]
        if claim is PARALLEL:
            high, low = (
                [e.parallel or 0.0 for e in es] for es in zip(*((x.float64, x.float32) for x in checks), strict=True)
            )
        else:
            high, low = ([e.largest for e in es] for es in zip(*((x.float64, x.float32) for x in checks), strict=True))
        written = min(x.written for x in checks)
        verdicts.append(
            Verdict(
                f"{claim.name}: {claim.says}",
                RULE,
                max(high) < LIMIT and max(low) < FLOAT32_LIMIT and written >= LEAST_WRITTEN,
                f"{max(high):.1e} in float64, {max(low):.1e} in float32, over {len(cases)} inner loops "
                f"(writes make up at least {written:.0%})",
            )
        )
    return verdicts


def as_data(name: str, checks: list[Checked]) -> dict[str, Any]:
    """A case as `results.json` holds it."""
    spec = checks[0].spec
    return {
        "name": name,
        "inner": spec.to_dict(),
        "claims": [claim.name for claim in (*CLAIMS, PARALLEL) if claim.concerns(spec)],
        "obstacles": [str(obstacle) for obstacle in explain(spec).obstacles],
        "draws": [{"written": x.written, "float64": asdict(x.float64), "float32": asdict(x.float32)} for x in checks],
    }


def draw_operators(path: Path, shown: Mapping[str, Checked]) -> None:
    """The token-mixing matrix of every inner loop, small, each to its own scale."""
    columns = 7
    rows = -(-len(shown) // columns)
    with picture(path, 1.55 * columns, 1.8 * rows + 0.5) as fig:
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for ax, (name, case) in zip(axes, shown.items(), strict=False):
            weights = case.operator.numpy()
            # a few large weights would leave the others white
            most = float(np.quantile(np.abs(weights[weights != 0]), 0.98)) if weights.any() else 1.0
            ax.imshow(weights, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
            ax.set_title(name.replace(", ", "\n").replace(" of ", "\nof "), fontsize=8)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            ax.spines[:].set_visible(True)
            ax.spines[:].set_color(plotting.GRID)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        fig.supxlabel(
            "Row t: how much the output at token t holds of each token's effective value; red positive, blue negative, each "
            "panel to its own scale.",
            fontsize=8.5, color=plotting.MUTED,
        )  # fmt: skip


def draw_errors(path: Path, checked: Mapping[str, list[Checked]]) -> None:
    """A line of dots per inner loop on a logarithmic axis: each way of evaluating it, in each precision."""
    names = list(checked)
    kinds = {"state": plotting.BLUE, "matrix": plotting.ORANGE, "parallel": plotting.GREEN}
    with picture(path, 8.6, 0.21 * len(names) + 1.2) as fig:
        ax = fig.subplots()
        for kind, colour in kinds.items():
            for precision, face in (("float64", colour), ("float32", "white")):
                points = [
                    (max(getattr(getattr(x, precision), kind) for x in checks), row)
                    for row, checks in enumerate(checked.values())
                    if getattr(checks[0].float64, kind) is not None
                ]
                ax.plot(
                    [max(x, EQUAL) for x, _ in points], [row for _, row in points], "o", color=colour, markersize=5,
                    markerfacecolor=face, label=f"{kind}, {precision}",
                )  # fmt: skip
        for limit in (LIMIT, FLOAT32_LIMIT):
            ax.axvline(limit, color=plotting.MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_xscale("log")
        places = [10.0**i for i in range(-16, 0, 2)]
        ax.set_xticks([EQUAL, *places], ["equal", *(f"{x:.0e}" for x in places)])
        ax.set_yticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_xlabel("relative error against the recurrent form; dashed: the rule's limits in float64 and float32")
        fig.legend(loc="outside upper center", ncols=3, fontsize=8.5)
