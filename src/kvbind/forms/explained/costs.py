"""What an inner loop costs: operations of its matrix products, bytes that it moves, and the size of its state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvbind.forms.explained.block_costs import BlockWork, block_work
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.parallel.affine_blocks import BLOCK
from kvbind.inner.networks import GLU, MLP
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import Value, check_positive_int


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
            what its share of an update writes, momentum and other copies read and written, and pending tokens.
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
    # a token that completes an update moves all of it; others are pending until one does, written once and read once
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
