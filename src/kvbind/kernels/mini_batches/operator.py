"""The operator of mini-batches: its checks, its registrations with PyTorch, and its launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvbind.kernels.common.devices import is_roomy, on_device_of
from kvbind.kernels.common.operands import cdiv, dot_precision, power_of_2
from kvbind.kernels.launching import dispatcher
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.mini_batches.read_gradients import read_gradients_kernel
from kvbind.kernels.mini_batches.reads import reads_kernel
from kvbind.kernels.mini_batches.state_gradients import state_gradients_kernel
from kvbind.kernels.mini_batches.states import states_kernel

MOST_TOKENS = 64
"""The longest mini-batch."""

LEAST_TOKENS = 16
"""Tokens of the smallest tile of a matrix unit."""

MOST_WIDTH = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
"""The widest head."""

MOST_REGISTERS = 255
"""Of a thread, as of any. Where it is not said, `ptxas` 12.8 gave large kernels without `wgmma` 32 of them."""

SEGMENT = 64
"""Mini-batches whose states are held at once in the forward pass."""

MOST_NUMBERS = {torch.bfloat16: 1 << 15, torch.float16: 1 << 15, torch.float32: 1 << 13}
"""Of a state's matrices and their buffers: what registers hold, where products of float32 have operands too."""

MOST_IN_TILE = {torch.bfloat16: 1 << 13, torch.float16: 1 << 13, torch.float32: 1 << 12}
"""Numbers of a mini-batch's tokens in the widest layer."""


def mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    rates: Tensor,
    *,
    size: int,
    hidden: int = 0,
    activation: str = "identity",
    bias: bool = False,
    shares: Tensor | None = None,
    head: Tensor | None = None,
    eps: float = 1e-6,
    squared: bool = True,
    in_loss: bool = True,
    in_read: bool = True,
    residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run whole mini-batches of one layer or two, gradients taken at each one's starting weights.

    Args:
        q: what is read, `[B, T, H, Dk]`; bfloat16, float16 or float32.
        k: keys `[B, T, H, Dk]` in q's dtype.
        v: values `[B, T, H, Dv]` in q's dtype.
        state: starting weights in one piece, float32 `[B, H, S]`: the hidden layer's matrix `[Dk, Dh]` and bias `[Dh]`, the
            last layer's `[Dh, Dv]` (or `[Dk, Dv]`) and `[Dv]`, and then in the same order the momentum buffers, each where
            there is such a thing.
        rates: learning rates of the matrices, float32 `[B, T, H, layers]`, negative for ascent; or with those of the biases
            behind them, `[B, T, H, 2 layers]`.
        size: tokens of a mini-batch, of which T is a multiple.
        hidden: hidden width Dh, or 0 for one layer.
        activation: what stands behind the hidden layer, a name that `kvbind.kernels.common.activations` knows.
        bias: layers have biases.
        shares: what a token t sees, float32 and one of: None, all that its mini-batch wrote up to it; `[B, T, H, 1]`, so
            much of that; `[B, T, H, size + 1]`, so much of what each token of its mini-batch wrote, 0 from t + 1 on, and of
            the state before them; `[B, T, H, size + 4]`, so much also of the momentum buffer before them, then how much of
            what t writes is in the buffer behind the mini-batch, and how much of the buffer before the mini-batch is in that
            behind t. The state behind a mini-batch is that which its last token sees.
        head: gain and shift of the head, float32 `[B, H, 2, Dv]`, or None for no head.
        eps: added to the head's variance.
        squared: the loss is the squared error and not the dot product.
        in_loss: the head is in the loss.
        in_read: outputs pass the head.
        residual: the head adds the network's input, for which Dk = Dv.

    Returns:
        Outputs `[B, T, H, Dv]` in q's dtype, and the state after the last mini-batch.

    Raises:
        ValueError: T is no positive multiple of `size`, or sizes or dtypes are not such as `covers` says.
    """
    momentum = shares is not None and shares.shape[-1] == size + 4
    widths = q.shape[-1], hidden, v.shape[-1]
    if not covers(q.dtype, size, *widths, momentum, is_roomy(q.device)) or len({x.dtype for x in (q, k, v)}) > 1:
        raise ValueError(
            f"q, k and v must be of one dtype, all widths powers of two from 16 to that one's {MOST_WIDTH}, states within "
            f"{MOST_NUMBERS}, tiles within {MOST_IN_TILE}, and size from 2 to {MOST_TOKENS}; got {q.dtype} {list(q.shape)}, "
            f"{v.dtype} {list(v.shape)}, hidden={hidden} and {size}"
        )
    if not q.shape[1] or q.shape[1] % size:
        raise ValueError(f"q must have a positive multiple of size={size} tokens; got {q.shape[1]}")
    operands = (q, k, v, state, rates, head, shares)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    headed = head is not None
    out, end, _ = dispatcher.call(
        _forward, *(None if x is None else x.contiguous() for x in operands), size, hidden, activation, bias, float(eps),
        squared, in_loss and headed, in_read and headed, residual and headed, keep,
    )  # fmt: skip
    return out, end


def covers(
    dtype: torch.dtype, size: int, key_width: int, hidden: int, value_width: int, momentum: bool = False, roomy: bool = True
) -> bool:
    """Whether `mini_batches` takes operands of `dtype` and of these widths, in mini-batches of `size` tokens.

    With less shared memory than `is_roomy` asks for, the largest states have at most 64 channels.
    """
    most = MOST_WIDTH.get(dtype, 0)
    narrow = min(key_width, value_width) >= 16 and max(key_width, value_width) <= most
    tiles = all(width == power_of_2(width) for width in (key_width, value_width, hidden or 16))
    if not narrow or not tiles or (hidden and hidden < 16) or not 1 < size <= MOST_TOKENS:
        return False
    numbers, tile = _numbers(key_width, hidden, value_width, momentum), _rows(size) * max(key_width, hidden, value_width)
    room = MOST_NUMBERS[dtype] if roomy or max(key_width, value_width) <= 64 else MOST_NUMBERS[dtype] // 2
    return numbers <= room and tile <= MOST_IN_TILE[dtype]


def _rows(size: int) -> int:
    """Rows of a tile with so many tokens."""
    return max(LEAST_TOKENS, power_of_2(size))


def _numbers(key_width: int, hidden: int, value_width: int, momentum: bool) -> int:
    """How many numbers the matrices of a state have."""
    layers = key_width * hidden + (hidden or key_width) * value_width
    return 2 * layers if momentum else layers


_launch_states, _launch_reads = Launcher(states_kernel), Launcher(reads_kernel)
_launch_read_gradients, _launch_state_gradients = Launcher(read_gradients_kernel), Launcher(state_gradients_kernel)


def _warps(numbers: int) -> dict[str, int]:
    """Warps of a program of each kernel, for a state of so many numbers."""
    return {
        "states": 8 if numbers > 1 << 14 else max(2, min(4, numbers // 1024)),
        "reads": 4 if numbers < 1 << 14 else 8,
        "read_gradients": 4 if numbers < 1 << 14 else 8,
        "state_gradients": max(2, min(8, numbers // 512)),
    }


def _constants(
    q: Tensor, v: Tensor, state: Tensor, rates: Tensor, head: Tensor | None, shares: Tensor | None, size: int, hidden: int,
    activation: str, bias: bool, squared: bool, in_loss: bool, in_read: bool, residual: bool,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of each kernel."""
    width, value_width = q.shape[-1], v.shape[-1]
    flow = 0 if shares is None else {1: 1, size + 1: 2, size + 4: 3}[shares.shape[-1]]
    own = rates.shape[-1] == (4 if hidden else 2)
    shared: dict[str, Any] = {
        "SIZE": size, "L": _rows(size), "DK": width, "DH": hidden, "DV": value_width,
        "ACTIVATION": activation, "BIAS": bias, "OWN": own, "RATES": rates.shape[-1], "FLOW": flow, "HEAD": head is not None,
        "SQUARED": squared, "IN_LOSS": in_loss, "IN_READ": in_read, "RESIDUAL": residual,
        "PRECISION": _precision(q.dtype), "maxnreg": MOST_REGISTERS,
    }  # fmt: skip
    warps = _warps(_numbers(width, hidden, value_width, flow == 3))
    # what `states` loads is fetched a mini-batch ahead; more than it has no room for that
    found = {name: shared | {"num_warps": warps[name], "num_stages": 2 if name == "states" else 1} for name in warps}
    wide = shared["L"] * (5 * value_width + width + 6 * hidden + 1) + 2 * value_width
    narrow = shared["L"] * (2 * value_width + 4 * hidden)
    for name in ("read_gradients", "state_gradients"):
        found[name] |= {"WIDE": wide, "NARROW": narrow}
    return found


def _precision(dtype: torch.dtype) -> str:
    """Of products: three of TF32 in place of one of float32, for which there are no matrix units."""
    precision = dot_precision(dtype)
    return "tf32x3" if dtype == torch.float32 and precision == "ieee" else precision


def _stretches(count: int) -> tuple[int, int]:
    """Mini-batches of a stretch, and how many stretches there are: about as many of both, so that least is saved."""
    each = max(1, math.isqrt(count))
    return each, cdiv(count, each)


