"""Loops meet where their systems do, with no other code at hand; what they are held against elsewhere is in
`public_code.py`.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from comparing import difference
from loops import SYSTEMS, Source, descent

EXACT = 1e-12


def drawn(name: str) -> dict[str, Any]:
    return next(s for s in SYSTEMS if s.name == name).draw(Source(5))


def only(x: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x[name] for name in names}


RECURRENCE = ("state", "q", "k", "v")


def channels(x: torch.Tensor) -> torch.Tensor:
    """A gate by head as one by key channel."""
    return x[..., None].expand(*x.shape, loops.D)


def delta(x: dict[str, Any]) -> Any:
    return loops.delta_rule(**only(x, *RECURRENCE, "beta", "decay"))


def titans(x: dict[str, Any], **changed: Any) -> Any:
    given = only(x, "weights", "q", "k", "v", "theta", "eta", "alpha") | changed
    return loops.titans(**given, predict=loops.linear, batch=1)


MEETINGS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "GLA of equal gates is simple GLA": (
        "simple_gla",
        lambda x: loops.gated_linear_attention(**only(x, *RECURRENCE), decay=channels(x["decay"])),
        lambda x: loops.gated_linear_attention(**x),
    ),
    "KDA of equal gates is gated DeltaNet": (
        "gated_delta_net",
        lambda x: loops.delta_rule(**only(x, *RECURRENCE, "beta"), decay=channels(x["decay"])),
        delta,
    ),
    "GDN-2 of equal gates is gated DeltaNet": (
        "gated_delta_net",
        lambda x: loops.gdn2(
            **only(x, *RECURRENCE), decay=channels(x["decay"]), erase=channels(x["beta"]), write=channels(x["beta"])
        ),
        delta,
    ),
    "preconditioned DeltaNet with P = 1 is gated DeltaNet": (
        "gated_delta_net",
        lambda x: loops.preconditioned_delta_rule(
            **only(x, *RECURRENCE, "beta", "decay"), scale=torch.ones_like(x["k"])
        ),
        delta,
    ),
    "Comba that erases at a times its key is gated DeltaNet": (
        "gated_delta_net",
        lambda x: loops.comba(**only(x, *RECURRENCE, "beta", "decay"), p=x["decay"][..., None] * x["k"]),
        delta,
    ),
    "RWKV-7 that removes what Comba erases": (
        "gated_delta_net",
        lambda x: loops.rwkv7(
            **only(x, "state", "q"), k=x["k"], v=x["beta"][..., None] * x["v"], decay=channels(x["decay"]), removal=x["k"],
            rate=channels(x["beta"]),
        ),
        lambda x: loops.comba(**only(x, *RECURRENCE, "beta", "decay"), p=x["k"]),
    ),
    "the momentum rule without momentum is Comba": (
        "comba",
        lambda x: loops.momentum_delta_rule(
            **only(x, *RECURRENCE, "p", "decay"), lr=x["beta"], momentum=0 * x["beta"], step_rate=torch.ones_like(x["beta"])
        ),
        lambda x: loops.comba(**x),
    ),
    "linear Titans without momentum is Comba at its key": (
        "titans/linear",
        lambda x: titans(x, eta=0 * x["eta"]),
        lambda x: loops.comba(
            x["weights"]["out"], **only(x, "q", "k", "v"), p=x["k"], beta=2 * x["theta"], decay=1 - x["alpha"]
        ),
    ),
    "titans-pytorch of chunks of 1 is Titans": (
        "titans/linear",
        lambda x: loops.titans_pytorch(
            **only(x, "weights", "q", "k", "v"), lr=loops.D * x["theta"], momentum=x["eta"], decay=x["alpha"],
            predict=loops.linear, chunk=1, batch=8,
        ),
        lambda x: loops.titans(**x, predict=loops.linear, batch=8),
    ),
    "Atlas without Newton-Schulz, of a window of 1, is Titans": (
        "titans/MLP",
        lambda x: loops.atlas(
            **only(x, "weights", "q", "k", "v"), gamma=x["theta"], theta=x["eta"], eta=torch.ones_like(x["eta"]),
            alpha=1 - x["alpha"], coefficients=torch.tensor([0.0, 1.0]), predict=loops.SILU, window=1, batch=8,
            phi=loops.powers, orthogonalize=False,
        ),
        lambda x: loops.titans(**x, predict=loops.SILU, batch=8),
    ),
    "tttLRM in one chunk is ZipMap": (
        "zipmap", lambda x: loops.tttlrm(**x, chunk=x["q"].shape[1]), lambda x: loops.zipmap(**x)
    ),
    "Elastic TTT whose importance stays zero is tttLRM without an anchor": (
        "zipmap",
        lambda x: loops.elastic_lact(**x, chunk=5, sees="full", importance="update", anchor="copy", memory=1.0),
        lambda x: loops.tttlrm(**x, chunk=5),
    ),
    "Elastic TTT read after each chunk is streaming ZipMap": (
        "zipmap",
        lambda x: loops.elastic_lact(**x, chunk=5, sees="chunk", importance="path", anchor="fixed", strength=0.0),
        lambda x: loops.zipmap(**x, window=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("meeting", MEETINGS)
def test_loops_meet(meeting: str) -> None:
    name, one, other = MEETINGS[meeting]
    found = difference(one, other, drawn(name))
    assert found.largest <= EXACT, found


APART: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "the decay before the gradient or after": (
        "gated_delta_net", delta, lambda x: loops.comba(**only(x, *RECURRENCE, "beta", "decay"), p=x["k"])
    ),
    "a max over heads or over one matrix": (
        "tttlrm/anchor",
        lambda x: loops.tttlrm(**x, chunk=5, strength=0.05),
        lambda x: loops.tttlrm(**x, chunk=5, strength=0.05, joint=False),
    ),
    "gradients at the batch's first weights or the token's": (
        "titans/MLP",
        lambda x: loops.titans(**x, predict=loops.SILU, batch=8),
        lambda x: loops.titans(**x, predict=loops.SILU, batch=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_what_is_not_the_same_is_seen(name: str) -> None:
    system, one, other = APART[name]
    assert difference(one, other, drawn(system)).output > 1e-4


def test_modes_of_elastic_ttt_are_eight() -> None:
    """On the same operands all differ but two: with an anchor that is copied, `M' - A` is U, and "path" is "squared"."""
    modes = [s.settings for s in SYSTEMS if s.family == "elastic_lact"]
    operands = drawn("elastic_lact/path, copy")
    outputs = {(m["importance"], m["anchor"]): loops.elastic_lact(**operands, **{**m, "sees": "full"})[0] for m in modes}
    assert len(outputs) == 9
    for one, other in combinations(outputs, 2):
        gap = float((outputs[one] - outputs[other]).abs().max())
        same = {one, other} == {("path", "copy"), ("squared", "copy")}
        assert gap < EXACT if same else gap > 1e-4, (one, other, gap)


def test_mlps_last_layer_moves_by_the_delta_rule() -> None:
    """Titans of an MLP whose first layer stands still, on its features, in closed form."""
    x = drawn("titans/MLP, batch 1")
    features = F.gelu(x["k"].transpose(1, 2) @ x["weights"]["in"]).transpose(1, 2)
    w = {name: y.expand(loops.B, *y.shape) for name, y in x["weights"].items()}
    step = descent(
        lambda m: (loops.GELU({**w, "out": m}, loops.token(x["k"], 0)) - loops.token(x["v"], 0)).square().sum(), w["out"]
    )
    miss = loops.token(x["v"], 0) - loops.token(features, 0) @ w["out"]
    torch.testing.assert_close(step, 2 * loops.token(features, 0).mT @ miss, rtol=1e-12, atol=1e-12)


def test_monomials_have_the_polynomial_kernel() -> None:
    source = Source(1)
    x, y, c = source.normal(5, 3), source.normal(5, 3), source.normal(4)
    expected = sum(c[i] ** 2 * (x * y).sum(-1) ** i for i in range(4))
    torch.testing.assert_close((loops.monomials(x, c) * loops.monomials(y, c)).sum(-1), expected)


def test_in_place_targets_are_a_convolution_inside_chunks() -> None:
    source = Source(1)
    x, kernel, projection = source.normal(2, 12, 4), source.normal(4, 5), source.normal(4, 4)
    chunks = x.unflatten(1, (2, 6)).flatten(0, 1).mT
    expected = F.conv1d(chunks, kernel[:, None], padding=2, groups=4).mT.unflatten(0, (2, 2)).flatten(1, 2) @ projection
    torch.testing.assert_close(loops.in_place_target(x, kernel, projection, chunk=6), expected)


def test_lact_video_reads_its_starting_weights_first() -> None:
    """The first tokens do not write, and what a block's later tokens hold changes no weights."""
    x = drawn("lact_video")
    _, state = loops.lact_video(**x, block=8, clean=2)
    others = torch.ones(22, dtype=torch.bool)
    others[[6, 7, 14, 15]] = False
    moved = {**x, "k": torch.where(others[None, :, None, None], x["k"] + 1, x["k"])}
    output, again = loops.lact_video(**moved, block=8, clean=2)
    torch.testing.assert_close(state, again, rtol=0, atol=0)
    first = loops.swiglu(x["weights"], x["q"][:, :6].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(output[:, :6], first)


def test_a_partial_mini_batch_stays_pending() -> None:
    x = drawn("ttt_linear/partial mini-batch")
    whole = {name: y[:, :32] if name in ("q", "k", "v", "lr", "reader") else y for name, y in x.items()}
    _, state = loops.ttt(**x, predict=loops.biased_linear)
    _, earlier = loops.ttt(**whole, predict=loops.biased_linear)
    assert x["q"].shape[1] % 16
    torch.testing.assert_close(state, earlier, rtol=0, atol=0)


def test_retnet_forgets_slower_by_head() -> None:
    torch.testing.assert_close(loops.retention_of_retnet(2), torch.tensor([1 - 1 / 32, 1 - 1 / 64], dtype=torch.float64))
