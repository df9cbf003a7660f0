"""One update of a gated linear unit from all tokens, then a read: `visibility="full"`, ViTTT's heads (arXiv 2512.01643).

Each sequence and head is on its own. With `z = k W`, `u = k W_gate`, `s = silu(u)` and `g = -dL/df` (specification,
section 1):

    G_out = k^T (r_out g s)        G_gate = k^T (r_gate g z silu'(u))        M' = M + sign G / (|G| + 1)
    o = silu(q W_gate') (q W')

with norms over a column, or `M' = M + sign G` unclipped. Without a gate, `s = 1` and `o = q W'`: one linear layer.

Where sequences and heads fill the device, one program does all of one of them: it sums the update over tiles of tokens,
enters it into the weights and reads them, in one launch; the gradient likewise. Fewer and longer ones are cut into parts by
tokens, whose float32 sums are added, always in the same order, between two launches.

Operands are multiplied in their own dtypes and summed in float32; all else is float32. Float16 has too little range for
products of three activations: these are divided by their largest magnitude first, and the product multiplied by it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import DTYPES, last_contiguous
from kvbind.kernels.full_glu.backward import backward_kernel
from kvbind.kernels.full_glu.forward import forward_kernel
from kvbind.kernels.full_glu.launch import GluLaunch
from kvbind.kernels.full_glu.tiles import ALL, READ, WRITE
from kvbind.kernels.full_glu.weight_update import enter_backward_kernel, enter_kernel

MAX_WIDTH = 64
"""The widest head, in keys and in values: the matrices of wider ones do not fit into registers."""


def full_glu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: float | Tensor,
    rate_gate: float | Tensor,
    *,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Update a gated linear unit once from all keys and values, and read it with all queries.

    Differentiable in every tensor, also through the new weights.

    Args:
        q: queries `[B, Tq, H, Dk]`, float16, bfloat16 or float32.
        k: keys `[B, Tk, H, Dk]`, likewise, in a dtype of their own.
        v: values `[B, Tk, H, Dv]`, likewise.
        weight: the last layer, float32 `[H, Dk, Dv]` or `[B, H, Dk, Dv]`.
        gate: the gate, likewise; None for one linear layer.
        rate_out: the last layer's learning rate, a number or float32 `[B, Tk, H]`, zero for tokens that do not write.
        rate_gate: the gate's, likewise; only read where the gate is updated.
        update_gate: the gate is updated too; it has to be there.
        clip: divide each column of an update by its norm plus one.
        sign: 1 for descent, -1 for ascent.
        squared: the squared error, whose `g` is `v - f(k)`; else the dot product, whose `g` is `v`.

    Returns:
        Outputs `[B, Tq, H, Dv]` in q's dtype, the new weight and the new gate, float32 `[B, H, Dk, Dv]` (a view of `gate`
        where that is not updated, None where there is none).

    Raises:
        ValueError: widths or dtypes that `covers` refuses, or `update_gate` without a gate.
    """
    dtypes = (q.dtype, k.dtype, v.dtype)
    if not covers(q.shape[3], v.shape[3], *dtypes):
        raise ValueError(
            f"q, k and v must have heads of at most {MAX_WIDTH} channels in float16, bfloat16 or float32; got widths "
            f"{q.shape[3]} and {v.shape[3]} in {', '.join(map(str, dtypes))}"
        )
    if update_gate and gate is None:
        raise ValueError("update_gate must be False where gate is None")
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    weight = weight.expand(shape)
    gate = None if gate is None else gate.expand(shape)
    rates = [rate if isinstance(rate, Tensor) else None for rate in (rate_out, rate_gate if update_gate else 0.0)]
    scales = [1.0 if isinstance(rate, Tensor) else float(rate) for rate in (rate_out, rate_gate)]
    o, new, newg, _ = _full_glu(q, k, v, weight, gate, *rates, *scales, update_gate, clip, float(sign), squared)
    return o, new, newg if update_gate else gate


def covers(key_width: int, value_width: int, *dtypes: torch.dtype) -> bool:
    """Whether `full_glu` takes heads of these widths and queries, keys and values of these dtypes."""
    return 0 < key_width <= MAX_WIDTH and 0 < value_width <= MAX_WIDTH and all(dtype in DTYPES for dtype in dtypes)


@torch.library.custom_op("kvbind::full_glu", mutates_args=())
def _full_glu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: Tensor | None,
    rate_gate: Tensor | None,
    scale_out: float,
    scale_gate: float,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the new matrices (that of the gate only where it is updated), and the norms of their updates' columns."""
    o, new, newg, norms = _outputs(q, v, update_gate, clip)
    call = GluLaunch(q, k, v, weight, gate, rate_out, rate_gate, update_gate, clip, squared)
    if not call.programs:
        return o, new, newg, norms
    matrices = 2 if update_gate else 1
    partial = norms if call.parts == 1 else call.matrices(matrices, call.parts)
    tensors, numbers = (o, new, newg, norms, partial), (scale_out, scale_gate, sign)
    options = call.options(forward=True)
    with on_device_of(q):
        if call.parts == 1:
            call.over_tokens(forward_kernel, ALL, *tensors, *numbers, **options)
        else:
            call.over_tokens(forward_kernel, WRITE, *tensors, *numbers, **options)
            call.over_parts(enter_kernel, matrices, new, newg, norms, partial, sign)
            call.over_tokens(forward_kernel, READ, *tensors, *numbers, **options)
    return o, new, newg, norms


