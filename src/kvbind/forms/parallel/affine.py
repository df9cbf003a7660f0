"""The parallel form of inner loops whose state is an affine function of their writes: one triangular system per block.

Where the last layer alone is trained, once per update and without renormalization, state and momentum buffer after any
number of updates are sums of what they started from and of the writes so far, with products of gates as coefficients:

    M_t = b_t S + f_t D + sum_(j <= t) G_tj k_j^T U_j

A write under the dot loss is `U_i = r_i v_i`. Under the squared loss it reads the state, `U_i = r_i (v_i - e_i M_p(i))`,
where p(i) is the last point up to i at which gradients are renewed. Putting the first equation into the second gives one
unit lower triangular system for a block of tokens, `(I + N) U = r (v - e (b S + f D))`. Reads are then attention to the
block's own writes plus a read of S and D, and S and D after the block are linear in U.

Instances: the delta rule in its WY representation (arXiv 2406.06484), gated (2412.06464), with gates per key channel
(2312.06635, 2510.26692), products of several steps per token (2502.10297), mini-batches with a rate of the reader
(2407.04620), momentum (2501.00663), windows (2505.23735).

Nothing here knows an inner loop: operands are features of the last layer, and `AffineRule` says how they are combined.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbind.forms.parallel.affine_blocks import BlockLayout, Part, parts
from kvbind.forms.parallel.affine_flow import Rows, apart, flow_of
from kvbind.forms.parallel.affine_operands import AffineRule, AffineState, Columns, Gates, check
from kvbind.forms.parallel.finite import known_finite, seen_product, spoilt


def affine(
    rule: AffineRule, q: Tensor | None, columns: Columns, gates: Gates, state: AffineState
) -> tuple[Tensor, AffineState]:
    """Run columns from a refresh point on.

    Computed in the weights' dtype, or in float32 where that is narrower.

    Args:
        rule: how columns enter the state and are read.
        q: features that are read, `[B, H, N / writes, F]`; None to read nothing.
        columns: the N columns.
        gates: theirs.
        state: the state at the first column, which is a refresh point.

    Returns:
        Outputs `[B, H, N / writes, Dv]` (empty where nothing is read), and the state at the last refresh point, or with
        `refresh=None` after the last complete update: columns behind it have been read but are still to be written.

    Raises:
        ValueError: gates that the rule excludes.
    """
    check(rule, len(columns), gates, state.buffers.shape[2])
    dtype = torch.promote_types(state.weights.dtype, torch.float32)
    columns = columns.map(lambda x: x.to(dtype))
    if rule.history:
        columns = columns.after(state.recent, rule.history)
    run = _AffineRun(
        rule, None if q is None else q.to(dtype), columns, gates, state.weights.to(dtype), state.buffers.to(dtype)
    )
    total, outputs = len(columns) - rule.history, []
    end, whole = run, 0
    for part in parts(rule, total, gates):
        output, run = run.part(part)
        outputs.append(output)
        if part.complete:
            end, whole = run, part.stop
    weights = end.weights
    if gates.read_rate is not None and rule.refresh is None and end.renewed is not None:
        weights = end.renewed + left_by(rule, gates, whole) * (weights - end.renewed)
    recent = columns.span(whole, whole + rule.history) if rule.history else None
    output = torch.cat(outputs, dim=2) if outputs and q is not None else columns.v[:, :, :0]
    return output, AffineState(weights, end.buffers, recent)


def left_by(rule: AffineRule, gates: Gates, whole: int) -> Tensor:
    """What share of its writes a span leaves whose state stops behind `whole` columns, `[B, H, 1, 1]`."""
    assert gates.read_rate is not None
    return gates.read_rate[:, :, whole // rule.writes - 1, None, None]


@dataclass(frozen=True)
class _AffineRun:
    """A call under way: its operands, and the state where it stands.

    Attributes:
        rule, q, columns, gates: of the call, the columns behind those of the window.
        weights: the last layer.
        buffers: those of `AffineState`.
        renewed: the last layer at the last refresh point; None before the first.
    """

    rule: AffineRule
    q: Tensor | None
    columns: Columns
    gates: Gates
    weights: Tensor
    buffers: Tensor
    renewed: Tensor | None = None

    def part(self, part: Part) -> tuple[Tensor, _AffineRun]:
        """Outputs `[B, H, R, Dv]` of one part, and where the call then stands."""
        rule, layout = self.rule, BlockLayout(self.rule, part, self.weights.device)
        columns = self.columns.map(layout.windows)
        k, v, e = columns.k, columns.v, columns.k if columns.e is None else columns.e
        rate = columns.rate[..., None] if isinstance(columns.rate, Tensor) else columns.rate
        gates = self.gates.of(rule, part, self.weights.dtype)
        flow = flow_of(rule, gates, layout, k, self.buffers.shape[2])

        solved: tuple[Tensor, ...] = ()
        free = rule.loss == "dot"
        if free:
            v = rate * v
        else:
            if rule.before and gates.decay is not None:
                factor = gates.decay.factor()
                e = e * (factor if factor.dim() == 5 else factor[..., None])[..., layout.update, :]
            if part.spans > 1:
                solved = _writes(flow.rows(e, layout.residuals, k), v, rate, layout.first < layout.residuals[:, None])

        weights, buffers, renewed = self.weights, self.buffers, self.renewed
        rates = None if gates.read_rate is None else gates.read_rate[..., None]
        # taken apart at once: the gradient of taking one block out of a tensor is as large as the tensor
        count = part.blocks
        per_block = zip(*(apart(x, count) for x in (k, v, e, rate, rates)), *(apart(x, count) for x in solved), strict=True)
        states, renewals, buffered, writes = [], [], [], []
        for b, (moved, (its_k, own, its_e, its_rate, its_read_rate, *its_solved)) in enumerate(
            zip(flow.moves(count), per_block, strict=True)
        ):
            if part.renews == "all" or (part.renews == "first" and not b):
                renewed = weights
            states.append(weights)
            buffered.append(buffers)
            if its_solved:
                own, on_state, *on_buffers = its_solved
                own = own - on_state @ weights
                for x, buffer in zip(on_buffers, buffers.unbind(2), strict=True):
                    own = own - x @ buffer
            elif not free:
                assert renewed is not None
                own = its_rate * (own - its_e @ renewed)
            writes.append(own)
            weights, buffers = moved.step(its_k, own, weights, buffers)
            if rates is not None:
                assert renewed is not None
                renewals.append(renewed)
                if part.ends and (part.renews == "all" or b == count - 1):
                    weights = renewed + its_read_rate[:, :, -1:] * (weights - renewed)
        after = replace(self, weights=weights, buffers=buffers, renewed=renewed)
        if self.q is None:
            return v[:, :, 0, :0], after

        q = layout.blocks(self.q[:, :, part.start // rule.writes : part.stop // rule.writes])
        on_state, on_buffers, on_writes = flow.reads(q, k)
        output = seen_product(torch.where(layout.seen, on_writes, 0.0), torch.stack(writes, 2), layout.seen)
        started = torch.stack(states, 2)
        for x, held in zip(on_buffers, torch.stack(buffered, 2).unbind(3), strict=True):
            output = output + x @ held
        if rates is None:
            output = output + on_state @ started
        else:
            base = torch.stack(renewals, 2)
            output = q @ base + rates * (output + on_state @ (started - base))
        return output.flatten(2, 3), after


def _writes(rows: Rows, v: Tensor, rate: Tensor | float, seen: Tensor) -> tuple[Tensor, ...]:
    """What the columns of blocks write: of their values, and per unit of state and of each buffer before the block.

    Args:
        rows: what their residuals read.
        v: values `[..., L, Dv]`.
        rate: a number or `[..., L, 1]`.
        seen: which columns each residual sees, bool `[L, L]`.

    Returns:
        `[..., L, Dv]`, then `[..., L, F]` for the state and each buffer.
    """
    on_state, on_buffers, among = rows
    right = [v, on_state, *on_buffers]
    solved = _solved(rate * torch.where(seen, among, 0.0), rate * torch.cat(right, dim=-1), seen)
    return solved.split([x.shape[-1] for x in right], dim=-1)


def _solved(among: Tensor, right: Tensor, seen: Tensor) -> Tensor:
    """`x` of `x + among x = right`, of which row i depends on the rows that it sees alone.

    Args:
        among: `[..., L, L]`, 0 where a row does not see.
        right: `[..., L, m]`.
        seen: bool `[L, L]`, below the diagonal.
    """
    if known_finite(among, right):
        return torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    wrong = ~(right.isfinite().all(-1) & among.isfinite().all(-1))
    among, right = (x.masked_fill(wrong[..., None], 0.0) for x in (among, right))
    solved = torch.linalg.solve_triangular(among, right, upper=False, unitriangular=True)
    # rows pass it on to all that see them
    return spoilt(solved, (wrong | (seen & wrong[..., None, :]).any(-1))[..., None])
