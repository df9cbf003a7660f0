"""What the blockwise schedule of the parallel form computes for a token: products with states, scores, a triangular system.

A block of L columns (`kvbind.forms.parallel.affine`) stands between two states. Its residuals and reads are products with
the state before it and with its own columns: a row of scores for each. Under the squared loss, unless gradients are taken at
the block's start, there is a row of one triangular system for each column too, solved for the values and for every channel
of the state and of each momentum buffer. Counted are matrix products, two operations per multiply-add, and half of that for
a triangular system; what is elementwise is not, and neither is what heads share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbind.forms.parallel.affine_blocks import parts
from kvbind.forms.parallel.affine_operands import Gates
from kvbind.forms.parallel.blockwise import rule_of
from kvbind.forms.parallel.form import runs_blockwise
from kvbind.forms.parallel.scan import ScanGate
from kvbind.inner.fields import Retention
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class BlockWork:
    """Operations per token and head.

    Attributes:
        columns: in a block, those of a window before each of its stretches included.
        tokens: of a block.
        features: of queries, keys and what residuals read at: products with the layers below the last.
        states: products of queries, residuals and writes with states and momentum buffers.
        scores: of pairs of columns: residuals with keys, queries with keys, and reads of the block's own columns.
        system: the triangular systems.
        gates: products of gates over stretches of a block, as coefficients of pairs.
    """

    columns: int
    tokens: int
    features: float
    states: float
    scores: float
    system: float
    gates: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.features + self.states + self.scores + self.system + self.gates


def block_work(spec: InnerLoop, theta: int, features: int, values: int) -> BlockWork | None:
    """What the schedule costs in the blocks of a long sequence.

    Args:
        spec: an inner loop that has a parallel form.
        theta: entries of the matrices below the last layer.
        features: channels of the last layer's input, that of a bias included.
        values: channels of its output.

    Returns:
        The costs, or None where the schedule is another one.
    """
    if spec.chunk is None or spec.visibility == "full" or not runs_blockwise(spec):
        return None
    rule = rule_of(spec, spec.chunk)
    by_channel = isinstance(spec.retention, Retention) and spec.retention.per == "key"
    some = torch.empty(1, 1, 1, device="meta")
    decay = ScanGate(some[..., None] if by_channel else some) if spec.retention else None
    gates = Gates(decay=decay, read_rate=some if spec.read_rate else None)
    # the first part of a long row is cut as all but its end are
    part = next(parts(rule, 1 << 20, gates))
    columns = part.spans * (rule.history + part.updates * part.chunk)
    tokens = part.count * part.chunk // rule.writes
    buffers = max(rule.lags, int(spec.momentum))
    matrix = 2 * features * values
    # scores that differ from channel to channel are made half by half, nothing above the diagonal; momentum makes their keys
    # twice as wide, and a token is read as often as it writes
    halves = by_channel and not part.by_channel
    pairs = 0.5 * (1 + spec.momentum) if halves else float(not by_channel)
    rows = tokens * (rule.writes if halves else 1) * (2 if rule.sees == "token" and rule.chunk > 1 else 1)

    squared, inside = rule.loss == "squared", rule.loss == "squared" and part.spans > 1
    states = matrix * (1 + buffers) * (tokens + columns) + matrix * buffers**2
    states += squared * matrix * columns * (1 + buffers * inside) + spec.read_rate * matrix * tokens
    scores = 2 * columns * (pairs * features * (rows + inside * columns) + tokens * values)
    system = inside * columns**2 * (values + features * (1 + buffers))
    coefficients = 2.0 * part.count**3 * (bool(spec.retention or spec.momentum) and not by_channel)
    below = 2.0 * theta * tokens * (1 + rule.writes * (1 + spec.erase))
    return BlockWork(columns, tokens, *(x / tokens for x in (below, states, scores, system, coefficients)))
