"""Which kernels take a call: one table, and who reads it.

A kernel is taken where it computes the same form of the same inner loop. Its products take operands in q's dtype (bfloat16,
float16 or float32) with sums, scans, gates and states in float32; the PyTorch forms first turn operands into float32.
`KVBIND_KERNELS=0` keeps to those. How a call's operands become a kernel's is in `kvbind.forms.on_kernels.kernel_calls`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kvbind.forms.obstacles import best_form, parallel_in_spans, parallel_obstacles
from kvbind.forms.on_kernels import delta, fla
from kvbind.forms.on_kernels.kernel_calls.affine import run_affine
from kvbind.forms.on_kernels.kernel_calls.causal import run_causal
from kvbind.forms.on_kernels.kernel_calls.chunked import run_chunked
from kvbind.forms.on_kernels.kernel_calls.full import run_full_conv, run_full_glu
from kvbind.forms.on_kernels.kernel_calls.mini_batches import run_mini_batches
from kvbind.forms.on_kernels.kernel_calls.recurrent import run_full_recurrent, run_recurrent
from kvbind.forms.parallel.form import SHORT_CHUNK
from kvbind.forms.validation import Engine, Operands
from kvbind.inner.network import Network
from kvbind.inner.networks import GLU, MLP, DepthwiseConv, Linear, SwiGLU
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.devices import is_roomy, runs_on
from kvbind.kernels.common.operands import DTYPES

WIDEST_CAUSAL = 512
"""The greatest width of a head that `kvbind.kernels.causal` takes."""

MOST_RECURRENT = 65535
"""The most sequences times heads that `kvbind.kernels.recurrent` takes, as many as an axis of a grid."""

NARROWEST = 16
"""The least width of an operand of a matrix unit."""


def engine(spec: InnerLoop, call: Operands, form: str) -> Engine | None:
    """What runs this call on kernels in this form ("recurrent", "parallel" or "dual"), or None where nothing does."""
    own = None
    if call.cu_seqlens is None or form == "dual" or own_takes_packed(spec, call, form):
        own = own_engine(spec, call, form)
    if form != "parallel" or not fla.considered():
        return own
    return fla.faster_of(spec, call, own).run


def own_engine(spec: InnerLoop, call: Operands, form: str) -> Engine | None:
    """What runs this call on the library's own kernels in this form, or None: the first row of `KERNELS` that takes it."""
    asked = "full" if spec.visibility == "full" else form
    for row in KERNELS:
        if row.form == asked and row.covers(spec) and row.takes(spec, call):
            return row.run
    return None


def takes_packed(spec: InnerLoop, call: Operands, form: str) -> bool:
    """Whether packed sequences of any lengths run in one go: on kernels, where none has tokens pending."""
    if own_takes_packed(spec, call, form):
        return True
    return form == "parallel" and fla.considered() and fla.obstacle(spec, call) is None


def own_takes_packed(spec: InnerLoop, call: Operands, form: str) -> bool:
    """Whether packed sequences of any lengths run in one go on the library's own kernels."""
    # a GLU's gates are made of each sequence's own matrix
    if form == "recurrent" or spec.visibility == "full" or isinstance(spec.network, GLU) or parallel_obstacles(spec):
        return False
    return any(row.packed is not None and row.covers(spec) and row.packed(spec, call) for row in KERNELS)


def kernels_of(spec: InnerLoop) -> str:
    """What runs the best form of an inner loop on GPUs, for people; empty where that is PyTorch alone.

    Whether a call fits depends on its operands too; `kvbind.forms.on_kernels.fla` logs what ran.
    """
    form = best_form(spec)
    own = next((f"kvbind.kernels.{row.folder}" for row in KERNELS if row.form == form and row.covers(spec)), None)
    if form != "parallel":
        return own or ""
    operator = fla.operator_of(spec)
    if isinstance(operator, str):
        return own or ""
    reason = fla.unusable()
    if reason is not None:
        return f"{own or 'PyTorch'} ({operator.name} not: {reason})"
    other = f"{operator.name} of {fla.PACKAGE} {fla.installed()}"
    return other if own is None else f"{own}, or {other} where that was measured to be faster or takes a call alone"


# What there is to compute: inner loops, by their fields alone.


