r"""Updates entering fast weights chunk by chunk, momentum, and the gradients of both: lines 2 and 4 to 6 of the update rule.

With update `U_c`, weights `W_c` before chunk c, decay `a_c`, and `n` the norm of an output channel at the start:

    X_c = a_c W_c + sign U_c        W_{c+1} = X_c n / (||X_c|| + eps)  with normalization, else X_c

and back, with `D = dL/dW_{c+1}`, `Y = W_{c+1} / n` and sums over the input axis,

    dX = n / (||X|| + eps) (D - Y <D, Y> (||X|| + eps) / ||X||)     dn += <D, Y>
    dU = sign dX      da = <dX, W_c>      dL/dW_c = a_c dX + (what reads and the write of chunk c add)

Momentum: `V_c = G_c + m_c V_{c-1}`, and back `dG_c = dV_c`, `dm_c = <dV_c, V_{c-1}>`, `dV_{c-1} += m_c dV_c`.

Everything is summed in float32. Weights lie as `packed_weights` says. A launch takes any number
of chunks, one after another, where what each of them adds is known beforehand. Kernels here change accumulators in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbind.kernels.common.devices import on_device_of
from kvbind.kernels.common.operands import cdiv
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.recurrent.packed_weights import PackedWeights

EPSILON = tl.constexpr(1e-5)
"""What is added to a channel's norm, as in the reference implementation."""

COLUMNS = 16
"""Output channels in a program; each holds them whole."""

BLOCK = 1024
"""Elements in a program of the momentum scans."""


