"""`kvbind bench peers`: `ttt` beside what a user would write instead, rung by rung, in one process.

The peer of a rung that has a parallel form is that form in ordinary PyTorch under `torch.compile`: chunks by reshaping, two
batched products, `cumsum` (momentum by `cumprod`), Newton-Schulz as batched products in bfloat16. That of rungs 0 and 1 is
the released style of operator: a loop over chunks whose update is compiled. That of mini-batches under squared error is a
loop over them whose dual form is compiled; beside it stands the library's own dual form in PyTorch. The peer of token
visibility is the operator of flash-linear-attention that computes the same, where it is installed; ours is then measured
without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.bench.harness.ceilings import Ceilings, forward_work, measure_ceilings, training_work
from kvbind.bench.harness.device_time import duration, first_line
from kvbind.bench.harness.fla_tuning import compiling_configurations
from kvbind.bench.harness.kernel_switch import FLA, switched, without_kernels
from kvbind.bench.harness.named_operands import NARROW, Leaves, draw_leaves, in_precision, laid_out, run
from kvbind.bench.harness.operands import Size
from kvbind.bench.harness.record import growing, provenance
from kvbind.bench.harness.timing import Work, synchronize
from kvbind.bench.kernels.cases import PASSES
from kvbind.bench.kernels.goals import SIZE, goal_of
from kvbind.bench.kernels.measure import passes
from kvbind.bench.kernels.span_peer import span_peer, span_step
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.on_kernels import fla
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import lact_llm, ladder, named

HOST_SIZE = Size(batch=3, tokens=8192, heads=2, width=192)
"""A call whose launches cost the host more than the device."""

TOKEN_SIZES = {
    "linear_attention": (Size(1, 32768, 12, 128), Size(1, 32768, 24, 64), Size(1, 32768, 6, 256)),
    "delta_net": (Size(1, 32768, 12, 128),),
    "gated_delta_net": (Size(1, 32768, 16, 128),),
    "kda": (Size(1, 32768, 16, 128),),
}
"""The systems under token visibility, and at which sizes."""

MINI_BATCH_SIZES = (Size(1, 4096, 12, 64), Size(1, 32768, 12, 64))
MINI_BATCHES = {"ttt_linear": None, "ttt_mlp": 256, "titans": 64}
"""Systems whose gradients are those of mini-batches, and the hidden width of their fast network."""

Read = Callable[[Leaves], Tensor]


def orthogonal(x: Tensor, coefficients: Sequence[Sequence[float]]) -> Tensor:
    """Newton-Schulz of matrices `[n, M, N]`, in bfloat16."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def gated_features(x: Tensor, leaves: Leaves) -> Tensor:
    """`silu(x W_gate) * (x W_up)` of tokens `[B, H, T, D]`; x itself where there are no such weights."""
    if "weights.gate" not in leaves:
        return x
    gate, up = (leaves[f"weights.{name}"].to(x.dtype) for name in ("gate", "up"))
    return F.silu(x @ gate) * (x @ up)


def parallel_peer(leaves: Leaves, spec: InnerLoop) -> Tensor:
    """The parallel form as one would write it, `[B, T, H, Dv]`."""
    q, k, v = (leaves[name].transpose(1, 2) for name in NARROW)
    batch, heads, length, _ = q.shape
    chunk = spec.chunk or length
    count = length // chunk
    q, k = gated_features(q, leaves), gated_features(k, leaves)
    if "lr.out" in leaves:
        k = (k * leaves["lr.out"].transpose(1, 2)[..., None]).to(v.dtype)

    def chunks(x: Tensor) -> Tensor:
        return x.reshape(batch * heads * count, chunk, -1)

    start = leaves["weights.out"][None, :, None]
    writes = (chunks(k).mT @ chunks(v)).view(batch, heads, count, *start.shape[-2:]).float()
    if "momentum" in leaves:
        gates = leaves["momentum"].transpose(1, 2).reshape(batch, heads, count, -1).mean(-1)
        decay = gates.cumprod(-1)[..., None, None]
        writes = (writes / decay).cumsum(2) * decay
    if spec.orthogonalize:
        writes = orthogonal(writes.flatten(0, 2), spec.orthogonalize.coefficients).view(writes.shape).float()
    states = start + writes.cumsum(2) - writes
    return (chunks(q) @ states.to(q.dtype).flatten(0, 2)).view(batch, heads, length, -1).transpose(1, 2)


