"""What holds for every inner loop, however its sequences are cut, packed and spoilt: checks of one drawn case each.

The suite draws a few cases (`tests/forms/test_properties.py`), `make test-nightly` ten thousand (`tests/nightly.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import torch
from hypothesis import strategies as st

import kvbind
from kvbind.forms.obstacles import parallel_obstacles
from kvbind.forms.parallel import affine_blocks
from kvbind.forms.parallel import form as parallel
from strategies import Operands, leaves, operands, parallel_specs, small_sizes, specs

CAUSAL = ("past", "chunk", "token")
VALUES = (float("nan"), float("inf"), float("-inf"), 1e30)


@dataclass
class Case:
    """An inner loop, operands, and what is done to them.

    Attributes:
        spec: the inner loop.
        size: sizes of `operands`.
        cuts: places between tokens at which a sequence is cut into calls.
        packed: sequences lie in one row.
        block: tokens of a block of the blockwise schedule.
        short: chunks below this many tokens are run blockwise.
        where: the operand that is spoilt, if the inner loop has it; else the keys.
        place: the spoilt token, of all sequences'.
        value: what one of its numbers becomes.
    """

    spec: kvbind.InnerLoop
    size: dict[str, int]
    cuts: list[int]
    packed: bool
    block: int
    short: int
    where: str
    place: int
    value: float

    @property
    def forms(self) -> list[str]:
        """The forms that the inner loop has."""
        return ["recurrent"] if parallel_obstacles(self.spec) else ["recurrent", "parallel"]

    def calls(self) -> list[tuple[int, int]]:
        """The spans of a sequence that calls take; between chunks where tokens see all of theirs."""
        chunk = self.spec.chunk if self.spec.visibility == "chunk" else 1
        cuts = {min(cut, self.size["tokens"]) // chunk * chunk for cut in self.cuts}
        return list(pairwise(sorted({0, *cuts, self.size["tokens"]})))


@st.composite
def cases(draw) -> Case:
    """Any causal inner loop and what is done to it."""
    spec = draw(st.one_of(specs(visibilities=CAUSAL), parallel_specs(visibilities=CAUSAL)))
    size = draw(small_sizes(20))
    return Case(
        spec,
        size,
        draw(st.lists(st.integers(1, 20), max_size=3)),
        draw(st.booleans()),
        draw(st.sampled_from([4, 16, 64])),
        draw(st.sampled_from([1, 4, 64])),
        draw(st.sampled_from(["q", "k", "v", "lr", "momentum", "retention"])),
        draw(st.integers(0, size["batch"] * size["tokens"] - 1)),
        draw(st.sampled_from(VALUES)),
    )


def run(case: Case, o: Operands, form: str, calls: list[tuple[int, int]]) -> tuple[torch.Tensor, kvbind.State]:
    """Outputs `[B, T, H, Dv]` and the end state, after one call for each span."""
    state, outputs = None, []
    batch = o.q.shape[0]

    def row(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1).unsqueeze(0) if case.packed else x

    with mock.patch.multiple(affine_blocks, BLOCK=case.block), mock.patch.multiple(parallel, SHORT_CHUNK=case.short):
        for start, stop in calls:
            part = o.span(start, stop)
            options = {name: row(x) for name, x in part.options.items() if name != "lr"}
            options["lr"] = {name: row(x) for name, x in part.options["lr"].items()}
            if case.packed:
                options["cu_seqlens"] = [i * (stop - start) for i in range(batch + 1)]
            weights = None if state is not None else o.weights
            y, state = kvbind.ttt(case.spec, weights, *map(row, (part.q, part.k, part.v)), state=state, form=form, **options)
            outputs.append(y.unflatten(1, (batch, stop - start))[0] if case.packed else y)
    return torch.cat(outputs, dim=1), state


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal but for rounding, of operands of order one; true of numbers that overflow."""
    # gradients of what cancels, such as a rate before Newton-Schulz, are made of rounding
    return not expected.isfinite().all() or bool((found - expected).norm() <= tolerance * expected.norm().clamp(min=1))


def forms_agree(case: Case) -> None:
    """Every form has the outputs, states and gradients of the recurrent one."""
    o = operands(case.spec, **case.size)
    tensors = asked(o)
    whole = [(0, case.size["tokens"])]
    expected = None
    for form in case.forms:
        y, state = run(case, o, form, whole)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        grads = torch.autograd.grad((y * cotangent).sum(), list(tensors.values()), allow_unused=True, materialize_grads=True)
        found = {"output": y} | dict(state.tensors) | dict(zip(tensors, grads, strict=True))
        expected = expected or found
        for name, x in expected.items():
            assert close(found[name], x, 1e-8), f"{form}: {name}"


