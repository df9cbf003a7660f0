"""`explain`: which linear attention an inner loop is, whether it has a parallel form, and what it costs.

`form="auto"`, `form="parallel"` and `explain` all go by `parallel_obstacles`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kvbind.forms.affine import BLOCK
from kvbind.forms.block_costs import BlockWork, block_work
from kvbind.inner.fields import Retention
from kvbind.inner.networks import GLU, MLP, DepthwiseConv, Linear, SwiGLU
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import RUNGS, ladder
from kvbind.inner.value import Value, check_positive_int


@dataclass(frozen=True)
class Obstacle:
    """One reason why an inner loop has no parallel form.

    Attributes:
        field: the field of `InnerLoop` that stands in the way.
        value: what it is.
        reason: why that makes the map from writes to state non-associative (arXiv 2602.21204, appendix I).
        edit: the fields to `replace` that would remove this obstacle.
    """

    field: str
    value: Any
    reason: str
    edit: dict[str, Any]

    def __str__(self) -> str:
        edit = ", ".join(f"{name}={value!r}" for name, value in self.edit.items())
        return f"{self.field}={self.value!r}: {self.reason}; removed by replace({edit})"


def parallel_obstacles(spec: InnerLoop) -> tuple[Obstacle, ...]:
    """What keeps `spec` from a parallel form; empty where it has one.

    There is one when the map from writes to state is associative: only the last layer is updated, by a loss whose gradient
    does not read the state, once per chunk, without renormalization. The squared error reads the state, linearly where the
    trained part is one ungated matrix and no orthogonalization or clipping acts on the update: the delta rule, which the
    WY representation makes parallel. What else an inner loop has keeps its form where writes simply add up: `erase`, several
    `writes` per token, gates per key channel and before the gradient, `refresh`, windows, rates of steps and readers, a bias
    of the last layer, and a head that outputs alone pass (`kvbind.forms.affine`).
    """
    found = extension_obstacles(spec)
    if spec.update == "all" and spec.network.theta:
        names = " and ".join(spec.network.theta)
        reason = f"the features of each chunk depend on every earlier chunk through the updated {names}, nonlinearly"
        found.append(Obstacle("update", spec.update, reason, {"update": "last"}))
    if spec.normalize is True:
        reason = "each renormalization rescales all earlier writes together: Norm(A + B) is not Norm(A) + Norm(B)"
        found.append(Obstacle("normalize", True, reason, {"normalize": False}))
    elif spec.normalize == "read" and spec.visibility == "token" and spec.chunk != 1:
        reason = "every token reads a state with a norm of its own, which takes a state for every token"
        found.append(Obstacle("normalize", spec.normalize, reason, {"normalize": False}))
    if spec.steps > 1:
        reason = "each step on a chunk starts from the weights that the step before it left"
        found.append(Obstacle("steps", spec.steps, reason, {"steps": 1}))
    if spec.loss == "squared":
        nonlinear = next((name for name in ("orthogonalize", "clip") if getattr(spec, name)), None)
        if spec.normalize == "read":
            nonlinear = "normalize"
        if nonlinear:
            reason = f"its gradient reads the state, and {nonlinear} makes each write a nonlinear function of it"
            found.append(Obstacle("loss", spec.loss, reason, {"loss": "dot"}))
        elif spec.network.has_gate:
            reason = "its gradient reads the state through a gate that differs from channel to channel"
            found.append(Obstacle("loss", spec.loss, reason, {"loss": "dot"}))
    return tuple(found)


def parallel_in_spans(spec: InnerLoop) -> bool:
    """Whether all tokens of a span can be run at once where spans must run in order: the dual form (`kvbind.forms.dual`).

    Gradients may read the state as they like where several updates share the weights that they are taken at, or several
    tokens of a chunk see weights of their own. The network is then a chain of layers, and what a span writes adds up.
    """
    if type(spec.network) not in (Linear, MLP) or spec.visibility == "full" or spec.steps > 1 or spec.writes > 1:
        return False
    if spec.orthogonalize is not None or spec.clip or spec.normalize or spec.anchor is not None:
        return False
    if isinstance(spec.retention, Retention) and spec.retention.per == "key":
        return False
    return spec.refresh not in (None, spec.chunk) or (spec.visibility == "token" and spec.chunk != 1)


def best_form(spec: InnerLoop) -> Literal["recurrent", "parallel", "dual"]:
    """What `form="auto"` runs on more than a chunk."""
    if not parallel_obstacles(spec):
        return "parallel"
    return "dual" if parallel_in_spans(spec) else "recurrent"


_BESIDE = "beside orthogonalize, clip or normalize, for which all writes are shaped at once, it has no parallel form yet"
_SHAPED = ("step_rate", "retention", "window", "network.head")
"""What goes beside orthogonalization, clipping and normalization of reads where writes do not read the state."""
_REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("erase", "writes", "read_rate", "step_rate", "retention", "refresh", "window", "network.bias"), _BESIDE
    ),
    "chunk": "nothing is read before the last write; it has no parallel form yet",
    "anchor": "the pull towards the anchor is a product with an importance that the state itself has made",
    "network.head": "the slope of its normalization reads the state",
}


def extension_obstacles(spec: InnerLoop) -> list[Obstacle]:
    """What of `spec.extensions`, and of a network that applies itself, keeps it from a parallel form."""
    edits: dict[str, Any] = {
        "erase": False, "writes": 1, "read_rate": False, "step_rate": False, "retention": True, "refresh": None, "window": 1,
        "chunk": None, "anchor": None,
    }  # fmt: skip
    found = []
    network = spec.network
    if not network.applies_itself:
        reason = f"{type(network).__name__} has an apply of its own, of which nothing is known"
        found.append(Obstacle("network", network, reason, {"network": Linear()}))
    adds_up = spec.orthogonalize is None and not spec.clip and not spec.normalize
    alike = spec.loss == "dot" and spec.normalize is not True
    for name, value in spec.extensions.items():
        reason = _REASONS[name]
        if name == "network.head" and value.where == "read":
            reason = _BESIDE
        if reason == _BESIDE and (adds_up or (alike and name in _SHAPED)):
            continue
        if name.startswith("network."):
            plain = {field: default for field, default in (("bias", False), ("head", None)) if hasattr(network, field)}
            found.append(Obstacle(name, value, reason, {"network": network.replace(**plain)}))
        elif name == "chunk":
            # what is of several writes goes with them
            others = {other: edits[other] for other in ("refresh", "window") if getattr(spec, other) != edits[other]}
            found.append(Obstacle(name, value, reason, {name: edits[name], **others}))
        else:
            found.append(Obstacle(name, value, reason, {name: edits[name]}))
    return found


class NoParallelFormError(ValueError):
    """A parallel form was asked of an inner loop that has none.

    Args:
        explanation: the whole analysis.
        asked: the argument that asked for it.

    Attributes:
        explanation: the whole analysis.
    """

    def __init__(self, explanation: Explanation, asked: str = "form='parallel'") -> None:
        self.explanation = explanation
        reasons = "\n".join(f"  - {obstacle}" for obstacle in explanation.obstacles)
        super().__init__(f"{asked} needs an inner loop that has a parallel form; this one has none:\n{reasons}")


def sequence_schedule(
    spec: InnerLoop, schedule: Literal["auto", "scan", "ring"] = "auto", form: str = "auto"
) -> Literal["scan", "ring"]:
    """How an inner loop runs over a row that is cut over ranks: all ranks at once and a scan, or rank after rank.

    Args:
        spec: the inner loop.
        schedule: what `kvbind.SequenceShard` asks for.
        form: what `kvbind.ttt` was asked for; "recurrent" leaves the ring.

    Raises:
        ValueError: `visibility="full"`, under which every token sees all others; or "scan" beside `form="recurrent"`, or for
            a network with biases, a window, or a gate of the output, `orthogonalize`, `clip` or `normalize` beside what is
            not in the six lines.
        NoParallelFormError: "scan" for an inner loop that has no parallel form.
    """
    if spec.visibility == "full":
        raise ValueError("sequence parallelism needs a causal inner loop; got visibility='full'")
    obstacles = parallel_obstacles(spec)
    if schedule == "scan" and form == "recurrent":
        raise ValueError("schedule='scan' runs the parallel form; got form='recurrent', which runs in schedule='ring'")
    if schedule == "scan" and obstacles:
        raise NoParallelFormError(explain(spec), "schedule='scan'")
    # what ranks fold of a state is its last layer's matrix, and beyond the six lines by its product with one of features
    shaped = spec.orthogonalize is not None or spec.clip or bool(spec.normalize)
    unfolded = spec.network.has_bias or spec.window_size > 1
    unfolded = unfolded or ((spec.network.has_gate or shaped) and bool(spec.extensions))
    if schedule == "scan" and unfolded:
        names = ", ".join(spec.extensions)
        raise ValueError(
            f"schedule='scan' takes no network with biases, no window, and neither a gate of the output nor orthogonalize, "
            f"clip or normalize beside {names}; got {spec!r}"
        )
    return "ring" if obstacles or unfolded or schedule == "ring" or form == "recurrent" else "scan"


@dataclass(frozen=True, repr=False)
class Shapes(Value):
    """Sizes for which costs are counted; the defaults are a layer of the paper's 760M language model.

    Attributes:
        heads: H.
        key_width: Dk, channels of queries and keys per head.
        value_width: Dv, channels of values per head.
        hidden: Dh, the fast network's hidden width, of every hidden layer.
        tokens: tokens per sequence.
        dtype: of q, k, v and the output.
    """

    heads: int = 4
    key_width: int = 384
    value_width: int = 384
    hidden: int = 384
    tokens: int = 32768
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("heads", "key_width", "value_width", "hidden", "tokens"):
            check_positive_int(name, getattr(self, name))
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype; got {self.dtype!r}")


@dataclass(frozen=True)
class Cost:
    """What one forward pass needs at the least, whatever the form.

    Attributes:
        flops_per_token: floating-point operations of the matrix products per token, all heads; two per multiply-add.
        orthogonalize_flops_per_token: those of Newton-Schulz among them, without use of symmetry.
        bytes_per_token: each of q, k, v read once and the output written once, with rates and gates in float32.
        state_bytes: bytes of one sequence's state: weights, momentum and norms in float32, and pending tokens.
        read: operations of one token's read, in one head.
        write: of all its writes, in one head, without orthogonalization.
        blocks: what the parallel form computes in place of both, per token and head, where it runs in blocks of tokens.
        decode_bytes_per_token: what one more token of one sequence must move in decoding: its operands, every weight once,
            what its share of an update writes, momentum and other copies read and written, and tokens that wait.
    """

    flops_per_token: float
    orthogonalize_flops_per_token: float
    bytes_per_token: float
    state_bytes: int
    read: float
    write: float
    blocks: BlockWork | None
    decode_bytes_per_token: float


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an inner loop's matrix products, all heads; two per multiply-add.

    What is elementwise (activations, gates, rates, norms) is not among them.

    Attributes:
        read: of one token's output, its features included.
        write: of one token's gradients, over all steps, the features at its key included.
        orthogonalize: of one update, over all steps and matrices, without use of symmetry.
    """

    read: float
    write: float
    orthogonalize: float


