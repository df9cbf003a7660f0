"""The blockwise schedule of the parallel form: an inner loop whose writes add up, as a rule of `affine`.

Features of the last layer, the chunks' gates and the tokens' rates are what that form takes. A bias of the last layer is a
row of it that is read by a feature of 1; a head that outputs alone pass is behind it all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.parallel.affine import affine
from kvbind.forms.parallel.affine_operands import AffineRule, AffineState, Columns, Gates
from kvbind.forms.parallel.scan import ScanGate
from kvbind.forms.recurrent import prefix_gates
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import DECLARED, decays
from kvbind.inner.network import gated
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def blockwise(spec: InnerLoop, chunk: int, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run an inner loop whose writes add up, in chunks of `chunk` tokens; the rest is as for `recurrent`."""
    return behind_pending(spec, partial(_run, spec, chunk), q, tokens, state)


def behind_pending(
    spec: InnerLoop,
    run: Callable[[Tensor, Tokens, FastWeights], tuple[Tensor, FastWeights, int]],
    q: Tensor,
    tokens: Tokens,
    state: State,
) -> tuple[Tensor, State]:
    """Run tokens behind those pending, as `recurrent` does.

    Args:
        spec: the inner loop.
        run: from queries, tokens and the weights before them the outputs, the weights where a state can stop, and how many
            tokens that is behind.
        q: what is read.
        tokens: what writes.
        state: where the sequences stopped.
    """
    pending = state.pending()
    earlier = 0 if pending is None else len(pending)
    joined = tokens if pending is None else pending.append(tokens)
    # pending tokens were read in an earlier call: zeros keep their places, and what they read is dropped
    q = F.pad(q, (0, 0, earlier // spec.writes, 0))
    output, fast, done = run(q, joined, state.fast)
    output = output[:, :, earlier // spec.writes :]
    if state.has_room and not done:
        return output, state.append(tokens)
    rest = joined.span(done, len(joined))
    return output, State.of(spec, fast, rest, len(rest))


def rule_of(spec: InnerLoop, chunk: int) -> AffineRule:
    """An inner loop whose writes add up as a rule of `kvbind.forms.parallel.affine`, with chunks of `chunk` tokens."""
    assert spec.visibility != "full"
    return AffineRule(
        loss=spec.loss,
        chunk=chunk,
        refresh=None if spec.refresh == "call" else 1 if spec.writes > 1 else spec.span,
        before=spec.decays_before,
        window=spec.window_size,
        window_on="update" if spec.sums_updates and spec.window_size > 1 else "gradient",
        sees=spec.visibility,
        writes=spec.writes,
        sign=spec.sign,
    )


def advance(spec: InnerLoop, tokens: Tokens, fast: FastWeights) -> FastWeights:
    """The fast weights after some complete chunks, of which nothing is read."""
    assert spec.chunk is not None
    return _run(spec, spec.chunk, None, tokens, fast)[1]


def _run(
    spec: InnerLoop, chunk: int, q: Tensor | None, tokens: Tokens, fast: FastWeights
) -> tuple[Tensor, FastWeights, int]:
    """Outputs (empty where `q` is None), the weights where a state can stop, and how many tokens that is behind."""
    network, weights = spec.network, fast.weights
    if not len(tokens):
        # as a rank may have none
        return tokens.v[:, :, :0].to(weights["out"].dtype), fast, 0
    rule = rule_of(spec, chunk)
    lags = rule.lags
    columns = _columns(spec, fast, {**tokens.of_keys(), **numbers_of(tokens)})
    recent = _columns(spec, fast, fast.window) if rule.history else None
    buffers = _joined(spec, fast.window).flip(2) if lags else None
    if buffers is None:
        like = _joined(spec, weights)
        buffers = _joined(spec, fast.momentum).unsqueeze(2) if spec.momentum else like.unsqueeze(2)[:, :, :0]
    read = None if q is None else _with_ones(spec, network.features(weights, q))
    state = AffineState(_joined(spec, weights), buffers, recent)
    output, after = affine(rule, read, columns, gates_of(spec, chunk, tokens), state)

    done = stopped(rule, len(tokens))
    window = _parted(spec, after.buffers.flip(2)) if lags else slid(fast.window, tokens, done)
    end = replace(
        fast,
        weights=dict(weights) | _parted(spec, after.weights),
        momentum=_parted(spec, after.buffers[:, :, 0]) if spec.momentum else {},
        window=window,
        travelled={},
    )
    if q is None:
        return output, end, done
    output = gated(network.gate(weights, q), output)
    head = network.output_head
    return output if head is None else head.apply(weights, output, q), end, done


def stopped(rule: AffineRule, total: int) -> int:
    """How many of so many tokens are behind the last place where a state can stop."""
    span = rule.chunk if rule.refresh is None else rule.refresh
    return total // span * span


def slid(window: Mapping[str, Tensor], tokens: Tokens, done: int) -> dict[str, Tensor]:
    """A window over gradients behind the first `done` tokens; one that is empty stays so."""
    if not window:
        return {}
    held = tokens.of_keys()
    return {name: torch.cat((x, held[name][:, :, :done].to(x.dtype)), 2)[:, :, done:] for name, x in window.items()}


def _columns(spec: InnerLoop, fast: FastWeights, named: Mapping[str, Tensor | float]) -> Columns:
    """Keys, values and rates, by name, as columns of the last layer."""
    network, weights = spec.network, fast.weights
    dtype = weights["out"].dtype
    k, v, erase = (named.get(name) for name in ("k", "v", "erase"))
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    k, v = k.to(dtype), v.to(dtype)
    features, rate = network.features(weights, k), named["rates.out"]
    at = network.features(weights, erase.to(dtype)) if isinstance(erase, Tensor) else None
    v = gated(network.gate(weights, k), v)
    if not network.has_bias:
        return Columns(features, v, rate, at)
    # the bias may have a rate of its own, so that rates are in what is written and not in the residual
    ones = v.new_ones(*v.shape[:3], 1)
    rates = (x[..., None] if isinstance(x, Tensor) else x for x in (rate, named["rates.out.bias"]))
    written = torch.cat([r * x for r, x in zip(rates, (features, ones), strict=True)], dim=-1)
    return Columns(written, v, 1.0, torch.cat((features if at is None else at, ones), dim=-1))


def numbers_of(tokens: Tokens) -> dict[str, Tensor | float]:
    """Rates that are numbers, of tokens that all write."""
    if tokens.mask is not None:
        return {}
    return {f"rates.{name}": rate for name, rate in tokens.rates.items() if not isinstance(rate, Tensor)}


def _with_ones(spec: InnerLoop, features: Tensor) -> Tensor:
    """Features that read a bias too, where there is one."""
    return F.pad(features, (0, 1), value=1.0) if spec.network.has_bias else features


def _joined(spec: InnerLoop, parts: Mapping[str, Tensor]) -> Tensor:
    """The last layer's part of some weights, its bias as a last row."""
    return torch.cat((parts["out"], parts["out.bias"]), dim=-2) if spec.network.has_bias else parts["out"]


def _parted(spec: InnerLoop, x: Tensor) -> dict[str, Tensor]:
    """What `_joined` joined."""
    return {"out": x[..., :-1, :], "out.bias": x[..., -1:, :]} if spec.network.has_bias else {"out": x}


def gates_of(spec: InnerLoop, chunk: int, tokens: Tokens) -> Gates:
    """What the rule takes of the tokens' gates: one for each write, and for each token those of the writers up to it."""
    given: dict[str, Tensor] = {name: gate for name, gate in tokens.gates.items() if DECLARED[name].chunk == "mean"}
    mask = tokens.mask
    if mask is not None and "step_rate" not in given:
        given["step_rate"] = torch.ones_like(tokens.k[..., 0], dtype=torch.promote_types(tokens.k.dtype, torch.float32))

    def by_chunk(x: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [change(part) for part in x.split(chunk, dim=2)]

    # before the function that reads it, as torch.compile asks of what functions enclose
    count = None if mask is None else torch.stack(by_chunk(mask, lambda x: x.sum(2)), dim=2)

    def means(gate: Tensor) -> Tensor:
        if mask is None or count is None:
            return gate if chunk == 1 else torch.stack(by_chunk(gate, lambda x: x.mean(2)), dim=2)
        its = mask.reshape(*mask.shape, *(1,) * (gate.dim() - 3))
        return torch.stack(by_chunk(gate * its, lambda x: x.sum(2)), 2) / count.reshape(*count.shape, *its.shape[3:]).clamp(
            min=1
        )

    found: dict[str, Tensor] = {}
    for name, gate in given.items():
        found[name] = means(gate)
        if count is not None:
            writes = (count > 0).reshape(*count.shape, *(1,) * (gate.dim() - 3))
            found[name] = torch.where(writes, found[name], DECLARED[name].neutral)
    partials: dict[str, Tensor] = {}
    if spec.visibility == "token" and chunk > 1:
        masks = [None] * -(-len(tokens) // chunk) if mask is None else mask.split(chunk, dim=2)
        for name, gate in given.items():
            its = zip(gate.split(chunk, dim=2), masks, strict=True)
            partials[name] = torch.cat([prefix_gates(name, x, its_mask) for x, its_mask in its], dim=2)
            if mask is not None:
                writes = torch.cat(by_chunk(mask, lambda x: x.cumsum(2) > 0), dim=2)
                writes = writes.reshape(*writes.shape, *(1,) * (gate.dim() - 3))
                partials[name] = torch.where(writes, partials[name], DECLARED[name].neutral)
    (momentum, decay), (partial_momentum, partial_decay) = decays(found), decays(partials)
    return Gates(
        None if decay is None else ScanGate(decay),
        None if momentum is None else ScanGate(momentum),
        found.get("step_rate"),
        partial_decay,
        partial_momentum,
        partials.get("step_rate"),
        tokens.gates.get("read_rate"),
    )