def calls_agree(case: Case) -> None:
    """Any split of a sequence into calls gives the outputs and states of one call."""
    o = operands(case.spec, **case.size)
    for form in case.forms:
        y, state = run(case, o, form, [(0, case.size["tokens"])])
        z, after = run(case, o, form, case.calls())
        assert close(z, y, 1e-8), form
        assert after.pending_lengths == state.pending_lengths, form
        for name, x in state.tensors.items():
            assert close(after.tensors[name], x, 1e-8), f"{form}: {name}"


def future_stays_ahead(case: Case) -> None:
    """What is not finite, or huge, changes no output that does not see it, and no gradient of a loss on those.

    Those that see what is not finite are NaN, and so is the state.
    """
    finite = abs(case.value) < 1e31
    # in float32 the squares of huge numbers overflow; in float64 cancelling gradients keep their digits
    o = operands(case.spec, **case.size, dtype=torch.float32 if finite else torch.float64)
    tolerance = 1e-4 if finite else 1e-8
    batch, token = divmod(case.place, case.size["tokens"])
    head = case.size["heads"] - 1
    spoilt, where = spoil(o, case, batch, token, head)
    sees = seeing(case, where, batch, token, head, o.q.shape[:3])
    for form in case.forms:
        results = []
        for given in (o, spoilt):
            tensors = asked(given)
            y, state = run(case, given, form, case.calls())
            loss = y[~sees].square().sum()
            grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
            results.append((y, state, dict(zip(tensors, grads, strict=True))))
        (y, state, grads), (z, after, found) = results
        if not all(x.isfinite().all() for x in (y, *grads.values())):
            # the operands alone are too much for float32
            return
        assert close(z[~sees], y[~sees], tolerance), form
        if finite:
            continue
        assert not z[sees].isfinite().any(), form
        if where != "q":
            assert not all(x[batch, head].isfinite().all() for x in after.tensors.values()), form
        for name, x in grads.items():
            assert found[name].isfinite().all(), f"{form}: {name}"
            assert close(found[name], x, tolerance), f"{form}: {name}"
        for name, x in after.tensors.items():
            apart = torch.ones(x.shape[:2], dtype=torch.bool)
            apart[batch, head] = False
            assert close(x[apart], state.tensors[name][apart], tolerance), f"{form}: {name}"


def asked(o: Operands) -> dict[str, torch.Tensor]:
    """Every operand by name, asked for its gradient."""
    return {name: x.requires_grad_() for name, x in leaves(o).items()}


def spoil(o: Operands, case: Case, batch: int, token: int, head: int) -> tuple[Operands, str]:
    """Operands of which one number is another, and the operand's name."""
    where = case.where if case.where in ("q", "k", "v", "lr") or case.where in o.options else "k"
    changed = Operands(
        {name: x.detach().clone() for name, x in o.weights.items()},
        *(x.detach().clone() for x in (o.q, o.k, o.v)),
        {name: x.detach().clone() for name, x in o.options.items() if name != "lr"}
        | {"lr": {name: x.detach().clone() for name, x in o.options["lr"].items()}},
    )
    target = next(iter(changed.options["lr"].values())) if where == "lr" else changed.options.get(where)
    target = getattr(changed, where) if target is None else target
    target[batch, token, head, ...].view(-1)[-1] = case.value
    return changed, where


def seeing(case: Case, where: str, batch: int, token: int, head: int, shape: torch.Size) -> torch.Tensor:
    """Which outputs `[B, T, H]` may depend on an operand of one token and head."""
    spec, sees = case.spec, torch.zeros(shape, dtype=torch.bool)
    if where == "q":
        # under query="key" queries only have a shape
        sees[batch, token, head] = spec.query == "query"
        return sees
    start = token // spec.chunk * spec.chunk
    first = {"past": start + spec.chunk, "chunk": start, "token": token}[spec.visibility]
    sees[batch, first:, head] = True
    if where == "k" and spec.query == "key":
        sees[batch, token, head] = True
    return sees


PROPERTIES = {
    "every form has the outputs, states and gradients of the recurrent one": forms_agree,
    "any split into calls gives the same outputs and states": calls_agree,
    "what is not finite changes nothing that does not see it": future_stays_ahead,
}