def work(spec: InnerLoop, shapes: Shapes) -> Work:
    """Operations of the parts that every form of `spec` is made of, at `shapes`."""
    network, h = spec.network, shapes.heads
    dims = network.shapes(shapes.key_width, shapes.value_width, (shapes.hidden,) * network.hidden_layers)
    sizes = {name: math.prod(shape) for name, shape in dims.items()}
    theta, everything = sum(sizes[name] for name in network.theta), sum(sizes.values())

    write = theta + sizes["out"]
    moves_theta = spec.update == "all" and bool(network.theta)
    if spec.loss == "squared" and not (isinstance(network, GLU) and moves_theta):
        # a GLU's gate has its gradient from the same output
        write += sizes["out"]
    if moves_theta:
        first = network.theta[:1] if isinstance(network, MLP) else network.theta
        write += theta + everything - sum(sizes[name] for name in first)
    orthogonalize = 0.0
    if spec.orthogonalize is not None:
        for name in spec.updated:
            short, long = sorted(dims[name])
            orthogonalize += len(spec.orthogonalize.coefficients) * (4 * short**2 * long + 2 * short**3)
    return Work(2 * h * everything, 2 * h * spec.steps * write, h * spec.steps * orthogonalize)


def dual_work(spec: InnerLoop, shapes: Shapes) -> tuple[int, float]:
    """Tokens of a block in the dual form, and the operations that its reads of a block's own writes take per token.

    Every layer of the network has attention of its inputs to those of the keys: scores and their product with the writes.
    """
    span = shapes.tokens if spec.refresh == "call" else spec.span or shapes.tokens
    block = min(span, max(BLOCK, spec.chunk or 1))
    network = spec.network
    dims = network.shapes(shapes.key_width, shapes.value_width, (shapes.hidden,) * network.hidden_layers)
    return block, 2.0 * shapes.heads * block * sum(sum(dims[name]) for name in spec.updated if name in dims)


