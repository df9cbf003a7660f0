"""Between updates: tokens that complete no chunk are read, and stay pending beside a state instead of being copied into it.

`ttt` returns a state that has every pending token in its place, a copy of all places for each call. Where calls bring single
tokens, as in generation, copying and what surrounds it cost more than reading. Here such tokens stay as they came, and go to
their places many at once; what their writing takes beyond that is also computed then.

What single tokens read, and the updates of the chunks that they complete, are `read` and `completed` on tensors in
one piece, of all rows or of one: the same operators on operands of the same shapes and strides whether calls run them or a
captured step does (`kvbind.layers.lact.slots`). Products of other layouts, or of other numbers of matrices, may round
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from kvbind.forms.autocast import without_autocast
from kvbind.forms.halves import split
from kvbind.forms.on_kernels import dispatch
from kvbind.forms.on_kernels.kernel_calls.recurrent import recurrent_chunks, run_recurrent
from kvbind.forms.recurrent import chunk_update
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.forms.validation import Operands
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.common.tracing import is_eager

Made = Mapping[str, Tensor]

MOST = 64
"""Tokens of a sequence that stay as they came; further ones send all to their places."""


class TokenMaker(Protocol):
    """What makes writers of what a call made, each token's of its own alone."""

    def tokens(self, made: Made) -> Tokens:
        """The writers, heads behind the token axis."""
        ...

    def same_as(self, other: object) -> bool:
        """Whether `other` makes the same of the same."""
        ...