def chunk_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, gate: Tensor, held: Tensor, norms: Tensor, spec: InnerLoop,
               every: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One chunk `[B H, C, D]` in the released style: read, then update the weights `[3, B H, D, D]`, gate, up and out."""
    weights, moved = held.unbind(0)
    gate_w, up_w, out_w = weights.to(q.dtype)
    output = (F.silu(q @ gate_w) * (q @ up_w)) @ out_w
    g, up = k @ gate_w, k @ up_w
    hidden = F.silu(g) * up
    grads = torch.zeros_like(weights)
    if every:
        d_hidden = v @ out_w.mT
        sigmoid = torch.sigmoid(g)
        d_gate = d_hidden * up * sigmoid * (1 + g * (1 - sigmoid))
        pairs = ((k, d_gate), (k, d_hidden * F.silu(g)), (hidden, v))
        grads = torch.stack([(x * rate).to(q.dtype).mT @ y for (x, y), rate in zip(pairs, rates, strict=True)]).float()
    else:
        last = ((hidden * rates[2]).to(q.dtype).mT @ v).float()
        grads = torch.cat((grads[:2], last[None]))
    moved = grads + gate * moved
    assert spec.orthogonalize
    chosen = moved if every else moved[2:]
    update = orthogonal(chosen.flatten(0, 1), spec.orthogonalize.coefficients).view(chosen.shape)
    after = weights + update if every else torch.cat((weights[:2], weights[2:] + update))
    after = after / (after.norm(dim=2, keepdim=True) + 1e-5) * norms
    return output, torch.stack((after, moved)), after


def recurrent_peer(leaves: Leaves, spec: InnerLoop, step: Any) -> Tensor:
    """A loop over chunks, each a call of `step`, `[B, T, H, Dv]`."""
    batch, length, heads, width = leaves["q"].shape
    every = spec.update == "all"

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(batch * heads, length, -1)

    q, k, v = (flat(leaves[name]) for name in NARROW)
    given = [leaves.get(f"lr.{name}", leaves["lr.out"]) for name in ("gate", "up", "out")]
    rates = torch.stack([flat(x[..., None]) for x in given])
    weights = torch.stack([leaves[f"weights.{name}"] for name in ("gate", "up", "out")])
    weights = weights[:, None].expand(-1, batch, -1, -1, -1).reshape(3, batch * heads, width, -1)
    norms, held = weights.norm(dim=2, keepdim=True), torch.stack((weights, torch.zeros_like(weights)))
    momentum, outputs = flat(leaves["momentum"][..., None]), []
    chunk = spec.chunk or length
    for at in range(0, length, chunk):
        here = slice(at, at + chunk)
        gate = momentum[:, here].mean(1, keepdim=True)
        output, held, _ = step(q[:, here], k[:, here], v[:, here], rates[:, :, here], gate, held, norms, spec, every)
        outputs.append(output)
    return torch.cat(outputs, 1).view(batch, heads, length, -1).transpose(1, 2)


def fla_peer(leaves: Leaves, spec: InnerLoop) -> Tensor:
    """The operator of flash-linear-attention as its layers call it: gates as logarithms, no state returned.

    Raises:
        ImportError: it is not installed, or another version of it.
    """
    operator = fla.operator_of(spec)
    assert isinstance(operator, fla.Operator)
    function = fla.unusable() or fla.loaded(operator)
    if isinstance(function, str):
        raise ImportError(function)
    named = {name: leaves[name] for name in (*NARROW, "g") if name in leaves}
    if "lr.out" in leaves:
        named["beta"] = leaves["lr.out"]
    start = leaves["weights.out"].expand(leaves["q"].shape[0], -1, -1, -1)
    output: Tensor = function(**named, scale=1.0, initial_state=start)[0]
    return output


def own_form(leaves: Leaves, spec: InnerLoop) -> Tensor:
    """What `ttt` runs without kernels."""
    with without_kernels():
        return run(spec, leaves, "auto")[0]


def peer_leaves(leaves: Leaves, spec: InnerLoop) -> Leaves:
    """Leaves as the peer takes them: flash-linear-attention's layers make the logarithm of a gate."""
    if not by_token(spec) or "retention" not in leaves:
        return leaves
    others = {name: x for name, x in leaves.items() if name != "retention"}
    return others | {"g": leaves["retention"].log()}