def _outputs(q: Tensor, v: Tensor, update_gate: bool, clip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, readers, heads, key_width = q.shape
    width = v.shape[3]
    shape = (batch, heads, key_width, width)
    return (
        q.new_empty(batch, readers, heads, width),
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty(shape if update_gate else (0,), dtype=torch.float32),
        q.new_empty((batch, heads, (2 if update_gate else 1) if clip else 0, width), dtype=torch.float32),
    )


@_full_glu.register_fake
def _(q, k, v, weight, gate, rate_out, rate_gate, scale_out, scale_gate, update_gate, clip, *_):
    return _outputs(q, v, update_gate, clip)


@torch.library.custom_op("kvbind::full_glu_backward", mutates_args=())
def _full_glu_backward(
    do: Tensor,
    dnew: Tensor | None,
    dnewg: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rate_out: Tensor | None,
    rate_gate: Tensor | None,
    new: Tensor,
    newg: Tensor,
    norms: Tensor,
    scale_out: float,
    scale_gate: float,
    update_gate: bool,
    clip: bool,
    sign: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, of the matrices (`[B, H, 1 or 2, Dk, Dv]`), and of the rates (empty for numbers)."""
    dq, dk, dv, dmatrices, drate_out, drate_gate = _gradients(q, k, v, gate, rate_out, rate_gate)
    call = GluLaunch(q, k, v, weight, gate, rate_out, rate_gate, update_gate, clip, squared)
    if not call.programs:
        return dq, dk, dv, dmatrices, drate_out, drate_gate
    do = last_contiguous(do)
    dnews = [new if d is None else d.contiguous() for d in (dnew, dnewg)]
    partial, dread, dupdate = (norms,) * 3
    dparts = dmatrices
    if call.parts > 1:
        count = dmatrices.shape[2]
        partial, dread, dupdate = (call.matrices(count, n) for n in (call.parts, 1, 1))
        # by the time that parts of the weights' gradient are written, those of the new weights' are added
        dparts = partial
    used = {"NEW_USED": dnew is not None, "NEWG_USED": dnewg is not None}

    def launch(stage: tl.constexpr) -> None:
        call.over_tokens(
            backward_kernel, stage, new, newg, norms, do, *dnews, dq, dk, dv, dparts, drate_out, drate_gate,
            partial, dread, dupdate, scale_out, scale_gate, sign, *do.stride()[:3],
            **used, **call.options(forward=False),
        )  # fmt: skip

    with on_device_of(q):
        if call.parts == 1:
            launch(ALL)
        else:
            launch(READ)
            call.over_parts(
                enter_backward_kernel, partial.shape[2], new, newg, norms, *dnews, partial, dread, dupdate,
                scale_out, scale_gate, sign, UPDATE_GATE=update_gate, **used,
            )  # fmt: skip
            launch(WRITE)
            torch.sum(dparts, dim=1, out=dmatrices.flatten(0, 1))
    return dq, dk, dv, dmatrices, drate_out, drate_gate


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, rate_out: Tensor | None, rate_gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_width = q.shape
    writers, width = v.shape[1], v.shape[3]
    drates = [
        q.new_empty((0,) if rate is None else (batch, writers, heads), dtype=torch.float32) for rate in (rate_out, rate_gate)
    ]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty((batch, heads, 1 if gate is None else 2, key_width, width), dtype=torch.float32),
        drates[0],
        drates[1],
    )


@_full_glu_backward.register_fake
def _(do, dnew, dnewg, q, k, v, weight, gate, rate_out, rate_gate, *_):
    return _gradients(q, k, v, gate, rate_out, rate_gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.numbers = inputs[7:]
    # a gradient of the new weights that nobody asks for is not made of zeros
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, do: Tensor | None, dnew: Tensor | None, dnewg: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, weight, gate, rate_out, rate_gate, *saved = ctx.saved_tensors
    if not saved[1].numel():
        # no gate was updated
        dnewg = None
    if do is None:
        do = q.new_zeros(*q.shape[:3], v.shape[3])
    dq, dk, dv, dmatrices, drate_out, drate_gate = _full_glu_backward(
        do, dnew, dnewg, q, k, v, weight, gate, rate_out, rate_gate, *saved, *ctx.numbers
    )
    return (
        dq,
        dk,
        dv,
        dmatrices[:, :, 0],
        None if gate is None else dmatrices[:, :, 1],
        None if rate_out is None else drate_out,
        None if rate_gate is None else drate_gate,
        *(None for _ in ctx.numbers),
    )


_full_glu.register_autograd(_backward, setup_context=_save)