@dataclass(frozen=True)
class PendingState:
    """A state, and tokens that came after it and complete no chunk.

    Attributes:
        state: where the sequences were before those tokens.
        weights: its fast weights.
        later: of each call what its writers are made of, tensors by name whose axis 1 is of tokens, "k" among them.
        count: how many tokens all calls had.
        make: makes writers of such tensors.
        rounded: the fast weights as `rounded` has them, once a single token was read with them.
    """

    state: State
    weights: Mapping[str, Tensor]
    later: tuple[Made, ...] = ()
    count: int = 0
    make: TokenMaker | None = None
    rounded: Mapping[str, Tensor] | None = None

    @staticmethod
    def of(state: State) -> PendingState:
        """No tokens behind a state."""
        return PendingState(state, state.weights)

    def values_apart(self) -> PendingState:
        """This without the values of tokens in their places, as `State.values_apart`."""
        return replace(self, state=self.state.values_apart()) if "pending.v" in self.state.tensors else self

    def settled(self) -> State:
        """The state with all tokens in their places, as `ttt` would have returned it."""
        if self.make is None:
            return self.state
        joined = {name: torch.cat([made[name] for made in self.later], dim=1) for name in self.later[0]}
        return self.state.append(self.make.tokens(joined).map(lambda x: x.transpose(1, 2)))

    def read(
        self, spec: InnerLoop, q: Tensor, made: Made, make: TokenMaker, rounds: bool = False
    ) -> tuple[Tensor, PendingState] | None:
        """Outputs at some queries, and what is then pending: what `ttt` says where only the last update is seen.

        Args:
            spec: the inner loop.
            q: queries `[B, T, H, Dk]`.
            made: what as many writers are made of; rates and gates are to be in the state's dtype.
            make: makes them.
            rounds: single tokens are read in bfloat16 (`read_rounded`).

        Returns:
            Outputs `[B, T, H, Dv]` in q's dtype; None where a chunk is completed, tokens see more than the last update or
            there are none, which is for `ttt`.
        """
        if self.make is not None and not self.make.same_as(make):
            return PendingState.of(self.settled()).read(spec, q, made, make, rounds)
        state, count = self.state, self.count + q.shape[1]
        if (
            spec.visibility != "past"
            or "refresh" in spec.extensions
            or not state.has_room
            or q.shape[0] != state.batch
            or not q.shape[1]
        ):
            return None
        if not state.spec.same_as(spec) or max(state.pending_lengths) + count >= spec.room + 1:
            return None
        output, held = self._read(spec, q, made["k"], rounds)
        after = replace(held, later=(*self.later, made), count=count, make=make)
        return output, after if count < MOST else replace(PendingState.of(after.settled()), rounded=after.rounded)

    def _read(self, spec: InnerLoop, q: Tensor, k: Tensor, rounds: bool) -> tuple[Tensor, PendingState]:
        """Outputs at some queries, and this with what reading them has made of the fast weights."""
        if rounds and q.shape[1] == 1 and self.state.dtype == torch.float32 and not torch.is_grad_enabled():
            made = rounded(spec, self.weights) if self.rounded is None else self.rounded
            return read_rounded(spec, made, q, k), replace(self, rounded=made)
        held = self._in_one_piece()
        return read(spec, held.weights, q, k), held

    def complete(
        self, spec: InnerLoop, q: Tensor, made: Made, make: TokenMaker, rounds: bool = False
    ) -> tuple[Tensor, PendingState] | None:
        """Outputs of one token of each sequence, which completes a chunk of some of them, and the state after it.

        Sequences are updated all at once where all of them have had equally many tokens of their chunk, and else one by
        one: which of them are due together would be another number of matrices each time.

        Args:
            spec: the inner loop.
            q: queries `[B, 1, H, Dk]`.
            made: as `read` takes it.
            make: makes tokens of it, as `read` takes it.
            rounds: as `read` takes it.

        Returns:
            As `read`, outputs computed as those of tokens that complete no chunk; None where there are several
            tokens, where they see more than the last update, or where an update is more than `completed`: that is for `ttt`.
        """
        known = spec.visibility == "past" and not spec.extensions and self.state.spec.same_as(spec)
        if not known or q.shape[1] != 1 or q.shape[0] != self.state.batch or torch.compiler.is_compiling():
            return None
        if (spec.room and not self.state.has_room) or "pending.mask" in self.state.tensors:
            return None
        output, held = self._read(spec, q, made["k"], rounds)
        state = PendingState.of(held.settled())._in_one_piece().state
        lengths = state.pending_lengths
        new = make.tokens(made).map(lambda x: x.transpose(1, 2)).spread().tensors()
        together = len(set(lengths)) == 1
        parts = [slice(0, len(lengths))] if together else [slice(i, i + 1) for i in range(len(lengths))]
        fast, tensors = state.fast, dict(state.tensors)
        found: dict[str, list[Tensor]] = {}
        for rows in parts:
            length = lengths[rows.start]
            filled = {name: _behind(state.tensors.get(f"pending.{name}"), x, rows, length) for name, x in new.items()}
            after = fast.map(itemgetter(rows))
            if length == spec.room:
                after = completed(spec, after, Tokens.of(filled))
                filled = {name: x.new_zeros(*x.shape[:2], spec.room, *x.shape[3:]) for name, x in filled.items()}
            for full, x in changed(spec, after).items():
                found.setdefault(full, []).append(x)
            for name, x in filled.items() if spec.room else ():
                found.setdefault(f"pending.{name}", []).append(x)
        tensors |= {name: (rows[0] if len(rows) == 1 else torch.cat(rows)).contiguous() for name, rows in found.items()}
        return output, PendingState.of(State(spec, tensors, tuple((n + 1) % (spec.room + 1) for n in lengths)))

    def _in_one_piece(self) -> PendingState:
        """This with fast weights that are each contiguous; they may come transposed, or one for all sequences."""
        held = self.state.tensors
        scattered = {name: x for name, x in held.items() if not (name.startswith("pending.") or x.is_contiguous())}
        if not scattered:
            return self
        tensors = dict(held) | {name: x.contiguous() for name, x in scattered.items()}
        state = State(self.state.spec, tensors, self.state.pending_lengths)
        return replace(self, state=state, weights=state.weights)

    def answer(self, spec: InnerLoop, q: Tensor, k: Tensor, rounds: bool = False) -> Tensor | None:
        """Outputs of one token of each sequence, which may complete a chunk: computed as those of tokens that do not.

        Args:
            spec: the inner loop.
            q: queries `[B, 1, H, Dk]`.
            k: keys, likewise.
            rounds: as `read` takes it.

        Returns:
            `[B, 1, H, Dv]`; None where there are several tokens, or where they see more than the last update.
        """
        if q.shape[1] != 1 or spec.visibility != "past" or q.shape[0] != self.state.batch or "refresh" in spec.extensions:
            return None
        if not self.state.spec.same_as(spec):
            return None
        return self._read(spec, q, k, rounds)[0]