@torch.library.custom_op("kvbind::mini_batches", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, rates: Tensor, head: Tensor | None, shares: Tensor | None, size: int,
    hidden: int, activation: str, bias: bool, eps: float, squared: bool, in_loss: bool, in_read: bool, residual: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    out, end, starts = _outcome(v, state, size, keep)
    count = tokens // size
    each, stretches = _stretches(count)
    constants = _constants(
        q, v, state, rates, head, shares, size, hidden, activation, bias, squared, in_loss, in_read, residual
    )
    head, shares = (rates if x is None else x for x in (head, shares))
    room, bias_room = _room(q, v, min(count, SEGMENT), hidden, constants)
    with on_device_of(q):
        for first in range(0, count, SEGMENT):
            length = min(SEGMENT, count - first)
            _launch_states[(batch * heads,)](
                k, v, rates, head, shares, end if first else state, end, room, bias_room, starts, state.shape[-1],
                tokens, heads, first, length, each, stretches, eps, **constants["states"], KEEP=keep, END=True,
            )  # fmt: skip
            _launch_reads[(batch * heads, length)](
                q, k, v, rates, head, shares, room, bias_room, out, tokens, heads, first, length, eps, **constants["reads"]
            )
    return out, end, starts


def _room(q: Tensor, v: Tensor, count: int, hidden: int, constants: dict[str, dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Room for the states before so many mini-batches: matrices in q's dtype, biases."""
    batch, _, heads, width = q.shape
    momentum = constants["states"]["FLOW"] == 3
    numbers = _numbers(width, hidden, v.shape[-1], momentum)
    biases = (hidden + v.shape[-1]) * (1 + momentum)
    return q.new_empty((batch * heads, count, numbers)), q.new_empty((batch * heads, count, biases), dtype=torch.float32)


def _outcome(v: Tensor, state: Tensor, size: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `_forward` returns."""
    stretches = _stretches(v.shape[1] // size)[1] if keep else 0
    batch, heads, numbers = state.shape
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(state, memory_format=torch.contiguous_format),
        state.new_empty((batch, heads, stretches, numbers)),
    )


@_forward.register_fake
def _(
    q, k, v, state, rates, head, shares, size, hidden, activation, bias, eps, squared, in_loss, in_read, residual, keep
):  # fmt: skip
    return _outcome(v, state, size, keep)


@torch.library.custom_op("kvbind::mini_batches_backward", mutates_args=())
def _backward(
    d_out: Tensor | None, d_end: Tensor | None, starts: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor,
    rates: Tensor, head: Tensor | None, shares: Tensor | None, size: int, hidden: int, activation: str, bias: bool,
    eps: float, squared: bool, in_loss: bool, in_read: bool, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    each, stretches = _stretches(tokens // size)
    dq, dk, dv, d_state, d_rates, d_head, d_shares = found = _gradients(q, k, v, state, rates, head, shares)
    d_out = torch.zeros_like(v) if d_out is None else d_out.to(v.dtype).contiguous()
    d_state.zero_() if d_end is None else d_state.copy_(d_end)
    d_head.zero_()
    constants = _constants(
        q, v, state, rates, head, shares, size, hidden, activation, bias, squared, in_loss, in_read, residual
    )
    head, shares = (rates if x is None else x for x in (head, shares))
    room, bias_room = _room(q, v, each, hidden, constants)
    # what goes from one kernel to the other
    wide = rates.new_empty(batch * heads, each, constants["read_gradients"]["WIDE"])
    narrow = q.new_empty(batch * heads, each, constants["read_gradients"]["NARROW"])
    with on_device_of(q):
        for place in reversed(range(stretches)):
            first = place * each
            length = min(each, tokens // size - first)
            _launch_states[(batch * heads,)](
                k, v, rates, head, shares, starts[:, :, place:], d_state, room, bias_room, starts,
                stretches * state.shape[-1], tokens, heads, first, length, each, stretches, eps, **constants["states"],
                KEEP=False, END=False,
            )  # fmt: skip
            _launch_read_gradients[(batch * heads, length)](
                d_out, q, k, v, rates, head, shares, room, bias_room, wide, narrow, dq, d_shares,
                tokens, heads, first, length, eps, **constants["read_gradients"],
            )  # fmt: skip
            _launch_state_gradients[(batch * heads,)](
                q, k, rates, head, shares, room, bias_room, wide, narrow, dk, dv, d_state, d_rates, d_head, d_shares,
                tokens, heads, first, length, eps, **constants["state_gradients"],
            )  # fmt: skip
    return found


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, rates: Tensor, head: Tensor | None, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of these; of what is None, nothing."""
    given = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, state, rates))
    return *given, *(rates.new_empty(0 if x is None else x.shape) for x in (head, shares))  # type: ignore[return-value]


@_backward.register_fake
def _(
    d_out, d_end, starts, q, k, v, state, rates, head, shares, size, hidden, activation, bias, eps, squared, in_loss,
    in_read, residual,
):  # fmt: skip
    return _gradients(q, k, v, state, rates, head, shares)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.keep = inputs
    ctx.static = operands[7:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *operands[:7])


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise RuntimeError("kvbind::mini_batches was called with keep=False, so that it has no gradient")
    saved = ctx.saved_tensors
    found = dispatcher.call(_backward, grads[0], grads[1], *saved, *ctx.static)
    wanted = (d if x is not None else None for d, x in zip(found, saved[1:], strict=True))
    return *wanted, *(None,) * (len(ctx.static) + 1)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