def by_token(spec: InnerLoop) -> bool:
    """Whether the peer of an inner loop is an operator of flash-linear-attention."""
    return isinstance(fla.operator_of(spec), fla.Operator)


def peer_of(spec: InnerLoop) -> Read:
    """What a user would run instead of `ttt`; compiled at its first call."""
    if by_token(spec):
        return partial(fla_peer, spec=spec)
    torch.compiler.reset()
    if spec.loss == "squared":
        return partial(span_peer, spec=spec, step=torch.compile(span_step))
    if not parallel_obstacles(spec):
        return torch.compile(partial(parallel_peer, spec=spec))
    return partial(recurrent_peer, spec=spec, step=torch.compile(chunk_step))


@dataclass(frozen=True)
class PeerRow:
    """One call to compare.

    Attributes:
        name: "rung6", "rung6-tokens" with the operands in that layout, "host-rung6", "linear_attention-12x128",
            "mini-titans-4096" of so many tokens.
        rung: of the ladder, or a system of `TOKEN_SIZES` or `MINI_BATCHES`.
        size: of the call.
        chunk: tokens in a chunk.
        layout: of `kvbind.bench.harness.named_operands.LAYOUTS`.
        host: compare what a call costs the host.
        hidden: hidden width, where it is not the keys'.
    """

    name: str
    rung: str
    size: Size
    chunk: int
    layout: str = "heads"
    host: bool = False
    hidden: int | None = None

    @property
    def spec(self) -> InnerLoop:
        """The inner loop."""
        rungs = ladder(lact_llm(self.chunk))
        return rungs[self.rung] if self.rung in rungs else named(self.rung)


def plan(rungs: Sequence[str], size: Size = SIZE, chunk: int = 2048) -> list[PeerRow]:
    """Every rung at the shape of a 760M model's layer, then in the other layout, then small calls, then token by token."""
    parallel = [name for name in rungs if name not in ("rung0", "rung1")]
    rows = [PeerRow(name, name, size, chunk) for name in reversed(rungs)]
    rows += [PeerRow(f"{name}-tokens", name, size, chunk, "tokens") for name in reversed(parallel)]
    rows += [PeerRow(f"host-{name}", name, HOST_SIZE, chunk, host=True) for name in reversed(parallel)]
    if size == SIZE:
        each = [(name, at) for name, sizes in TOKEN_SIZES.items() for at in sizes]
        rows += [PeerRow(f"{name}-{at.heads}x{at.width}", name, at, named(name).chunk or 1, "tokens") for name, at in each]
        rows += [
            PeerRow(f"mini-{name}-{at.tokens}", name, at, 1, "tokens", hidden=hidden)
            for at in MINI_BATCH_SIZES
            for name, hidden in MINI_BATCHES.items()
        ]
    return rows


def host_seconds(work: Work, device: torch.device, rounds: int = 100) -> float:
    """What one call costs the host, the least of three means over calls that do not wait for the device."""
    found = []
    for _ in range(3):
        for _ in range(10):
            work()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(rounds):
            work()
        found.append((time.perf_counter() - begin) / rounds)
        synchronize(device)
    return min(found)


