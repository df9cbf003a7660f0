"""Every check of what users give to `ttt` and its relatives, and its change into the form the library computes with."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbind.files import shortened
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.inner.gates import DECLARED
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import nearest, values_checked
from kvbind.kernels.common.tracing import has_values
from kvbind.sequence.shard import SequenceShard

PerToken = float | Tensor
"""A gate: a number for all tokens and heads, or a tensor that says it of each."""

LearningRate = PerToken | Mapping[str, PerToken]


@dataclass(frozen=True)
class Operands:
    """One validated call, heads first.

    Attributes:
        q: what is read, `[B, H, T, Dk]`, in the dtype it came in.
        tokens: what writes.
        state: where the sequences start; its batch is that of `q`, or the number of packed sequences.
        cu_seqlens: boundaries of packed sequences, or None.
    """

    q: Tensor
    tokens: Tokens
    state: State
    cu_seqlens: tuple[int, ...] | None


Engine = Callable[[InnerLoop, Operands], tuple[Tensor, State]]
"""What evaluates a validated call: outputs `[B, H, T, Dv]`, and the state after it."""


def check_operands(
    spec: InnerLoop,
    weights: Mapping[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: LearningRate,
    gates: Mapping[str, PerToken],
    state: State | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    update_tokens: slice | Tensor | None,
) -> Operands:
    """Check one call's arguments and bring them into the library's own layout.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument whose shape, value or presence does not fit; the message names it.
    """
    if not isinstance(spec, InnerLoop):
        raise TypeError(f"spec must be a kvbind.InnerLoop; got {type(spec).__name__}")
    check_qkv(spec, q, k, v)
    batch, length, heads, key_width = q.shape
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, torch.float32))
    bounds = check_cu_seqlens(cu_seqlens, batch, length)
    sequences = batch if bounds is None else len(bounds) - 1
    if bounds is not None and spec.anchor is not None and spec.anchor.peak == "batch":
        raise ValueError("cu_seqlens must be None where an anchor takes its peak over the batch (peak='batch')")
    tokens = Tokens(
        k.transpose(1, 2),
        v.transpose(1, 2),
        check_rates(spec, lr, k.shape[:3], dtype),
        check_gates(spec, gates, q, dtype),
    )

    if state is None:
        if weights is None:
            raise ValueError("weights must be given where there is no state; got None")
        fast = {
            name: x.to(dtype) for name, x in check_weights(spec, weights, sequences, heads, key_width, v.shape[-1]).items()
        }
        slides = spec.window_size > 1 and not spec.sums_updates
        state = State.of(spec, FastWeights.start(spec, fast, tokens.of_keys() if slides else None), None, 0)
    else:
        check_state(spec, state, sequences, k, v)
        if weights is not None:
            check_weights(spec, weights, sequences, heads, key_width, v.shape[-1])
    for name, x in state.tensors.items():
        if x.device != q.device:
            raise ValueError(f"weights and state must be on q's device, {q.device}; {name} is on {x.device}")

    read = k if spec.query == "key" else q
    tokens = choose_update_tokens(spec, tokens, update_tokens, bounds)
    return Operands(read.transpose(1, 2), tokens, state, bounds)


def check_shard(
    spec: InnerLoop,
    shard: SequenceShard,
    q: Tensor,
    state: State | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    update_tokens: slice | Tensor | None = None,
) -> tuple[int, ...] | None:
    """A slice of a row: what it excludes, and the boundaries of its documents where the row is packed."""
    if not isinstance(shard, SequenceShard):
        raise TypeError(f"sequence must be a kvbind.SequenceShard; got {type(shard).__name__}")
    if state is not None:
        raise ValueError("state must be None beside sequence: where a slice starts from is on the rank before it")
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None beside sequence, whose cu_seqlens are those of the whole row")
    if update_tokens is not None:
        raise ValueError("update_tokens must be None beside sequence: all tokens of a row that is cut over ranks write")
    if isinstance(q, Tensor) and q.dim() == 4 and q.shape[1] != shard.here.length:
        raise ValueError(
            f"q, k and v must have the {shard.here.length} tokens of rank {shard.rank}'s slice; got {q.shape[1]}"
        )
    if spec.refresh == "call":
        raise ValueError(
            "sequence takes no inner loop with refresh='call', whose gradients are taken at the weights before the whole row"
        )
    if spec.anchor is not None and spec.anchor.peak == "batch" and shard.cu_seqlens is not None:
        raise ValueError("sequence must be of rows that are not packed where an anchor takes its peak over the batch")
    if spec.visibility == "chunk" and spec.chunk is not None and any(shard.pending(spec.chunk)):
        raise ValueError(
            f"sequence's slices must end between chunks under visibility='chunk', whose tokens see the end of their chunk; "
            f"tokens of incomplete chunks before each rank: {list(shard.pending(spec.chunk))}"
        )
    return None if shard.cu_seqlens is None else shard.here.bounds


def check_qkv(spec: InnerLoop, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Ranks, dtypes, devices and matching sizes of `q`, `k` `[B, T, H, Dk]` and `v` `[B, T, H, Dv]`."""
    for name, x, width in (("q", q, "Dk"), ("k", k, "Dk"), ("v", v, "Dv")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [B, T, H, {width}]; got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 axes, [B, T, H, {width}]; got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating-point; got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}; got {x.device}")
    for axis, what in ((0, "batch"), (1, "token"), (2, "head"), (3, "channel")):
        if q.shape[axis] * (spec.writes if axis == 1 else 1) != k.shape[axis]:
            if axis == 1 and spec.writes > 1:
                raise ValueError(
                    f"k must have {spec.writes} rows for each token of q, as the inner loop has writes={spec.writes}; got q "
                    f"{list(q.shape)} and k {list(k.shape)}"
                )
            raise ValueError(f"q and k must have equal {what} counts; got q {list(q.shape)} and k {list(k.shape)}")
        if axis < 3 and v.shape[axis] != k.shape[axis]:
            raise ValueError(f"v and k must have equal {what} counts; got v {list(v.shape)} and k {list(k.shape)}")
    if 0 in (q.shape[0], q.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(
            f"q, k and v must have at least one sequence, head and channel; got q {list(q.shape)}, v {list(v.shape)}"
        )
    head = spec.network.output_head
    if head is not None and head.residual and q.shape[3] != v.shape[3]:
        raise ValueError(f"a head with residual=True needs Dk = Dv; got Dk = {q.shape[3]} and Dv = {v.shape[3]}")
    if isinstance(spec.network, DepthwiseConv) and q.shape[3] != v.shape[3]:
        raise ValueError(f"DepthwiseConv needs Dk = Dv; got Dk = {q.shape[3]} and Dv = {v.shape[3]}")


def check_cu_seqlens(cu_seqlens: Tensor | Sequence[int] | None, batch: int, length: int) -> tuple[int, ...] | None:
    """Boundaries of packed sequences as ints: from 0, never falling, to the row's length."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be a 1-d tensor of integers, [n + 1]; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        bounds = tuple(int(x) for x in cu_seqlens.tolist())
    else:
        try:
            bounds = tuple(operator.index(x) for x in cu_seqlens)
        except TypeError as error:
            raise TypeError(f"cu_seqlens must be integers, [n + 1]; got {cu_seqlens!r}") from error
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row, so the batch must be 1; got {batch}")
    if len(bounds) < 2:
        raise ValueError(f"cu_seqlens must have at least two entries, [0, T]; got {list(bounds)}")
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0; got {bounds[0]}")
    if bounds[-1] != length:
        raise ValueError(f"cu_seqlens must end at the number of tokens, {length}; got {bounds[-1]}")
    if any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must never fall; got {list(bounds)}")
    return bounds


def check_weights(
    spec: InnerLoop, weights: Mapping[str, Tensor], batch: int, heads: int, key_width: int, value_width: int
) -> dict[str, Tensor]:
    """The starting weights, brought to `[B, H, in, out]` (`[B, H, D, 3, 3]` for kernels) in the order of the network."""
    network = spec.network
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a dict of tensors; got {type(weights).__name__}")
    kind = type(network).__name__
    needed = network.tensors
    for name in weights:
        if name not in needed:
            raise ValueError(
                f"weights has {name!r}, which {kind} has not{nearest(name, needed)}; it needs {', '.join(needed)}"
            )
    for name in needed:
        if name not in weights:
            raise ValueError(f"weights lacks {name!r}; {kind} needs {', '.join(needed)}")
        x = weights[name]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"weights[{name!r}] must be a floating-point tensor; got {x if not isinstance(x, Tensor) else x.dtype}"
            )
    ranks = len(network.stored_shape(1, network.shapes(1, 1, (1,) * network.hidden_layers)["out"]))
    rank_of = dict.fromkeys(network.matrices, ranks) | dict.fromkeys(network.vectors, 2)
    for name, x in weights.items():
        if x.dim() not in (rank_of[name], rank_of[name] + 1):
            what = "[C, 3, 3] or [B, C, 3, 3]" if isinstance(network, DepthwiseConv) else "[H, in, out] or [B, H, in, out]"
            what = "[H, out] or [B, H, out]" if name in network.vectors else what
            raise ValueError(f"weights[{name!r}] must be {what}; got shape {list(x.shape)}")
    hidden = network.hidden_widths(weights)
    shapes = network.shapes(key_width, value_width, hidden) | network.vector_shapes(key_width, value_width, hidden)
    checked = {}
    for name, shape in shapes.items():
        ranks, vector = rank_of[name], name in network.vectors
        x, need = weights[name], (heads, *shape) if vector else network.stored_shape(heads, shape)
        if tuple(x.shape[-ranks:]) != need:
            raise ValueError(
                f"weights[{name!r}] must end in {list(need)} for {heads} heads, Dk = {key_width} and Dv = {value_width}; "
                f"got shape {list(x.shape)}"
            )
        if x.dim() > ranks and x.shape[0] != batch:
            raise ValueError(f"weights[{name!r}] must have one entry for each of {batch} sequences; got {x.shape[0]}")
        # reading values back from a GPU would stall every call
        if x.device.type == "cpu" and has_values(x) and values_checked() and not bool(x.isfinite().all()):
            raise ValueError(f"weights[{name!r}] must be finite; got NaN or infinity")
        # a vector has an input axis of length 1, as rows have
        inner = (1, *shape) if vector else shape
        checked[name] = x.reshape(*x.shape[:-ranks], heads, *inner).expand(batch, heads, *inner)
    return checked


def check_state(spec: InnerLoop, state: State, sequences: int, k: Tensor, v: Tensor) -> None:
    """A state fits a call when it is of the same inner loop, batch, heads and widths."""
    if not isinstance(state, State):
        raise TypeError(f"state must be what ttt returned (kvbind.State) or None; got {type(state).__name__}")
    if not state.spec.same_as(spec):
        raise ValueError(f"state must be of this inner loop; its spec differs in {', '.join(spec.differing(state.spec))}")
    if state.batch != sequences:
        raise ValueError(f"state must have one entry for each of {sequences} sequences; got {state.batch}")
    network, heads = spec.network, k.shape[2]
    weights = state.weights
    shapes = network.shapes(k.shape[-1], v.shape[-1], network.hidden_widths(weights))
    for name, shape in shapes.items():
        need = (sequences, heads, *shape)
        if tuple(weights[name].shape) != need:
            raise ValueError(f"state's {name!r} must be {list(need)} for these q, k and v; got {list(weights[name].shape)}")


def check_rates(spec: InnerLoop, lr: LearningRate, shape: Sequence[int], dtype: torch.dtype) -> dict[str, float | Tensor]:
    """Learning rates by updated matrix, numbers or `[B, H, T]`."""
    if isinstance(lr, Mapping):
        needed = [name for name in spec.updated if name in spec.network.matrices]
        for name in lr:
            if name not in spec.updated:
                raise ValueError(
                    f"lr has {name!r}, which is not updated{nearest(name, spec.updated)}; it needs {', '.join(needed)}"
                )
        missing = [name for name in needed if name not in lr]
        if missing:
            raise ValueError(f"lr lacks {missing[0]!r}; as a dict it needs {', '.join(needed)}")
        rates = {name: _rate(f"lr[{name!r}]", rate, shape, dtype) for name, rate in lr.items()}
        # biases and a head's gamma take the rate of their matrix where they have none of their own
        return {name: rates[name] if name in rates else rates[spec.network.rate_of(name)] for name in spec.updated}
    rate = _rate("lr", lr, shape, dtype)
    return dict.fromkeys(spec.updated, rate)


def _rate(argument: str, rate: PerToken, shape: Sequence[int], dtype: torch.dtype) -> PerToken:
    if isinstance(rate, Tensor):
        return _per_token(argument, rate.expand(tuple(shape)) if rate.dim() == 0 else rate, shape, dtype)
    return _number(argument, rate, dtype, "a number, a tensor [B, T, H] or a dict by matrix")


def _number(argument: str, value: float, dtype: torch.dtype, kinds: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} must be {kinds}; got {type(value).__name__}")
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"{argument} must be finite in {dtype}; got {shortened(value)}")
    return float(value)


def check_gates(spec: InnerLoop, given: Mapping[str, PerToken], q: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gates that the spec asks for, each there exactly when it does: `[B, H, T]` or `[B, H, T, Dk]`, a row per write.

    Args:
        spec: the inner loop.
        given: by name.
        q: queries `[B, T, H, Dk]`.
        dtype: of the result.
    """
    batch, tokens, heads, width = q.shape
    for name, unasked in given.items():
        if name not in spec.gates:
            value, got = getattr(spec, name), "a gate" if isinstance(unasked, Tensor) else repr(unasked)
            raise ValueError(f"{name} must be None, as the inner loop has {name}={value!r}; got {got}")
    gates = {}
    for name, declared in spec.gates.items():
        gate, itself, rows = given.get(name), declared.writes == "itself", tokens * spec.writes
        kinds = f"{'a' if itself else 'a number or a'} tensor {declared.axes}"
        if gate is None:
            value = getattr(spec, name)
            raise ValueError(f"{name} must be {kinds}, as the inner loop has {name}={value!r}; got None")
        need = (batch, rows if itself else tokens, heads, *((width,) if declared.per == "key" else ()))
        if itself and not isinstance(gate, Tensor):
            raise TypeError(f"{name} must be {kinds}; got {type(gate).__name__}")
        if not isinstance(gate, Tensor):
            number = _number(name, gate, dtype, kinds)
            gate = torch.full(need, number, dtype=dtype, device=q.device)
        elif gate.dim() == 0 and not itself:
            gate = gate.expand(need)
        x = _per_token(name, gate, need, dtype, declared.axes)
        if spec.writes > 1 and not itself:
            x = x.repeat_interleave(spec.writes, dim=2)
            if declared.writes == "first":
                later = (torch.arange(rows, device=x.device) % spec.writes > 0).reshape(-1, *(1,) * (x.dim() - 3))
                x = x.masked_fill(later, 1.0)
        gates[name] = x
    return gates


def _per_token(argument: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, axes: str = "[B, T, H]") -> Tensor:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{argument} must be {axes} = {list(shape)}; got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{argument} must be floating-point; got {x.dtype}")
    return x.transpose(1, 2).to(dtype)


def choose_update_tokens(
    spec: InnerLoop, tokens: Tokens, chosen: slice | Tensor | None, bounds: tuple[int, ...] | None
) -> Tokens:
    """The tokens that write: a slice of them, or all with a mask."""
    if chosen is None:
        return tokens
    batch, length = tokens.k.shape[0], tokens.count // spec.writes
    if isinstance(chosen, slice):
        # chunks are cut by place, a convolution needs the whole grid for its neighbourhoods, and packed sequences their own
        from_start = chosen.start in (None, 0) and chosen.step in (None, 1)
        if (
            spec.visibility == "full"
            and (spec.chunk is None or from_start)
            and not isinstance(spec.network, DepthwiseConv)
            and bounds is None
        ):
            return tokens.map(lambda x: x[:, :, chosen])
        mask = torch.zeros(length, dtype=torch.bool, device=tokens.k.device)
        mask[chosen] = True
    elif isinstance(chosen, Tensor) and chosen.dtype == torch.bool:
        mask = chosen
    else:
        raise TypeError(f"update_tokens must be a slice or a bool tensor [T] or [B, T]; got {chosen!r}")
    if tuple(mask.shape) not in ((length,), (batch, length)):
        raise ValueError(f"update_tokens must be [T] = [{length}] or [B, T] = [{batch}, {length}]; got {list(mask.shape)}")
    mask = mask.to(tokens.k.device).expand(batch, length).unsqueeze(1).repeat_interleave(spec.writes, dim=2)
    # what does not write may be anything; a convolution has it as a neighbour
    idle = ~mask
    written = replace(tokens.map(lambda x: x.masked_fill(as_factor(idle, x), 0.0)), mask=mask)
    # what a token takes for its own reading counts whether it writes or not
    own = {name: tokens.gates[name] for name in tokens.gates if DECLARED[name].chunk == "last"}
    written = replace(written, gates=dict(written.gates) | own)
    return replace(written, k=tokens.k) if isinstance(spec.network, DepthwiseConv) else written
