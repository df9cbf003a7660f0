"""`ttt`, the one call that runs an inner loop, and `inner_loss`, what that loop minimizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kvbind.forms import opaque
from kvbind.forms.autocast import without_autocast
from kvbind.forms.evaluate import FORMS, Form, idles, run
from kvbind.forms.explained.analysis import NoParallelFormError, explain
from kvbind.forms.obstacles import best_form, parallel_in_spans, parallel_obstacles
from kvbind.forms.on_kernels import planned
from kvbind.forms.parallel.form import masks_in_parallel
from kvbind.forms.recurrent import Chunk, chunks, closed, seen_weights, write
from kvbind.forms.sharded import sharded
from kvbind.forms.state import State
from kvbind.forms.validation import LearningRate, PerToken, check_operands, check_shard
from kvbind.inner.gates import given_gates
from kvbind.inner.losses import loss_value
from kvbind.inner.rule import set_off
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_choice
from kvbind.kernels.common.tracing import is_eager
from kvbind.sequence.shard import SequenceShard


def ttt(
    spec: InnerLoop,
    weights: Mapping[str, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: LearningRate = 1.0,
    momentum: PerToken | None = None,
    retention: PerToken | None = None,
    log_retention: PerToken | None = None,
    erase: Tensor | None = None,
    read_rate: PerToken | None = None,
    step_rate: PerToken | None = None,
    state: State | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    update_tokens: slice | Tensor | None = None,
    form: Form = "auto",
    sequence: SequenceShard | None = None,
) -> tuple[Tensor, State]:
    """Run an inner loop over sequences of keys and values, and read it with queries.

    Differentiable in every tensor. State, norms and accumulation are in float32 (float64 where an input is float64),
    also under autocast. Values of weights are checked for NaN on the CPU alone, as reading them from a GPU stalls it.
    What is not finite in a token makes NaN of the outputs that see it, and leaves all others as they are.

    On NVIDIA GPUs of compute capability 8.0 and up, with Triton installed, kernels run what they cover; their products take
    operands in the dtype of q, k and v, and round a state to it where they read it. Elsewhere, and with `KVBIND_KERNELS=0`,
    products are in the state's dtype.

    Args:
        spec: the inner loop.
        weights: starting fast weights, by matrix name `[H, in, out]` or `[B, H, in, out]` (a depthwise convolution:
            `[C, 3, 3]`, `C = H * D`; packed sequences: `B` counts them). May be None where `state` is given, whose
            weights are then the ones that count.
        q: queries `[B, T, H, Dk]`; under `query="key"` only their shape and dtype matter.
        k: keys `[B, T, H, Dk]`; with `spec.writes` n above 1 `[B, T n, H, Dk]`, those of a token side by side, and likewise
            values, rates and `erase`.
        v: values `[B, T, H, Dv]`.
        lr: learning rate: a number, which is that of all tokens and heads, `[B, T, H]`, or a dict of these by updated
            matrix. Biases and a head's gamma take that of their matrix unless they are named.
        momentum: per-token gate `[B, T, H]`, averaged over each chunk; exactly when `spec.momentum`. A gate may also be a
            number, which is that of all tokens and heads.
        retention: per-token gate in (0, 1], `[B, T, H]`, or `[B, T, H, Dk]` per key channel, averaged over each chunk;
            exactly when `spec.retention`.
        log_retention: its logarithm in its place, of the same shape, or a number.
        erase: keys `[B, T, H, Dk]` at which residuals read; exactly when `spec.erase`.
        read_rate: per-token gate `[B, T, H]`; exactly when `spec.read_rate`.
        step_rate: per-token gate `[B, T, H]`, averaged over each chunk; exactly when `spec.step_rate`.
        state: what an earlier call returned, to go on from where it stopped.
        cu_seqlens: `[n + 1]` boundaries of sequences packed into one row (`B = 1`); nothing crosses them.
        update_tokens: a slice or a bool mask (`[T]` or `[B, T]`) of the tokens that write; all are read. A chunk without
            any leaves all as it is.
        form: "recurrent", "parallel", "dual" (all tokens of a span at once, spans in order: where gradients read the state
            nonlinearly), or "auto": on more than one chunk the parallel form where there is one, else the dual form where
            there is that (`explain(spec).form`), else the recurrent one.
        sequence: q, k and v, rates and gates are this rank's slice of a row that is cut over ranks, all of which call with
            the same shard. Excludes `state` and `cu_seqlens`.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype, and the state after the last token (of a slice: the state of each of its
        documents after its last token here). Any split of a sequence into calls gives
        the same outputs under `visibility` "past" and "token"; under "chunk", splits between chunks do, and an
        incomplete chunk is read after the tokens it has.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NoParallelFormError: `form="parallel"`, or a `sequence` with `schedule="scan"`, for an inner loop that has none.
    """
    gates, key = (
        given_gates(
            log_retention, momentum=momentum, retention=retention, erase=erase, read_rate=read_rate,
            step_rate=step_rate,
        ),
        None,
    )  # fmt: skip
    plain = state is None and cu_seqlens is None and update_tokens is None and sequence is None
    if plain and weights is not None and is_eager():
        # a call like an earlier one needs no checks: all that checks read is in the key
        same = planned.again(spec, weights, q, k, v, lr, gates, form)
        if same is not None:
            return same(weights, q, k, v, lr, gates)
        key = planned.key_of(spec, weights, q, k, v, lr, gates, form)
        kind = planned.known(key)
        if kind is not None and kind.planned is not None and planned.straight(q):
            planned.remember(kind, weights, q, k, v, lr, gates, form)
            return kind.planned(weights, q, k, v, lr, gates)
    check_choice("form", form, FORMS)
    if sequence is not None:
        cu_seqlens = check_shard(spec, sequence, q, state, cu_seqlens, update_tokens)
    call = check_operands(spec, weights, q, k, v, lr, gates, state, cu_seqlens, update_tokens)
    if form == "parallel" and parallel_obstacles(spec):
        raise NoParallelFormError(explain(spec))
    if form == "dual" and not parallel_in_spans(spec):
        raise ValueError(
            "form='dual' is of a Linear or MLP network whose writes add up (no orthogonalize, clip, normalize, anchor, "
            "steps, writes or decay per key channel), with several updates between renewals (refresh) or chunks of several "
            f"tokens under visibility='token'; explain(spec).form is {best_form(spec)!r} for {spec!r}"
        )
    if form in ("parallel", "dual") and idles(spec, call) and not masks_in_parallel(spec):
        raise ValueError(
            f"form={form!r} takes no update_tokens under visibility={spec.visibility!r} with chunks of {spec.chunk} "
            f"and window={spec.window_size}; form='auto' runs the recurrent form"
        )
    if key is not None and weights is not None:
        kind = kind or planned.learn(key, spec, call, lr, weights, form)
        if kind.planned is not None:
            return kind.planned(weights, q, k, v, lr, gates)
    with without_autocast(q.device.type):
        if sequence is None:
            output, state = opaque.run(spec, call, form) if opaque.takes(spec, call) else run(spec, call, form)
        else:
            output, state = sharded(spec, call, sequence, form, partial(run, form=form))
    return output.transpose(1, 2).to(q.dtype), state


def inner_loss(
    spec: InnerLoop,
    weights: Mapping[str, Tensor],
    k: Tensor,
    v: Tensor,
    *,
    lr: LearningRate = 1.0,
    momentum: PerToken | None = None,
    retention: PerToken | None = None,
    log_retention: PerToken | None = None,
    erase: Tensor | None = None,
    step_rate: PerToken | None = None,
    read_rate: PerToken | None = None,
    update_tokens: slice | Tensor | None = None,
    at: Literal["before", "after"] = "after",
) -> Tensor:
    """The binding loss of each chunk along the inner loop's own trajectory.

    Args:
        spec: the inner loop.
        weights: starting fast weights, as `ttt` takes them.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        lr: as `ttt` takes it.
        momentum: as `ttt` takes it.
        retention: as `ttt` takes it.
        log_retention: as `ttt` takes it.
        erase: as `ttt` takes it; the loss of a residual that reads there is `1/2 ||f(e) - v||^2`.
        step_rate: as `ttt` takes it.
        read_rate: as `ttt` takes it; the weights after a chunk are those that its last token sees.
        update_tokens: as `ttt` takes it.
        at: the loss at the weights after the chunk's own update ("after", all `spec.steps` of them), or before it.

    Returns:
        The loss averaged over the chunk's writing tokens, `[B, H, N]`, in the state's dtype; N is the number of chunks,
        `ceil(T / chunk)`, or 1 under `visibility="full"`. An incomplete last chunk counts as if it updated.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_choice("at", at, ("before", "after"))
    gates = given_gates(
        log_retention, momentum=momentum, retention=retention, erase=erase, read_rate=read_rate,
        step_rate=step_rate,
    )  # fmt: skip
    # nothing is read, at as many tokens as there are
    q = k[:, :: spec.writes] if isinstance(spec, InnerLoop) and isinstance(k, Tensor) and k.dim() == 4 else k
    call = check_operands(spec, weights, q, k, v, lr, gates, None, None, update_tokens)
    whole = Chunk(call.tokens.span(0, 0), call.tokens, slice(0, q.shape[1]), complete=True)
    parts = [whole] if spec.chunk is None else chunks(spec, call.tokens, None)
    fast = point = set_off(spec, call.state.fast)
    losses = []
    with without_autocast(k.device.type):
        for part in parts:
            if part.renews:
                point = fast
            tokens = part.own
            after = write(spec, fast, tokens, point.weights)
            at_weights = seen_weights(spec, after, tokens) if at == "after" else fast.weights
            dtype = at_weights["out"].dtype
            read = tokens.gates.get("erase", tokens.k)
            loss = loss_value(spec.loss, spec.network.predict(at_weights, read.to(dtype)), tokens.v.to(dtype))
            losses.append(tokens.mean(loss))
            fast = closed(spec, after, tokens) if part.closes and spec.refresh != "call" else after
    if not losses:
        return k.new_zeros(k.shape[0], k.shape[2], 0, dtype=call.state.dtype)
    return torch.stack(losses, dim=-1)