def training_flops(spec: InnerLoop, shapes: Shapes, written: int | None = None) -> float:
    """Model FLOPs of one training step on one sequence: what its outputs need, forward and backward.

    The backward pass has two products for each of the forward pass, one for either factor's gradient. Nothing that an
    implementation computes again is counted twice, and an update that no token of the sequence sees (that of the last chunk
    under `visibility="past"`) is not counted.

    Args:
        spec: the inner loop.
        shapes: sizes; `shapes.tokens` is the sequence's length.
        written: under `visibility="full"`, how many of the tokens write; default all.

    Raises:
        ValueError: `written` under another visibility, or not from 0 to `shapes.tokens`.
    """
    tokens = shapes.tokens
    if written is not None and spec.visibility != "full":
        raise ValueError(f"written must be None unless visibility is 'full'; got {written} under {spec.visibility!r}")
    if written is not None and not 0 <= written <= tokens:
        raise ValueError(f"written must be from 0 to the number of tokens, {tokens}; got {written}")
    if spec.visibility == "full" or spec.chunk is None:
        seen = tokens if written is None else written
        updates = -(-seen // (spec.chunk or max(seen, 1)))
    elif spec.visibility == "past":
        updates = (tokens - 1) // spec.chunk
        seen = updates * spec.chunk
    else:
        seen, updates = tokens, -(-tokens // spec.chunk)
    parts, seen = work(spec, shapes), seen * spec.writes * (1 if spec.sums_updates else spec.window_size)
    return 3 * (tokens * parts.read + seen * parts.write + updates * parts.orthogonalize)


def cost(spec: InnerLoop, shapes: Shapes) -> Cost:
    """Operations, bytes and state size of `spec` at `shapes`."""
    network, h = spec.network, shapes.heads
    dims = network.shapes(shapes.key_width, shapes.value_width, (shapes.hidden,) * network.hidden_layers)
    sizes = {name: math.prod(shape) for name, shape in dims.items()}
    chunk = min(spec.chunk or shapes.tokens, shapes.tokens)
    parts = work(spec, shapes)
    vectors = network.vector_shapes(shapes.key_width, shapes.value_width, (shapes.hidden,) * network.hidden_layers)
    sizes |= {name: math.prod(shape) for name, shape in vectors.items()}
    updated = sum(sizes[name] for name in spec.updated)
    matrices = [name for name in spec.updated if name in dims]
    channels = sum(math.prod(dims[name]) // math.prod(dims[name][a] for a in network.input_axes) for name in matrices)
    # numbers per token; those of keys are as many as a key has channels
    gates = sum(shapes.key_width if gate.per == "key" else 1 for gate in spec.gates.values())
    rates = len(spec.updated) * spec.token_lr
    width, itemsize = shapes.key_width + shapes.value_width, shapes.dtype.itemsize
    token = width * itemsize + 4 * (len(spec.updated) + gates)
    pending = (chunk - 1) * token if spec.chunk else 0
    if "refresh" in spec.extensions and spec.visibility != "full":
        pending = spec.room * token
    earlier, per_write = spec.window_size - 1, spec.writes * (1 if spec.sums_updates else spec.window_size)
    pending += 0 if spec.sums_updates else earlier * chunk * 4 * (width + len(spec.updated) + spec.erase * shapes.key_width)
    kept = spec.momentum + (spec.normalize == "read") + 2 * (spec.anchor is not None) + spec.sums_updates * earlier
    # a token that completes an update moves all of it; others wait to be part of one, written once and read once
    updates = spec.writes / (spec.chunk or shapes.tokens)
    waits = (
        2 * token * (spec.room > 0) + (0 if spec.sums_updates else earlier) * 4 * (width + len(spec.updated)) * spec.writes
    )
    moved = 4 * (sum(sizes.values()) + updates * updated * (1 + 2 * kept)) + waits
    per_token = 2 * h * width * itemsize + 4 * h * (rates + gates)
    blocks = None
    if not parallel_obstacles(spec):
        theta, (rows, columns) = sum(math.prod(dims[name]) for name in network.theta), dims["out"][-2:]
        blocks = block_work(spec, theta, rows + network.has_bias, columns)
    return Cost(
        flops_per_token=parts.read + per_write * parts.write + spec.writes * parts.orthogonalize / chunk,
        orthogonalize_flops_per_token=spec.writes * parts.orthogonalize / chunk,
        bytes_per_token=per_token,
        state_bytes=h * (4 * (sum(sizes.values()) + updated * kept) + 4 * channels * bool(spec.normalize) + pending),
        read=parts.read / h,
        write=per_write * parts.write / h,
        blocks=blocks,
        decode_bytes_per_token=per_token + h * moved,
    )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `str()` of it is for people.

    Attributes:
        spec: the inner loop.
        operands: the effective query, key, value and starting state of the linear attention it is.
        state_rule: how its state evolves from write to write.
        output_rule: what an output reads.
        obstacles: what stands in the way of a parallel form.
        parallel_kind: how the parallel form works, or None where there is none.
        nearest: the inner loop after every obstacle's edit: `spec` itself where it is parallel.
        shapes: the sizes for which `cost` was counted.
        cost: what a forward pass needs.
    """

    spec: InnerLoop
    operands: dict[str, str]
    state_rule: str
    output_rule: str
    obstacles: tuple[Obstacle, ...]
    parallel_kind: str | None
    nearest: InnerLoop
    shapes: Shapes
    cost: Cost
    linear_attention: bool = field(default=True, init=False)

    @property
    def parallel(self) -> bool:
        """Whether there is a parallel form of whole sequences."""
        return not self.obstacles

    @property
    def form(self) -> Literal["recurrent", "dual", "parallel"]:
        """What `form="auto"` runs on more than a chunk: "dual" is parallel inside spans, which run in order."""
        return best_form(self.spec)

    @property
    def sequence_schedule(self) -> Literal["scan", "ring"] | None:
        """How it runs over a row cut over ranks (`kvbind.SequenceShard`); None where it is not causal."""
        return None if self.spec.visibility == "full" else sequence_schedule(self.spec)

    @property
    def kernels(self) -> str:
        """What runs its parallel form on GPUs, for people; empty where that is PyTorch alone."""
        from kvbind.forms.fused import parallel_kernels  # which goes by this analysis

        return "" if self.obstacles else parallel_kernels(self.spec)

    @property
    def nearest_name(self) -> str | None:
        """The rung of the inner loop's own ladder that `nearest` is, or None."""
        return next((name for name, rung in ladder(self.spec).items() if rung == self.nearest), None)

    def __str__(self) -> str:
        lines = [f"{self.spec!r}", "", "linear attention: yes, exactly"]
        lines += [f"  {name:<5}= {text}" for name, text in self.operands.items()]
        lines += [f"  {self.state_rule}", f"  {self.output_rule}", ""]
        if self.parallel:
            lines.append(f"parallel: yes, {self.parallel_kind}")
        else:
            inside = "inside spans alone, by the dual form, as" if self.form == "dual" else "no, because"
            lines.append(f"parallel: {inside}")
            lines += [f"  - {obstacle}" for obstacle in self.obstacles]
            edits = {name: value for obstacle in self.obstacles for name, value in obstacle.edit.items()}
            edit = ", ".join(f"{name}={value!r}" for name, value in edits.items())
            name = self.nearest_name
            rung = f"{name.replace('rung', 'rung ')} ({RUNGS[name]}), that is, " if name else ""
            lines.append(f"nearest parallel relative: {rung}replace({edit})")
        lines.append(f"over ranks: {_OVER_RANKS[self.sequence_schedule]}")
        if self.kernels:
            lines.append(f"on GPUs: {self.kernels}")
        s, c = self.shapes, self.cost
        among = c.orthogonalize_flops_per_token
        orthogonalization = f", of which orthogonalization {among / 1e6:.3f}" if among else ""
        lines += [
            "",
            f"cost of a forward pass ({s.heads} heads, Dk = {s.key_width}, Dv = {s.value_width}, "
            f"Dh = {s.hidden}, T = {s.tokens}, {str(s.dtype).removeprefix('torch.')}):",
            f"  {c.flops_per_token / 1e6:.3f} MFLOP per token{orthogonalization}",
            f"  {c.read / 1e3:.1f} kFLOP of a token's read and {c.write / 1e3:.1f} of its writes, per head",
        ]
        if c.blocks is not None:
            b = c.blocks
            solve = f", triangular systems {b.system / 1e3:.1f}" if b.system else ""
            lines.append(
                f"  {b.total / 1e3:.1f} in their place in blocks of {b.columns} writes: states and features "
                f"{(b.states + b.features) / 1e3:.1f}, pairs {(b.scores + b.gates) / 1e3:.1f}{solve}"
            )
        lines += [
            f"  {c.bytes_per_token / 1e3:.2f} kB moved per token",
            f"  {c.decode_bytes_per_token / 1e3:.1f} kB moved for one more token in decoding, state included",
            f"  {c.state_bytes / 2**20:.2f} MiB of state per sequence, whatever its length",
        ]
        if self.form == "dual":
            block, flops = dual_work(self.spec, s)
            lines.append(
                f"  {flops / 1e6:.3f} MFLOP per token besides, in the dual form: attention in blocks of {block} tokens"
            )
        return "\n".join(lines)


_OVER_RANKS = {
    "scan": "all at once, with an exclusive scan of states across ranks",
    "ring": "one after another, each from the state of the one before",
    None: "no, every token sees all others",
}


def explain(spec: InnerLoop, shapes: Shapes | None = None) -> Explanation:
    """Say which linear attention an inner loop is, whether it has a parallel form and if not why, and what it costs.

    Args:
        spec: the inner loop.
        shapes: sizes for the costs; default a layer of the paper's 760M language model.

    Raises:
        TypeError: `spec` is no `InnerLoop`, or `shapes` no `Shapes`.
    """
    if not isinstance(spec, InnerLoop):
        raise TypeError(f"spec must be a kvbind.InnerLoop; got {type(spec).__name__}")
    if not isinstance(shapes, Shapes | None):
        raise TypeError(f"shapes must be a kvbind.forms.analysis.Shapes or None; got {type(shapes).__name__}")
    shapes = shapes or Shapes()
    obstacles = parallel_obstacles(spec)
    # at once, as some fields need others
    nearest = spec.replace(**{name: value for obstacle in obstacles for name, value in obstacle.edit.items()})
    return Explanation(
        spec=spec,
        operands=_operands(spec),
        state_rule=_state_rule(spec),
        output_rule=_output_rule(spec),
        obstacles=obstacles,
        parallel_kind=None if obstacles else _parallel_kind(spec),
        nearest=nearest,
        shapes=shapes,
        cost=cost(spec, shapes),
    )


def _operands(spec: InnerLoop) -> dict[str, str]:
    """Effective operands (theorems 5.1 to 5.3), in words of the spec's fields."""
    network, read = spec.network, "q_t" if spec.query == "query" else "k_t"
    moving = spec.update == "all" and bool(network.theta)
    head, apart = network.output_head, "refresh" in spec.extensions
    new, old = ("; Theta_new", "; Theta_p" if apart else "; Theta_c") if moving else ("", "")
    if isinstance(network, Linear | GLU):
        phi_q, phi_k = read, "k_i"
    elif isinstance(network, DepthwiseConv):
        phi_q, phi_k = f"the 3x3 neighbourhood of {read}, per channel", "the 3x3 neighbourhood of k_i, per channel"
    else:
        phi_q, phi_k = f"phi({read}{new})", f"phi(k_i{old})"
    at = "f_p" if apart else "f_c"
    g = "v_i" if spec.loss == "dot" else f"(v_i - {at}({'e_i' if spec.erase else 'k_i'}))"
    if head is not None and head.where != "read":
        g = f"{g} J, with J the slope of the head at k_i"
    if isinstance(network, GLU):
        g = f"{g} * silu(k_i W_gate{',c' if moving else ''})"
    elif network.has_gate:
        g = f"{g} * gate(k_i{old})"
    operands = {"q^_t": phi_q, "k^_i": phi_k, "v^_i": f"lr_i {g}", "S_0": "the starting last layer W"}
    if isinstance(network, MLP):
        operands["phi"] = " then ".join([f"{network.activation}(x W_{name})" for name in network.theta])
    elif isinstance(network, SwiGLU):
        operands["phi"] = "silu(x W_gate) * (x W_up)"
    if network.has_bias:
        operands["q^_t"], operands["k^_i"] = f"({operands['q^_t']}, 1)", f"({operands['k^_i']}, 1)"
        operands["S_0"] = "the starting last layer W, its bias as a last row"
    if spec.steps > 1:
        operands["k^_i"] += f", written {spec.steps} times over, once per step"
    if spec.writes > 1:
        operands["k^_i"] += f", {spec.writes} of each token, one after another"
    if apart:
        every = "call" if spec.refresh == "call" else f"{spec.refresh} tokens"
        operands["p"] = f"the last renewal of the weights that gradients are taken at, once per {every}"
    return operands


def _state_rule(spec: InnerLoop) -> str:
    of = "the chunk" if spec.window_size == 1 or spec.sums_updates else f"the last {spec.window_size} chunks"
    write = f"sum over {of} of k^_i^T v^_i"
    if spec.momentum:
        write = f"sum over chunks c' <= c of (product of momentum gates after c') {write}"
    if spec.sums_updates:
        write = f"sum over the last {spec.window_size} chunks of ({write})"
    if spec.orthogonalize is not None:
        write = f"NewtonSchulz({write})"
    elif spec.clip:
        write = f"clip({write})"
    if spec.step_rate:
        write = f"eta_c {write}"
    if spec.read_rate:
        return f"S_s'  = S_s {'+' if spec.sign > 0 else '-'} c (sum over the span of {write}), c of its last token"
    kept = "S_c"
    if isinstance(spec.retention, Retention) and spec.retention.per == "key":
        kept = "a_c o S_c, a gate for each row"
    elif spec.retention:
        kept = "a_c S_c"
    if spec.decays_before:
        kept += " (which gradients see too)"
    body = f"{kept} {'+' if spec.sign > 0 else '-'} {write}"
    if spec.anchor is not None:
        body = f"({body}), drawn back to its anchor A: (1 - p) S + p A with p = {spec.anchor.strength} w(F) of each weight"
    if spec.normalize is True:
        body = f"({body}) * (starting norm / new norm of each value channel), a decay that depends on the data"
    return f"S_c+1 = {body}"


def _output_rule(spec: InnerLoop) -> str:
    gate = "silu(q_t W_gate) * " if isinstance(spec.network, GLU) else "gate(q_t) * " if spec.network.has_gate else ""
    seen = {
        "past": "S_c: the chunks before its own",
        "chunk": "S_c+1: its own chunk included",
        "token": "S_c and its own chunk's tokens up to t",
        "full": "S_1: all tokens that write" if spec.chunk is None else "the last S: all tokens that write",
    }[spec.visibility]
    if spec.read_rate:
        seen = "S_s + c_t (the span's writes up to t)"
    if spec.normalize == "read":
        seen += ", each value channel rescaled to its starting norm"
    head, read = spec.network.output_head, f"{gate}q^_t S"
    if head is not None and head.where != "loss":
        read = f"{'q_t + ' if head.residual else ''}LN({read})"
    return f"o_t   = {read}, with S = {seen}"


def _parallel_kind(spec: InnerLoop) -> str:
    if spec.loss == "squared":
        return "as the delta rule: a triangular solve in each block of tokens (WY), then a scan over blocks"
    parts = ["all writes at once"]
    if spec.momentum:
        parts.append("a first-order scan for momentum")
    if spec.orthogonalize is not None:
        parts.append("one batched Newton-Schulz")
    elif spec.clip:
        parts.append("one batched clipping")
    parts.append("a decayed prefix sum" if spec.retention else "a prefix sum")
    if spec.visibility == "token":
        parts.append("a triangular term inside blocks")
    return ", ".join(parts)
