"""How the update enters the weights, and its gradient: inside one program, or from the parts of several."""

import triton
import triton.language as tl

from kvbind.kernels.full_glu.tiles import column_norms


@triton.jit
def enter(w, update, sign, norms, width, CLIP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The weights after an update; the norms of its columns go to `norms`."""
    if CLIP:
        norm = column_norms(update)
        columns = width + tl.arange(0, COLUMNS)
        tl.store(norms + columns, norm, mask=columns < WIDTH)
        update = update / (norm + 1.0)[None, :]
    return w + sign * update


@triton.jit
def enter_backward(d, w, new, sign, scale, norms, width, CLIP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of the update, before its constant rate `scale`, from that of the new weights."""
    d = sign * d
    if CLIP:
        columns = width + tl.arange(0, COLUMNS)
        norm = tl.load(norms + columns, mask=columns < WIDTH, other=0.0)
        clipped = sign * (new - w)
        along = tl.sum(d * clipped, axis=0) / tl.where(norm > 0.0, norm, 1.0)
        d = d / (norm + 1.0)[None, :] - clipped * along[None, :]
    return scale * d


@triton.jit
def _add_parts(partial, parts, at, there, size, ROWS: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """The sum over parts, `size` apart, of what lies `at`."""
    total = tl.zeros((ROWS, BN), tl.float32)
    for first in range(0, parts, BP):
        index = first + tl.arange(0, BP)
        here = (index < parts)[:, None, None] & there[None, :, :]
        each = tl.load(partial + index[:, None, None] * size + at[None, :, :], mask=here, other=0.0)
        total += tl.sum(each, axis=0)
    return total


@triton.jit(do_not_specialize=["heads", "parts"])
def enter_kernel(
    w, wg, new, newg, norms, partial, sign, heads, parts, w_batch, w_head, w_row, wg_batch, wg_head, wg_row,
    MATRICES: tl.constexpr, CLIP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add the parts of an update and enter it: a matrix and some of its columns per program."""
    program, column, which = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, tl.program_id(2)
    batch, head = program // heads, program % heads
    rows, columns = tl.arange(0, BK)[:, None], column + tl.arange(0, BN)[None, :]
    there = (rows < DK) & (columns < DV)
    at = rows * DV + columns
    partial += (program * parts * MATRICES + which) * DK * DV
    update = _add_parts(partial, parts, at, there, MATRICES * DK * DV, BK, BN, BP)
    norms += (program * MATRICES + which) * DV
    if which == 0:
        old = tl.load(w + batch * w_batch + head * w_head + rows * w_row + columns, mask=there, other=0.0)
        tl.store(new + program * DK * DV + at, enter(old, update, sign, norms, column, CLIP, DV, BN), mask=there)
    else:
        old = tl.load(wg + batch * wg_batch + head * wg_head + rows * wg_row + columns, mask=there, other=0.0)
        tl.store(newg + program * DK * DV + at, enter(old, update, sign, norms, column, CLIP, DV, BN), mask=there)


@triton.jit(do_not_specialize=["heads", "parts"])
def enter_backward_kernel(
    w, wg, new, newg, norms, dnew, dnewg, partial, dread, dupdate,
    scale_out, scale_gate, sign, heads, parts, w_batch, w_head, w_row, wg_batch, wg_head, wg_row,
    MATRICES: tl.constexpr, UPDATE_GATE: tl.constexpr, NEW_USED: tl.constexpr, NEWG_USED: tl.constexpr, CLIP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add the parts of the new weights' gradient, `dread`, and take it through the update, `dupdate`."""
    program, column, which = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, tl.program_id(2)
    batch, head = program // heads, program % heads
    rows, columns = tl.arange(0, BK)[:, None], column + tl.arange(0, BN)[None, :]
    there = (rows < DK) & (columns < DV)
    at = rows * DV + columns
    partial += (program * parts * MATRICES + which) * DK * DV
    d = _add_parts(partial, parts, at, there, MATRICES * DK * DV, BK, BN, BP)
    norms += (program * (2 if UPDATE_GATE else 1) + which) * DV
    to = (program * MATRICES + which) * DK * DV + at
    at += program * DK * DV
    if which == 0:
        if NEW_USED:
            d += tl.load(dnew + at, mask=there, other=0.0)
        old = tl.load(w + batch * w_batch + head * w_head + rows * w_row + columns, mask=there, other=0.0)
        entered = tl.load(new + at, mask=there, other=0.0)
        x = enter_backward(d, old, entered, sign, scale_out, norms, column, CLIP, DV, BN)
        tl.store(dupdate + to, x, mask=there)
    elif UPDATE_GATE:
        if NEWG_USED:
            d += tl.load(dnewg + at, mask=there, other=0.0)
        old = tl.load(wg + batch * wg_batch + head * wg_head + rows * wg_row + columns, mask=there, other=0.0)
        entered = tl.load(newg + at, mask=there, other=0.0)
        x = enter_backward(d, old, entered, sign, scale_gate, norms, column, CLIP, DV, BN)
        tl.store(dupdate + to, x, mask=there)
    tl.store(dread + to, d, mask=there)
