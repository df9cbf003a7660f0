"""What tokens write: keys, values, rates and gates of some sequences, moved about together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.inner.gates import DECLARED, GATES


@dataclass(frozen=True)
class Tokens:
    """Tokens as writers, heads first; the token axis of every tensor is axis 2.

    Attributes:
        k: keys `[B, H, T, Dk]`, in the dtype they came in.
        v: values `[B, H, T, Dv]`.
        rates: learning rate by matrix name, a number or `[B, H, T]`.
        gates: gates `[B, H, T]`, or `[B, H, T, Dk]` per key channel, by name, those that the inner loop asks for
            (`InnerLoop.gates`).
        mask: which tokens write, bool `[B, 1, T]`, or None where all do.
    """

    k: Tensor
    v: Tensor
    rates: dict[str, Tensor | float]
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None

    @property
    def count(self) -> int:
        """T: what `len` says, also where it is a symbol, as in exported programs."""
        return self.k.shape[2]

    def __len__(self) -> int:
        return self.count

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """These tokens with every tensor changed."""
        return Tokens(
            change(self.k),
            change(self.v),
            {name: change(rate) if isinstance(rate, Tensor) else rate for name, rate in self.rates.items()},
            {name: change(gate) for name, gate in self.gates.items()},
            None if self.mask is None else change(self.mask),
        )

    def span(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` up to `stop`."""
        return self.map(lambda x: x[:, :, start:stop])

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.k.dtype, torch.float32)

    def spread(self) -> Tokens:
        """These tokens with every rate a tensor."""
        shape = self.k.shape[:3]
        dtype = self._wide
        rates: dict[str, Tensor | float] = {
            name: rate if isinstance(rate, Tensor) else torch.full(shape, rate, dtype=dtype, device=self.k.device)
            for name, rate in self.rates.items()
        }
        return replace(self, rates=rates)

    def of_keys(self) -> dict[str, Tensor]:
        """What belongs to keys alone, by name, with rates that are zero for tokens that do not write."""
        tokens = self.spread()
        own = {name: gate for name, gate in tokens.gates.items() if DECLARED[name].chunk == "own"}
        rates = {f"rates.{name}": rate for name, rate in tokens.rates.items() if isinstance(rate, Tensor)}
        if self.mask is not None:
            rates = {name: rate * self.mask for name, rate in rates.items()}
        return {"k": tokens.k, "v": tokens.v, **own, **rates}

    def append(self, later: Tokens) -> Tokens:
        """These tokens, then `later`, which has the same gates; where one of both has a mask, all of the other write."""
        return Tokens.cat((self, later))

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Tokens with the same gates, one after another."""
        parts = [part for part in parts if len(part)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        if any(part.mask is not None for part in parts):
            parts = [part.masked() for part in parts]
        named = [part.spread().tensors() for part in parts]
        return Tokens.of({name: torch.cat([tensors[name] for tensors in named], dim=2) for name in named[0]})

    def masked(self) -> Tokens:
        """These tokens with a mask, of which all write where there was none."""
        if self.mask is not None:
            return self
        return replace(self, mask=torch.ones(self.k.shape[0], 1, len(self), dtype=torch.bool, device=self.k.device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by dotted name: "k", "v", the gates by their own, "mask" where there is one, "rates.M"."""
        named = {"k": self.k, "v": self.v, **self.gates} | ({} if self.mask is None else {"mask": self.mask})
        return named | {f"rates.{name}": rate for name, rate in self.rates.items() if isinstance(rate, Tensor)}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Tokens:
        """What `tensors` took apart, of tokens whose rates are all tensors."""
        rates: dict[str, Tensor | float] = {
            name.removeprefix("rates."): x for name, x in tensors.items() if name.startswith("rates.")
        }
        gates = {gate.name: tensors[gate.name] for gate in GATES if gate.name in tensors}
        mask = tensors.get("mask")
        return Tokens(tensors["k"], tensors["v"], rates, gates, None if mask is None else mask.bool())

    def padded(self, length: int) -> Tokens:
        """These tokens with every rate a tensor, zero-padded to `length`."""
        short = length - len(self)
        return self.spread().map(lambda x: F.pad(x, (0, 0) * (x.dim() - 3) + (0, short)))

    def blank(self, batch: int, length: int) -> Tokens:
        """Zeros in place of tokens like these, of so many sequences; rates and gates of one dtype lie in one piece."""
        heads = self.k.shape[1]
        named = {f"rates.{name}": rate for name, rate in self.rates.items()} | dict(self.gates)
        wide = self._wide
        dtypes = {name: x.dtype if isinstance(x, Tensor) else wide for name, x in named.items()}
        zeros = {
            "k": self.k.new_zeros(batch, heads, length, self.k.shape[3]),
            "v": self.v.new_zeros(batch, heads, length, self.v.shape[3]),
        }
        per_key = {name: gate for name, gate in self.gates.items() if gate.dim() > 3}
        zeros |= {name: gate.new_zeros(batch, heads, length, gate.shape[3]) for name, gate in per_key.items()}
        dtypes = {name: dtype for name, dtype in dtypes.items() if name not in per_key}
        for dtype in dict.fromkeys(dtypes.values()):
            names = [name for name, its in dtypes.items() if its == dtype]
            together = self.k.new_zeros(len(names), batch, heads, length, dtype=dtype)
            zeros |= dict(zip(names, together.unbind(), strict=True))
        return Tokens.of(zeros)

    def column_rates(self) -> dict[str, Tensor | float]:
        """Rates as they multiply rows: numbers or `[B, H, T, 1]`, zero for tokens that do not write."""
        columns: dict[str, Tensor | float] = {}
        for name, rate in self.rates.items():
            column = rate[..., None] if isinstance(rate, Tensor) else rate
            if self.mask is not None:
                # a number times a mask would be of PyTorch's default dtype
                column = column * self.mask[..., None].to(torch.promote_types(self.v.dtype, self._wide))
            columns[name] = column
        return columns

    def mean(self, gate: Tensor) -> Tensor:
        """The mean of a gate over the tokens that write, `[B, H, T]` to `[B, H]`, or with channels behind both."""
        if self.mask is None:
            return gate.mean(2)
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (gate.dim() - 3))
        return (gate * mask).sum(2) / mask.sum(2).clamp(min=1)


def as_factor(gate: Tensor, matrix: Tensor) -> Tensor:
    """A gate of leading dimensions `[...]` shaped to multiply matrices `[..., in, out]` (kernels have one axis more)."""
    return gate.reshape(gate.shape + (1,) * (matrix.dim() - gate.dim()))