@triton.jit
def _channels(KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr, THETA: tl.constexpr, IN: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """Places in packed weights of this program's channels and which exist; places of their norms and which exist."""
    each: tl.constexpr = THETA * ((HIDDEN + BN - 1) // BN)
    block = tl.program_id(0)
    is_last = block >= 2 * each
    which = tl.where(is_last, 2 * THETA, block // max(each, 1))
    width = tl.multiple_of(tl.where(is_last, VALUE, HIDDEN), 16)
    height = tl.where(is_last, HIDDEN, KEY)
    j = tl.where(is_last, block - 2 * each, block - which * each) * BN + tl.arange(0, BN)
    i = tl.arange(0, IN)
    place = which * (KEY * HIDDEN) + i[:, None] * width + j[None, :]
    return place, (i < height)[:, None] & (j < width)[None, :], which * HIDDEN + j, j < width


@Launcher
@triton.jit(do_not_specialize=["count", "heads"])
def _apply_kernel(
    weights, updates, states, decay, norms, found, count, heads, sign, update_c, state_c,
    KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr, THETA: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, IN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(1).to(tl.int64)
    place, inside, channel, exists = _channels(KEY, HIDDEN, VALUE, THETA, IN, BN)
    w = tl.load(weights + z * SIZE + place, mask=inside, other=0.0)
    start = tl.zeros((BN,), tl.float32)
    if NORMALIZE:
        start = tl.load(norms + z * CHANNELS + channel, mask=exists, other=0.0)
    updates += z * SIZE
    states += z * SIZE
    found += z * CHANNELS
    for c in range(count):
        u = tl.load(updates + place, mask=inside, other=0.0).to(tl.float32)
        if DECAY:
            w *= tl.load(decay + c * heads + z)
        w += sign * u
        if NORMALIZE:
            norm = tl.sqrt(tl.sum(w * w, 0))
            tl.store(found + channel, norm, mask=exists)
            w *= (start / (norm + EPSILON))[None, :]
            found += heads * CHANNELS
        tl.store(states + place, w.to(states.dtype.element_ty), mask=inside)
        updates += update_c
        states += state_c
    tl.store(weights + z * SIZE + place, w, mask=inside)


def apply(
    packing: PackedWeights,
    weights: Tensor,
    updates: Tensor,
    states: Tensor,
    sign: float,
    decay: Tensor | None,
    norms: Tensor | None,
    found: Tensor | None,
) -> None:
    """Enter the updates of some chunks into the weights, one after another.

    Args:
        packing: the layout.
        weights: float32 `[B*H, P]`, changed in place.
        updates: `[chunks, B*H, P]`, a slice of packed weights.
        states: where to write the weights after each chunk, `[chunks, B*H, P]`.
        sign: what updates are multiplied by.
        decay: float32 `[chunks, B*H]`, contiguous.
        norms: float32 `[B*H, Q]`, each channel's norm at the start, for normalization.
        found: where to write each channel's norm before it is scaled back, float32 `[chunks, B*H, Q]`, with `norms`.
    """
    count, z = updates.shape[:2]
    with on_device_of(weights):
        _apply_kernel[(packing.blocks(COLUMNS), z)](
            weights, updates, states, *(weights if x is None else x for x in (decay, norms, found)), count, z, sign,
            updates.stride(0), states.stride(0), **packing.widths, SIZE=packing.size, CHANNELS=packing.channels,
            NORMALIZE=norms is not None, DECAY=decay is not None, IN=packing.longest, BN=COLUMNS, num_warps=8,
        )  # fmt: skip


@Launcher
@triton.jit(do_not_specialize=["count", "heads", "blocks"])
def _apply_backward_kernel(
    grad, carry, states, reads, decay, norms, found, d_updates, d_decay, d_norms, count, heads, blocks, sign,
    state_c, read_c, update_c,
    KEY: tl.constexpr, HIDDEN: tl.constexpr, VALUE: tl.constexpr, THETA: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, READ_AFTER: tl.constexpr,
    IN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(1).to(tl.int64)
    place, inside, channel, exists = _channels(KEY, HIDDEN, VALUE, THETA, IN, BN)
    d = tl.load(grad + z * SIZE + place, mask=inside, other=0.0)
    start, d_start, inverse = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    if NORMALIZE:
        start = tl.load(norms + z * CHANNELS + channel, mask=exists, other=0.0)
        d_start = tl.load(d_norms + z * CHANNELS + channel, mask=exists, other=0.0)
        # channels that start at zero stay there
        inverse = tl.where(start > 0, 1 / tl.where(start > 0, start, 1.0), 0.0)
    for back in range(count):
        c = (count - 1 - back).to(tl.int64)
        if READ_AFTER:
            d += tl.load(reads + c * read_c + z * SIZE + place, mask=inside, other=0.0)
        if NORMALIZE:
            y = tl.load(states + (c + 1) * state_c + z * SIZE + place, mask=inside, other=0.0).to(tl.float32)
            y *= inverse[None, :]
            along = tl.sum(d * y, 0)
            d_start += along
            norm = tl.load(found + (c * heads + z) * CHANNELS + channel, mask=exists, other=0.0)
            some = norm > 0
            along = tl.where(some, along * (norm + EPSILON) / tl.where(some, norm, 1.0), 0.0)
            d = (start / (norm + EPSILON))[None, :] * (d - y * along[None, :])
        update = d_updates + c * update_c + z * SIZE + place
        tl.store(update, (sign * d).to(d_updates.dtype.element_ty), mask=inside)
        if DECAY:
            w = tl.load(states + c * state_c + z * SIZE + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_decay + (c * heads + z) * blocks + tl.program_id(0), tl.sum(tl.sum(d * w, 1), 0))
            d *= tl.load(decay + c * heads + z)
        if not READ_AFTER:
            d += tl.load(reads + c * read_c + z * SIZE + place, mask=inside, other=0.0)
    tl.store(carry + z * SIZE + place, d, mask=inside)
    if NORMALIZE:
        tl.store(d_norms + z * CHANNELS + channel, d_start, mask=exists)


def apply_backward(
    packing: PackedWeights,
    grad: Tensor,
    carry: Tensor,
    states: Tensor,
    reads: Tensor,
    d_updates: Tensor,
    sign: float,
    read_after: bool,
    decay: Tensor | None,
    norms: Tensor | None,
    found: Tensor | None,
    d_norms: Tensor | None,
) -> Tensor | None:
    """The gradient of `apply`, from the last of some chunks to the first.

    Args:
        packing: the layout.
        grad: gradient of the weights after them, float32 `[B*H, P]`.
        carry: where to write that of the weights before them; may be `grad`.
        states: weights before each chunk and after the last, `[chunks + 1, B*H, P]`.
        reads: gradients of the weights that each chunk's tokens read, float32 `[chunks, B*H, P]`.
        d_updates: where to write the updates' gradients, `[chunks, B*H, P]`.
        sign: as `apply` took it.
        read_after: tokens read the weights after their chunk, not before it.
        decay: as `apply` took it.
        norms: as `apply` took it.
        found: as `apply` wrote it.
        d_norms: the gradient of `norms`, float32 `[B*H, Q]`, added to in place.

    Returns:
        The gradient of `decay`, or None.
    """
    count, z = d_updates.shape[:2]
    blocks = packing.blocks(COLUMNS)
    d_decay = None if decay is None else torch.empty(count, z, blocks, dtype=torch.float32, device=grad.device)
    optional = (grad if x is None else x for x in (decay, norms, found))
    with on_device_of(grad):
        _apply_backward_kernel[(blocks, z)](
            grad, carry, states, reads, *optional, d_updates, *(grad if x is None else x for x in (d_decay, d_norms)), count,
            z, blocks, sign, states.stride(0), reads.stride(0), d_updates.stride(0), **packing.widths, SIZE=packing.size,
            CHANNELS=packing.channels, NORMALIZE=norms is not None, DECAY=decay is not None, READ_AFTER=read_after,
            IN=packing.longest, BN=COLUMNS, num_warps=8,
        )  # fmt: skip
    return None if d_decay is None else d_decay.sum(-1)


@Launcher
@triton.jit(do_not_specialize=["count", "heads"])
def _momentum_kernel(velocity, gradients, gates, velocities, count, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    z, heads = tl.program_id(1).to(tl.int64), heads.to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    place += z * SIZE
    v = tl.load(velocity + place, mask=inside, other=0.0)
    for c in range(count):
        v = tl.load(gradients + place, mask=inside, other=0.0) + tl.load(gates + c * heads + z) * v
        tl.store(velocities + place, v.to(velocities.dtype.element_ty), mask=inside)
        gradients += heads * SIZE
        velocities += heads * SIZE
    tl.store(velocity + place, v, mask=inside)


def momentum_forward(velocity: Tensor, gradients: Tensor, gates: Tensor, velocities: Tensor) -> None:
    """Momentum over some chunks.

    Args:
        velocity: float32 `[B*H, P]`, changed in place.
        gradients: float32 `[chunks, B*H, P]`, contiguous.
        gates: float32 `[chunks, B*H]`, contiguous.
        velocities: where to write each chunk's velocity, `[chunks, B*H, P]`, contiguous.
    """
    count, z, size = gradients.shape
    with on_device_of(velocity):
        _momentum_kernel[(cdiv(size, BLOCK), z)](
            velocity, gradients, gates, velocities, count, z, SIZE=size, BLOCK=BLOCK, num_warps=4
        )


@Launcher
@triton.jit(do_not_specialize=["count", "heads", "blocks"])
def _momentum_backward_kernel(
    d_velocity, d_velocities, velocities, gates, d_gradients, d_gates, count, heads, blocks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    z, heads = tl.program_id(1).to(tl.int64), heads.to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    place += z * SIZE
    d = tl.load(d_velocity + place, mask=inside, other=0.0)
    for back in range(count):
        c = (count - 1 - back).to(tl.int64)
        at = c * heads * SIZE + place
        d += tl.load(d_velocities + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_gradients + at, d.to(d_gradients.dtype.element_ty), mask=inside)
        before = tl.load(velocities + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_gates + (c * heads + z) * blocks + tl.program_id(0), tl.sum(d * before, 0))
        d *= tl.load(gates + c * heads + z)
    tl.store(d_velocity + place, d, mask=inside)


def momentum_backward(
    d_velocity: Tensor, d_velocities: Tensor, velocities: Tensor, gates: Tensor, d_gradients: Tensor
) -> Tensor:
    """The gradient of `momentum_forward`, from the last of some chunks to the first.

    Args:
        d_velocity: gradient of the velocity after them, float32 `[B*H, P]`; in place becomes that of the velocity before.
        d_velocities: gradient of each chunk's velocity through its update, `[chunks, B*H, P]`, contiguous.
        velocities: the velocity before each chunk, `[chunks, B*H, P]`, contiguous.
        gates: as `momentum_forward` took them.
        d_gradients: where to write the chunks' gradients' gradients, `[chunks, B*H, P]`, contiguous.

    Returns:
        The gradient of the gates.
    """
    count, z, size = d_velocities.shape
    blocks = cdiv(size, BLOCK)
    d_gates = torch.empty(count, z, blocks, dtype=torch.float32, device=d_velocity.device)
    with on_device_of(d_velocity):
        _momentum_backward_kernel[(blocks, z)](
            d_velocity, d_velocities, velocities, gates, d_gradients, d_gates, count, z, blocks,
            SIZE=size, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return d_gates.sum(-1)
