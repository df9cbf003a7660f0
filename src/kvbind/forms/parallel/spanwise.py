"""The dual form, parallel inside spans: an inner loop whose gradients read the state nonlinearly, by `dual`.

The fast network is a chain of layers there; the chunks' gates and the tokens' rates are those that the blockwise schedule
takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from kvbind.forms.parallel.affine_operands import Columns
from kvbind.forms.parallel.blockwise import behind_pending, gates_of, numbers_of, rule_of, slid, stopped
from kvbind.forms.parallel.dual import DualState, Layers, dual
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.activations import activation_of
from kvbind.inner.network import Network
from kvbind.inner.networks import MLP
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop


def in_spans(spec: InnerLoop, q: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
    """Run an inner loop that is parallel inside spans; arguments and result are those of `recurrent`."""
    assert spec.chunk is not None
    return behind_pending(spec, partial(_run, spec, spec.chunk), q, tokens, state)


def layers_of(network: Network) -> Layers:
    """A `Linear` or `MLP` network as the dual form takes it."""
    activation = activation_of(network.activation) if isinstance(network, MLP) else None
    return Layers(network.matrices, activation, network.has_bias, network.output_head)


def _run(spec: InnerLoop, chunk: int, q: Tensor, tokens: Tokens, fast: FastWeights) -> tuple[Tensor, FastWeights, int]:
    rule, updated = rule_of(spec, chunk), spec.updated
    if not len(tokens):
        return tokens.v[:, :, :0].to(fast.weights["out"].dtype), fast, 0
    held = tokens.of_keys()
    columns, named = _columns(held), {**held, **numbers_of(tokens)}
    rates = {name: named[f"rates.{name}"] for name in updated}
    recent = _columns(fast.window) if rule.history else None
    earlier = {name: fast.window[f"rates.{name}"] for name in updated} if rule.history else None
    if rule.lags:
        # a state has them oldest first
        buffers = {name: fast.window[name].flip(2) for name in updated}
    else:
        like = fast.momentum if spec.momentum else fast.weights
        buffers = {name: like[name].unsqueeze(2)[:, :, : int(spec.momentum)] for name in updated}
    state = DualState(fast.weights, buffers, recent, earlier)
    output, after = dual(rule, layers_of(spec.network), q, columns, rates, gates_of(spec, chunk, tokens), state)

    done = stopped(rule, len(tokens))
    window = {name: x.flip(2) for name, x in after.buffers.items()} if rule.lags else slid(fast.window, tokens, done)
    momentum = {name: x[:, :, 0] for name, x in after.buffers.items()} if spec.momentum else {}
    return output, replace(fast, weights=after.weights, momentum=momentum, window=window, travelled={}), done


def _columns(named: Mapping[str, Tensor]) -> Columns:
    """Keys, values and where residuals read, by name, as columns."""
    return Columns(named["k"], named["v"], 1.0, named.get("erase"))