def is_mini_batched(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.mini_batches`: TTT-Linear, TTT-MLP, Titans."""
    network, head = spec.network, spec.network.output_head
    known = is_a(network, Linear) or (is_a(network, MLP) and network.hidden_layers == 1 and spec.update == "all")
    if not known or not parallel_in_spans(spec) or spec.chunk != 1 or spec.visibility != "token":
        return False
    return isinstance(spec.refresh, int) and not (spec.erase or spec.window_size > 1 or (head is not None and head.fast))


def is_linear_memory(spec: InnerLoop) -> bool:
    """Whether one of `kvbind.kernels.mini_batches` has a parallel form besides: one matrix, without a head in the loss."""
    return is_mini_batched(spec) and not parallel_obstacles(spec)


def is_affine(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.affine`: the delta rule and its kin."""
    return delta.obstacle(spec) is None


def is_full_glu(spec: InnerLoop) -> bool:
    """Whether an inner loop under `visibility="full"` is one of `kvbind.kernels.full_glu`: ViTTT's heads."""
    network = spec.network
    known = is_a(network, GLU) or (is_a(network, Linear) and spec.clip and spec.loss == "dot")
    return known and updates_once(spec) and spec.orthogonalize is None


def is_full_conv(spec: InnerLoop) -> bool:
    """Whether an inner loop under `visibility="full"` is one of `kvbind.kernels.full_conv`: ViTTT's convolution."""
    return is_a(spec.network, DepthwiseConv) and updates_once(spec) and spec.loss == "dot"


def is_chunked(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.chunked`: chunks whose writes add up."""
    network = spec.network
    known = is_a(network, Linear, SwiGLU, GLU) or (is_a(network, MLP) and network.hidden_layers == 1)
    known = known and not spec.extensions and spec.visibility != "token"
    return known and not has_short_chunks(spec) and multiplies(spec.orthogonalize) and writes_add_up(spec)


def is_causal(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.causal`: attention to single tokens, or inside short chunks."""
    short = spec.visibility == "token" or has_short_chunks(spec)
    gates = not spec.gates or (not spec.momentum and spec.visibility == "token" and spec.chunk == 1)
    known = is_a(spec.network, Linear, GLU) and not spec.extensions and spec.visibility != "full"
    return known and spec.orthogonalize is None and short and gates and writes_add_up(spec)


def is_recurrent(spec: InnerLoop) -> bool:
    """Whether an inner loop is one of `kvbind.kernels.recurrent`: an update of every matrix, chunk after chunk."""
    if not is_a(spec.network, SwiGLU, Linear) or spec.extensions or spec.loss != "dot" or spec.steps > 1 or spec.clip:
        return False
    if spec.normalize == "read" or spec.visibility == "token" or has_short_chunks(spec):
        return False
    return multiplies(spec.orthogonalize)


def is_a(network: Network, *kinds: type[Network]) -> bool:
    """Whether a network is of one of these classes itself; one derived from them may compute anything."""
    return type(network) in kinds


def writes_add_up(spec: InnerLoop) -> bool:
    """Whether the last layer alone is updated, once per chunk, by writes that do not read it."""
    theta = spec.network.theta if spec.update == "all" else ()
    return not theta and spec.loss == "dot" and spec.steps == 1 and not spec.clip and not spec.normalize


def updates_once(spec: InnerLoop) -> bool:
    """Whether nothing but clipping stands between one step's gradient and the weights."""
    return not spec.extensions and not spec.gates and not spec.normalize and spec.steps == 1


def has_short_chunks(spec: InnerLoop) -> bool:
    """Whether chunks are shorter than a tile."""
    return spec.chunk is not None and spec.chunk < SHORT_CHUNK


def multiplies(rule: NewtonSchulz | None) -> bool:
    """Whether kernels have products in the precision of Newton-Schulz, where there is one."""
    return rule is None or rule.dtype in (torch.bfloat16, torch.float16, torch.float32)


# What is given: operands of a call, of an inner loop that a row covers.


def fits(call: Operands) -> bool:
    """Whether kernels run on a call's device and dtypes at all."""
    q, tokens = call.q, call.tokens
    if not runs_on(q.device) or q.dtype not in DTYPES or len({q.dtype, tokens.k.dtype, tokens.v.dtype}) > 1:
        return False
    return call.state.dtype == torch.float32 and q.numel() > 0


def fits_matrix_units(call: Operands) -> bool:
    """Whether a call `fits`, and every width is one that a matrix unit takes."""
    if not fits(call):
        return False
    return min(call.q.shape[-1], *call.state.tensors["weights.out"].shape[-2:]) >= NARROWEST


def has_pending(call: Operands) -> bool:
    """Whether a sequence has tokens of an incomplete chunk."""
    return any(call.state.pending_lengths)


def mini_batches_take(spec: InnerLoop, call: Operands) -> bool:
    """Whether at least one mini-batch is completed, in dtypes and widths that the kernel takes."""
    tokens = call.tokens
    q, k, v = call.q, tokens.k, tokens.v
    if not runs_on(q.device) or len({q.dtype, k.dtype, v.dtype}) > 1 or call.state.dtype != torch.float32:
        return False
    assert isinstance(spec.refresh, int)
    if call.state.pending_lengths[0] + len(tokens) < spec.refresh:
        return False
    from kvbind.kernels.mini_batches.operator import covers

    hidden = call.state.tensors["weights.out"].shape[-2] if spec.network.theta else 0
    return covers(q.dtype, spec.refresh, k.shape[-1], hidden, v.shape[-1], spec.momentum, is_roomy(q.device))


def affine_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether `delta.call_obstacle` has nothing against a call."""
    return delta.call_obstacle(spec, call) is None


def full_glu_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether heads are narrow enough, and some tokens write."""
    if not fits(call) or call.tokens.count == 0:
        return False
    from kvbind.kernels.full_glu.operator import covers

    return covers(call.tokens.k.shape[-1], call.tokens.v.shape[-1], call.q.dtype)


def full_conv_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether heads are narrow enough, and all places of the grid write."""
    if not fits(call) or call.tokens.count != call.q.shape[2]:
        return False
    from kvbind.kernels.full_conv.operator import covers

    return covers(call.q.shape[-1], call.q.dtype)


def full_chunk_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether all tokens that write can be one chunk; of gates, masked tokens have none that counts."""
    gated_mask = call.tokens.mask is not None and bool(spec.gates)
    return not gated_mask and call.tokens.count > 0 and fits_matrix_units(call)


def chunked_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether operands fit matrix units."""
    return fits_matrix_units(call)


def chunked_takes_packed(spec: InnerLoop, call: Operands) -> bool:
    """Whether operands fit, and no packed sequence has tokens pending."""
    return not has_pending(call) and fits_matrix_units(call)


def chunked_takes_slice(spec: InnerLoop, call: Operands) -> bool:
    """Whether the slice of a row that is cut over ranks runs on `kvbind.kernels.chunked`, exchanges included."""
    # a GLU's gates are made of each sequence's own matrix, without tables
    alike = call.cu_seqlens is None or len(call.cu_seqlens) == 2 or not isinstance(spec.network, GLU)
    return alike and is_chunked(spec) and fits_matrix_units(call)


def causal_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether heads are narrow enough, and nothing is pending."""
    narrow = max(call.q.shape[-1], call.tokens.v.shape[-1]) <= WIDEST_CAUSAL
    return narrow and not has_pending(call) and fits_matrix_units(call)


def causal_takes_packed(spec: InnerLoop, call: Operands) -> bool:
    """Whether chunks are single tokens, besides."""
    return spec.chunk == 1 and causal_takes(spec, call)


def recurrent_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether at least one chunk is completed, in widths that the kernels take."""
    if not recurrent_fits(spec, call) or spec.chunk is None:
        return False
    return call.state.pending_lengths[0] + len(call.tokens) >= spec.chunk


def recurrent_fits(spec: InnerLoop, call: Operands) -> bool:
    """Whether operands are in widths that the kernels take."""
    if call.q.shape[0] * call.q.shape[1] > MOST_RECURRENT or not fits_matrix_units(call):
        return False
    from kvbind.kernels.recurrent.operator import covers

    return covers(call.q.dtype, call.q.shape[-1], *call.state.tensors["weights.out"].shape[-2:])


def full_recurrent_takes(spec: InnerLoop, call: Operands) -> bool:
    """Whether all tokens that write can be one chunk, in widths that the kernels take."""
    return full_chunk_takes(spec, call) and recurrent_fits(spec, call)


@dataclass(frozen=True)
class Kernel:
    """A row of `KERNELS`.

    Attributes:
        folder: of `kvbind.kernels`.
        form: that it computes: "recurrent", "parallel" or "dual", or "full" for any form under `visibility="full"`.
        covers: whether it computes an inner loop, by its fields alone.
        takes: whether it takes a call's operands, of an inner loop that it covers.
        run: runs such a call.
        packed: whether it takes packed sequences of any lengths in one go; None for never.
    """

    folder: str
    form: Literal["recurrent", "parallel", "dual", "full"]
    covers: Callable[[InnerLoop], bool]
    takes: Callable[[InnerLoop, Operands], bool]
    run: Engine
    packed: Callable[[InnerLoop, Operands], bool] | None = None


KERNELS = (
    #      folder          form         inner loops      calls                 run                 packed calls
    Kernel("affine",       "parallel",  is_affine,       affine_takes,         run_affine,         affine_takes),
    Kernel("chunked",      "parallel",  is_chunked,      chunked_takes,        run_chunked,        chunked_takes_packed),
    Kernel("causal",       "parallel",  is_causal,       causal_takes,         run_causal,         causal_takes_packed),
    Kernel("mini_batches", "dual",      is_mini_batched, mini_batches_take,    run_mini_batches),
    Kernel("mini_batches", "parallel",  is_linear_memory, mini_batches_take,   run_mini_batches),
    Kernel("recurrent",    "recurrent", is_recurrent,    recurrent_takes,      run_recurrent),
    Kernel("full_glu",     "full",      is_full_glu,     full_glu_takes,       run_full_glu),
    Kernel("full_conv",    "full",      is_full_conv,    full_conv_takes,      run_full_conv),
    Kernel("chunked",      "full",      is_chunked,      full_chunk_takes,     run_chunked),
    Kernel("recurrent",    "full",      is_recurrent,    full_recurrent_takes, run_full_recurrent),
)  # fmt: skip
"""What there is, in the order in which it is asked; the first row that takes a call runs it."""