def error_of(found: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def compare(row: PeerRow, ceilings: Ceilings, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The two passes of one row; rates in Mtok/s, times of the host in microseconds."""
    spec, tokens = row.spec, row.size.batch * row.size.tokens
    drawn = draw_leaves(spec, row.size, device, hidden=row.hidden)
    leaves = laid_out(in_precision(drawn, torch.bfloat16, torch.float32), row.layout)
    ours = dict(zip(PASSES, passes(lambda x: run(spec, x, "auto")[0], leaves), strict=True))
    theirs = dict(zip(PASSES, passes(peer_of(spec), peer_leaves(leaves, spec)), strict=True))
    # longer calls of it take seconds
    formed = row.rung in MINI_BATCHES and row.size.tokens <= MINI_BATCH_SIZES[0].tokens
    torchs = dict(zip(PASSES, passes(partial(own_form, spec=spec), leaves), strict=True)) if formed else {}
    need = forward_work(spec, row.size, torch.bfloat16, row.hidden)
    needs = {"forward": need, "training": training_work(need, row.size, torch.bfloat16)}
    form = "recurrent" if parallel_obstacles(spec) else "parallel"
    goal = goal_of(row.rung, form, row.size, row.chunk, "bfloat16")
    kept: list[Tensor] = []
    for name in PASSES:
        found: dict[str, Any] = {
            "name": row.name,
            "pass": name,
            "layout": row.layout,
            **asdict(row.size),
            "chunk": row.chunk,
        }
        found |= timed(row, name, "ours", ours[name], device, seconds, kept)
        found |= timed(row, name, "peer", theirs[name], device, seconds, kept)
        if formed:
            found |= timed(row, name, "form", torchs[name], device, seconds, kept)
        found["limit"] = tokens / needs[name].limit(ceilings) / 1e6
        found["goal"] = getattr(goal, name, None)
        yield found | ratios(found)


def timed(
    row: PeerRow, name: str, who: str, work: Work, device: torch.device, seconds: float, kept: list[Tensor]
) -> dict[str, Any]:
    """The fields of one side of a row, beginning with its name.

    Args:
        row: what is compared.
        name: the pass.
        who: "ours", "peer" or, for the library's form in PyTorch, "form".
        work: the pass of that side.
        device: where it runs.
        seconds: how long to time it, and again as a graph.
        kept: the forward pass's output of ours, for the peer's to be compared with.
    """
    found: dict[str, Any] = {}
    tokens, tuned = row.size.batch * row.size.tokens, who == "peer" and by_token(row.spec) and device.type == "cuda"
    with switched(FLA, "0") if who == "ours" else nullcontext():
        try:
            begin = time.perf_counter()
            with compiling_configurations() if tuned else nullcontext():
                first = work()
            synchronize(device)
            found[f"{who}_first_seconds"] = time.perf_counter() - begin
            if name == "forward" and who == "ours":
                kept.append(first)  # type: ignore[arg-type]
            if name == "forward" and who == "peer" and kept:
                found["difference"] = error_of(first, kept[0])  # type: ignore[arg-type]
            if row.host:
                found[f"{who}_host_us"] = 1e6 * host_seconds(work, device)
                # without the handing over to autograd's thread of the device, which a caller may do without
                with torch.autograd.set_multithreading_enabled(False):
                    found[f"{who}_host_alone_us"] = 1e6 * host_seconds(work, device)
            measured = duration(work, device, seconds=seconds)
            found[f"{who}_plain"] = tokens / measured.seconds / 1e6
            found[f"{who}_graph"] = None if measured.graph_seconds is None else tokens / measured.graph_seconds / 1e6
            if measured.not_capturable:
                found[f"{who}_not_capturable"] = measured.not_capturable
        except Exception as problem:  # one that fails must not stop the others
            found[f"{who}_error"] = first_line(problem)
    return found


def ratios(row: dict[str, Any]) -> dict[str, float | None]:
    """Ours over the peer's and over the form in PyTorch, and ours over the limit."""

    def over(a: str, b: str) -> float | None:
        return row[a] / row[b] if row.get(a) and row.get(b) else None

    return {
        "ratio_plain": over("ours_plain", "peer_plain"),
        "ratio_graph": over("ours_graph", "peer_graph"),
        "ratio_form_plain": over("ours_plain", "form_plain"),
        "ratio_form_graph": over("ours_graph", "form_graph"),
        "of_limit": over("ours_graph", "limit"),
        "plain_of_graph": over("ours_plain", "ours_graph"),
    }


def measured(rows: Sequence[PeerRow], device: torch.device, seconds: float, budget: float) -> Iterator[dict[str, Any]]:
    """Measure rows; the record as it is `growing`.

    Args:
        rows: from `plan`.
        device: where to run.
        seconds: how long to time each pass, and each again as a graph.
        budget: seconds after which no further row is begun.
    """
    deadline, ceilings = time.monotonic() + budget, measure_ceilings(device, torch.bfloat16)
    about = provenance(device, ("triton", *fla.PACKAGES)) | {"ceilings": asdict(ceilings)}

    def found() -> Iterator[dict[str, Any]]:
        for row in rows:
            if time.monotonic() > deadline:
                return
            yield from compare(row, ceilings, device, seconds)

    return growing(about, 2 * len(rows), found())