def read(spec: InnerLoop, weights: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
    """What fast weights say at queries `[B, T, H, Dk]`, or at keys where the inner loop reads those: `[B, T, H, Dv]`."""
    with without_autocast(q.device.type):
        asked = k if spec.query == "key" else q
        output = spec.network.apply(weights, asked.transpose(1, 2).to(weights["out"].dtype))
    return output.transpose(1, 2).to(q.dtype)


def rounded(spec: InnerLoop, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fast weights `[B, H, in, out]`, float32, in bfloat16; `[1, H, in, out]` where no update tells rows apart."""
    same = {name for name in alike(spec) if name in weights and of_all_rows(weights[name])}
    return {name: split((x[:1] if name in same else x).contiguous())[0] for name, x in weights.items()}


def alike(spec: InnerLoop) -> tuple[str, ...]:
    """The weights that no update changes, where these are all that the last layer reads and multiplies."""
    network = spec.network
    head = () if network.output_head is None else network.output_head.vectors
    last = {"out", "out.bias", *head}
    if not network.applies_itself or not last.issuperset(spec.updated):
        return ()
    return tuple(name for name in network.tensors if name not in last)


def of_all_rows(x: Tensor) -> bool:
    """Whether `x` `[B, ...]` has the same for every row."""
    if x.shape[0] == 1 or x.stride(0) == 0:
        return True
    return is_eager() and bool((x == x[:1]).all())


def read_rounded(spec: InnerLoop, weights: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Tensor:
    """What `read` says of fast weights in bfloat16, with products in bfloat16; those `[1, H, in, out]` are read once.

    Relative to a head's output in float32 the error is some 2^-8: as much as rounding puts on each operand of a product.
    """
    network = spec.network
    with without_autocast(q.device.type):
        asked = (k if spec.query == "key" else q).transpose(1, 2).to(torch.bfloat16)
        hidden = [weights[name] for name in alike(spec)]
        if len(asked) == 1 or not hidden or any(x.shape[0] > 1 for x in hidden):
            output = network.apply(weights, asked)
        else:
            output = network.apply_to_rows(weights, asked)
    return output.transpose(1, 2).to(q.dtype)


def _behind(held: Tensor | None, new: Tensor, rows: slice, length: int) -> Tensor:
    """Some sequences' pending places with one more token behind the first `length`, in one piece; `[n, H, T, ...]`."""
    if held is None:
        return new[rows].contiguous()
    places = held[rows]
    return torch.cat((places[:, :, :length], new[rows], places[:, :, length + 1 :]), dim=2).contiguous()


def changed(spec: InnerLoop, fast: FastWeights) -> dict[str, Tensor]:
    """Those of the fast weights that an update of a chunk changes, by the names that they have in a state."""
    parts = {"weights": fast.weights, "momentum": fast.momentum, "accumulated": fast.accumulated}
    return {f"{part}.{name}": x for part, held in parts.items() for name, x in held.items() if name in spec.updated}


def completed(spec: InnerLoop, fast: FastWeights, tokens: Tokens) -> FastWeights:
    """Fast weights after one whole chunk of each sequence, on the kernels or operators that `ttt` takes for it.

    Nothing of it depends on values, so that it can be captured.

    Args:
        spec: the inner loop.
        fast: `[B, H, in, out]` before the chunk, each in one piece.
        tokens: its tokens, `[B, H, chunk, ...]`, likewise.
    """
    with without_autocast(tokens.k.device.type):
        call = Operands(tokens.k, tokens, State.of(spec, fast, None, 0), None)
        if dispatch.engine(spec, call, "recurrent") is run_recurrent:
            return recurrent_chunks(spec, tokens.k[:, :, :0], tokens, fast, len(tokens))[1]
        return chunk_update(spec, fast, tokens, fast.weights)
