"""What the tokens of a LaCT layer write: from the layer's projections to values, rates and gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import GATES
from kvbind.layers.operands import split_heads, wide


@dataclass(frozen=True)
class ValueWriter:
    """From attention's values to those that fast weights are written with.

    Attributes:
        heads: fast heads.
        silu: silu on values.
    """

    heads: int
    silu: bool

    def make(self, v: Tensor) -> Tensor:
        """Values `[B, T, H D]`, or of any heads, as the fast weights take them: `[B, T, H, D]`."""
        v = v.flatten(2)
        return split_heads(F.silu(v) if self.silu else v, self.heads)


@dataclass(frozen=True)
class TokenWriter:
    """The last steps, elementwise and without parameters, so that they may be left for many tokens at once.

    Attributes:
        heads: fast heads.
        learned: the matrices that the layer has learned rates for, in the order of their logits.
        updated: the matrices that the inner loop updates.
        base_lr_inverse: what is added to the logits of rates.
        silu_v: silu on values.
        called: gates that come as they are, made by modules of their own, and not as logits.
        followers: vectors among the updated, each with the matrix whose rate it takes.
    """

    heads: int
    learned: tuple[str, ...]
    updated: tuple[str, ...]
    base_lr_inverse: float
    silu_v: bool
    called: tuple[str, ...] = ()
    followers: tuple[tuple[str, str], ...] = ()

    # no __call__: PyTorch 2.11's compiler asks a value that it has made and is to call for its hash, before it has fields
    def tokens(self, made: Mapping[str, Tensor]) -> Tokens:
        """Writers, heads behind the token axis.

        Args:
            made: keys "k" `[B, T, H, D]` as they are; values "v" `[B, T, H D]`; and of "lr" `[B, T, H * matrices]` and gates
                `[B, T, H]` by name the logits that there are, or the gates themselves where they are `called`. Without "lr"
                rates are 1.
        """
        gates = {gate.name: self.gate(gate.name, made[gate.name]) for gate in GATES if gate.name in made}
        rates: dict[str, Tensor | float] = {}
        rates |= self.rates(made["lr"]) if "lr" in made else dict.fromkeys(self.updated, 1.0)
        return Tokens(made["k"], self.values.make(made["v"]), rates, gates)

    @property
    def values(self) -> ValueWriter:
        """What is made of values."""
        return ValueWriter(self.heads, self.silu_v)

    def rates(self, logits: Tensor) -> dict[str, Tensor]:
        """Rates `[B, T, H]` by updated matrix, float32 or wider: softplus of the logits and the base rate's."""
        each = F.softplus(wide(split_heads(logits, self.heads)) + self.base_lr_inverse).unbind(-1)
        by_name = dict(zip(self.learned, each, strict=True))
        by_name |= {vector: by_name[matrix] for vector, matrix in self.followers}
        return {name: by_name[name] for name in self.updated}

    def gate(self, name: str, made: Tensor) -> Tensor:
        """A gate `[B, T, H]`, or `[B, T, H, D]` of logits `[B, T, H D]`, float32 or wider."""
        if name in self.called:
            return wide(made)
        return wide((made if made.shape[-1] == self.heads else split_heads(made, self.heads)).sigmoid())

    def same_as(self, other: object) -> bool:
        """Whether `other` is equal; a compiler for which numbers may vary compares fields, but no values of several."""
        if not isinstance(other, TokenWriter):
            return False
        mine, theirs = ((x.learned, x.updated, x.called, x.followers) for x in (self, other))
        names = mine == theirs
        numbers = self.heads == other.heads and self.base_lr_inverse == other.base_lr_inverse
        return names and numbers and self.silu_v == other.silu_v
