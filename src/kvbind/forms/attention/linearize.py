"""`linearize`: an inner loop over given operands, rewritten as the linear attention that it is.

It runs the inner loop once and notes, along its trajectory, the effective queries, keys and values, the starting state and
every decay (arXiv 2602.21204, theorems 5.1 to 5.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.forms.attention.factors import Anchored, OutputHead, Partial, SeenShare
from kvbind.forms.attention.linear_attention import LinearAttention
from kvbind.forms.autocast import without_autocast
from kvbind.forms.recurrent import (
    Chunk,
    chunk_gates,
    chunks,
    last_share,
    prefix_gates,
    prefix_updates,
    seen_weights,
    slid,
    writers_of,
)
from kvbind.forms.tokens import Tokens, as_factor
from kvbind.forms.validation import LearningRate, PerToken, check_operands
from kvbind.inner.gates import given_gates
from kvbind.inner.losses import descent_direction
from kvbind.inner.network import Network, gated
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.rule import (
    FastWeights,
    apply_update,
    channel_norm,
    decayed,
    gradient,
    pull,
    rescale,
    set_off,
    shape_update,
)
from kvbind.inner.spec import InnerLoop


@dataclass
class _Trajectory:
    """What `linearize` notes while the inner loop runs; heads first, one entry per update or per group of reads."""

    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    q: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    momentum: list[Tensor] = field(default_factory=list)
    retention: list[Tensor] = field(default_factory=list)
    rescaling: list[Tensor] = field(default_factory=list)
    clipping: list[Tensor] = field(default_factory=list)
    step: list[Tensor] = field(default_factory=list)
    pull: list[Tensor] = field(default_factory=list)
    follow: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    gains: list[Tensor] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    skips: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    closes: list[int] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)

    def as_read(self, spec: InnerLoop) -> Tensor | float:
        """What rescaling is where nothing is written: none, or under `normalize="read"` the last."""
        return self.rescaling[-1] if spec.normalize == "read" and self.rescaling else 1.0


def linearize(
    spec: InnerLoop,
    weights: Mapping[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: LearningRate = 1.0,
    momentum: PerToken | None = None,
    retention: PerToken | None = None,
    log_retention: PerToken | None = None,
    erase: Tensor | None = None,
    read_rate: PerToken | None = None,
    step_rate: PerToken | None = None,
    update_tokens: slice | Tensor | None = None,
) -> LinearAttention:
    """Rewrite an inner loop over given operands as the linear attention it is.

    Works for every `InnerLoop`, reducible or not: where features or decays depend on the data, they are read off the
    trajectory. Sections 2 and 3 of the specification; arXiv 2602.21204, theorems 5.1 to 5.3 and appendix I.

    Args:
        spec: the inner loop.
        weights: starting fast weights, as `ttt` takes them.
        q: queries `[B, T, H, Dk]`.
        k: keys `[B, T, H, Dk]`.
        v: values `[B, T, H, Dv]`.
        lr: as `ttt` takes it.
        momentum: as `ttt` takes it.
        retention: as `ttt` takes it.
        log_retention: as `ttt` takes it.
        erase: as `ttt` takes it.
        read_rate: as `ttt` takes it.
        step_rate: as `ttt` takes it.
        update_tokens: as `ttt` takes it; not with a window, which other tokens then slide out of in each sequence.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    if isinstance(update_tokens, slice):
        # every token keeps its row; those outside the slice write zero
        mask = torch.zeros(q.shape[1], dtype=torch.bool, device=k.device)
        mask[update_tokens] = True
        update_tokens = mask
    gates = given_gates(
        log_retention, momentum=momentum, retention=retention, erase=erase, read_rate=read_rate,
        step_rate=step_rate,
    )  # fmt: skip
    call = check_operands(spec, weights, q, k, v, lr, gates, None, None, update_tokens)
    network = spec.network
    own = [name for name in ("read", "write") if getattr(type(network), name) is not getattr(Network, name)]
    if not network.applies_itself or (own and not isinstance(network, DepthwiseConv)):
        raise ValueError(
            f"spec's network must be one whose apply is features, last layer, gate and head, which is linear attention; "
            f"{type(network).__name__} has {' and '.join(own) or 'an apply'} of its own"
        )
    if call.tokens.mask is not None and spec.window_size > 1:
        raise ValueError(f"update_tokens must be None for linearize beside window={spec.window!r}")
    with without_autocast(q.device.type):
        return _linearize(spec, call.q.to(call.state.dtype), call.tokens, call.state.fast)


def _linearize(spec: InnerLoop, q: Tensor, tokens: Tokens, fast: FastWeights) -> LinearAttention:
    earlier = 0 if spec.sums_updates else (spec.window_size - 1) * (spec.chunk or 1)
    note = _Trajectory(earlier=[0] * earlier)
    initial, total, each = _last_layer(spec, fast.weights), q.shape[2], spec.writes
    bounds, seen, partials = [0], [], []
    # with chunks of one token, what a token sees is the chunk's whole update
    own_parts = spec.visibility == "token" and spec.chunk != 1
    whole = Chunk(tokens.span(0, 0), tokens, slice(0, total), True)
    fast = point = set_off(spec, fast)
    for chunk in [whole] if spec.chunk is None else chunks(spec, tokens, None):
        if chunk.renews:
            point = fast
        queries, own = q[:, :, chunk.queries], chunk.own
        entered = chunk.complete or spec.visibility in ("chunk", "full")
        if spec.visibility == "past":
            _note_read(spec, note, fast.weights, queries)
        elif own_parts:
            prefixes = prefix_updates(spec, fast, chunk, point.weights)
            _note_read(spec, note, prefixes.weights, queries.unsqueeze(-2))
            partials.append(_partial(spec, fast, prefixes, chunk, point.weights, note.as_read(spec)))
        if spec.visibility == "past" or own_parts:
            seen += [len(bounds) - 1] * queries.shape[2]
        places = range(chunk.queries.start, chunk.queries.stop)
        for row in range(len(own)) if each > 1 else range(1):
            writers = own.span(row, row + 1) if each > 1 else own
            mine = [places[row // each]] if each > 1 else list(places)
            for step in range(spec.steps):
                at = point.weights if not row and not step else fast.weights
                fast = _note_update(spec, note, fast, writers, at, mine, entered)
                if entered:
                    bounds.append(len(note.tokens))
                elif spec.steps > 1:
                    break
            if entered:
                fast = slid(spec, fast, writers)
                short = (spec.chunk or 1) - len(mine)
                note.earlier = (note.earlier + mine + [0] * short)[-earlier:] if earlier else []
        if spec.visibility == "chunk" or (spec.visibility == "token" and not own_parts):
            _note_read(spec, note, seen_weights(spec, fast, own), queries)
            seen += [len(bounds) - 1] * queries.shape[2]
        if spec.read_rate and chunk.complete and chunk.closes and spec.refresh != "call":
            share = last_share(own, fast.weights["out"])
            note.left.append(share.reshape(share.shape[:2]))
            note.closes.append(len(bounds) - 1)
            fast = set_off(spec, fast, share)
    if spec.visibility == "full":
        _note_read(spec, note, fast.weights, q)
        seen = [len(bounds) - 1] * total
    return _assemble(spec, note, initial, bounds, seen, partials, tokens)


def _last_layer(spec: InnerLoop, weights: Mapping[str, Tensor]) -> Tensor:
    """The last layer as a state, a bias as its last row."""
    out = weights["out"]
    return torch.cat((out, weights["out.bias"]), dim=-2) if spec.network.has_bias else out


def _with_ones(spec: InnerLoop, features: Tensor) -> Tensor:
    """Features with one of ones for a bias."""
    return F.pad(features, (0, 1), value=1.0) if spec.network.has_bias else features


def _note_read(spec: InnerLoop, note: _Trajectory, weights: Mapping[str, Tensor], queries: Tensor) -> None:
    """Note the effective queries, output gates and heads of some reads; per-token weights give queries an axis more."""
    network, per_token = spec.network, queries.dim() == 5

    def flat(x: Tensor) -> Tensor:
        return x.squeeze(-2) if per_token else x

    note.q.append(flat(_with_ones(spec, network.features(weights, queries))))
    gate, head = network.gate(weights, queries), network.output_head
    if gate is not None:
        note.gates.append(flat(gate))
    if head is None or head.where == "loss":
        return
    shape = (*queries.shape[:-1], weights["out"].shape[-1])
    note.gains.append(flat(head.gain(weights).expand(shape)))
    if not head.fast:
        note.shifts.append(flat(weights["beta"].expand(shape)))
    if head.residual:
        note.skips.append(flat(queries))


def _note_update(
    spec: InnerLoop,
    note: _Trajectory,
    fast: FastWeights,
    tokens: Tokens,
    at: Mapping[str, Tensor],
    places: list[int],
    entered: bool,
) -> FastWeights:
    """Note one update's writes and, where it enters the state, its factors; returns the weights after it.

    Args:
        spec: the inner loop.
        note: the trajectory that is written to.
        fast: the weights before.
        tokens: what writes.
        at: the weights that gradients are taken at.
        places: of the tokens among all.
        entered: whether it enters the state.
    """
    network, out, gates = spec.network, fast.weights["out"], chunk_gates(tokens, fast.weights["out"])
    momentum, retention, step = (gates.get(name) for name in ("momentum", "retention", "step_rate"))
    at = decayed(spec, at, gates)
    k, v, rates, erase = writers_of(spec, fast, tokens, out.dtype)
    prediction = network.predict(at, k if erase is None else erase) if spec.loss == "squared" else None
    g = descent_direction(spec.loss, prediction, v)
    pulled, _ = network.through_head(at, k, g)
    features, values = _with_ones(spec, network.features(at, k)), gated(network.gate(at, k), pulled).expand_as(v)
    rate = rates["out"]
    if network.has_bias and not _alike(rate, rates["out.bias"]):
        both = [torch.as_tensor(x, dtype=out.dtype, device=out.device) for x in (rate, rates["out.bias"])]
        features = torch.cat((features[..., :-1] * both[0], features[..., -1:] * both[1]), dim=-1)
        rate = 1.0 if tokens.mask is None else tokens.mask[..., None].to(out.dtype)
    note.k.append(features)
    note.v.append((rate * values).expand_as(v))
    note.tokens += note.earlier + places
    if not entered:
        return fast

    updates = gradient(spec, at, k, v, rates, erase)
    after = apply_update(spec, fast, updates, gates)
    summed = updates if momentum is None else after.momentum
    if spec.sums_updates:
        summed = {name: after.window[name][..., -1, :, :] + fast.window[name].sum(-3) for name in updates}
    lead = out.shape[:2]
    writes = out.new_ones(lead, dtype=torch.bool)
    if tokens.mask is not None:
        writes = tokens.mask.any(2).expand_as(writes)
        after = after.join(fast, lambda new, old: torch.where(as_factor(writes, new), new, old))

    def settled(factor: Tensor, idle: float) -> Tensor:
        """A factor that leaves sequences as they are in which nothing writes."""
        return torch.where(as_factor(writes, factor), factor, idle)

    if momentum is not None:
        note.momentum.append(settled(momentum.reshape(lead), 1.0))
    if retention is not None:
        kept = retention.reshape(lead) if spec.gates["retention"].per == "head" else retention.squeeze(-1)
        note.retention.append(settled(kept, 1.0))
    if step is not None or (tokens.mask is not None and spec.chunk is not None):
        note.step.append(settled(out.new_ones(lead) if step is None else step.reshape(lead), 0.0))
    if spec.clip:
        note.clipping.append(1 / (channel_norm(network, summed["out"]) + 1))
    if spec.anchor is not None:
        held = {name: pull(spec.anchor, after.importance[name]) for name in spec.updated}
        note.pull.append(settled(_last_layer(spec, held), 0.0))
        note.follow.append(settled(out.new_full(lead, spec.anchor.follow), 1.0))
    if spec.normalize:
        shaped = shape_update(spec, summed["out"])
        base = fast.accumulated.get("out", out)
        base = (base if retention is None else retention * base) + spec.sign * (shaped if step is None else step * shaped)
        if spec.anchor is not None:
            base = base - held["out"] * (base - fast.anchor["out"])
        factor = rescale(network, base, fast.norms["out"])
        note.rescaling.append(torch.where(as_factor(writes, factor), factor, note.as_read(spec)))
    return after


def _alike(a: Tensor | float, b: Tensor | float) -> bool:
    """Whether two rates are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _partial(
    spec: InnerLoop,
    fast: FastWeights,
    each: FastWeights,
    chunk: Chunk,
    at: Mapping[str, Tensor],
    idle_rescaling: Tensor | float,
) -> Partial:
    """A chunk's share of the factors of `visibility="token"`; `idle_rescaling` that of tokens before which none writes."""
    mask, gates = chunk.own.mask, chunk.own.gates
    found = {name: prefix_gates(name, gates[name], mask) for name in ("momentum", "retention", "step_rate") if name in gates}
    rescaling = None
    if spec.normalize:
        if spec.normalize == "read":
            before = each.accumulated["out"]
        else:
            # the weights that line 6 rescales are those of the same rule without it
            plain = replace(fast, norms={}, accumulated={})
            before = prefix_updates(spec.replace(normalize=False), plain, chunk, at).weights["out"]
        rescaling = rescale(spec.network, before, fast.norms["out"].unsqueeze(2)).squeeze(-2)
    if mask is not None:
        # tokens behind which nothing of their chunk has been written see the state as it is
        writes = (mask.cumsum(2) > 0).expand(each.weights["out"].shape[0], fast.weights["out"].shape[1], -1)
        idle = {"momentum": 0.0, "retention": 1.0, "step_rate": 0.0}
        found = {name: torch.where(as_factor(writes, x), x, idle[name]) for name, x in found.items()}
        rescaling = None if rescaling is None else torch.where(writes[..., None], rescaling, idle_rescaling)
    earlier = 0 if spec.sums_updates else (spec.window_size - 1) * (spec.chunk or 1)
    return Partial(found.get("momentum"), found.get("retention"), rescaling, found.get("step_rate"), earlier)


def _assemble(
    spec: InnerLoop,
    note: _Trajectory,
    initial: Tensor,
    bounds: list[int],
    seen: list[int],
    partials: list[Partial],
    tokens: Tokens,
) -> LinearAttention:
    """Join what was noted, in the layout of `LinearAttention`."""
    conv = isinstance(spec.network, DepthwiseConv)
    width = tokens.v.shape[-1]

    def rows(parts: list[Tensor], fill: Tensor, features: bool) -> Tensor:
        """`[B, H, T, F]` parts (a convolution: `[B, H, T, D, 9]`, values `[B, H, T, D]`) joined as `[B, T, H, F]`."""
        x = torch.cat(parts, dim=2) if parts else fill
        if conv:
            x = x.movedim(3, 2) if features else x.mT.unsqueeze(-1)
            x = x.flatten(1, 2)
        return x.transpose(1, 2)

    def factors(parts: list[Tensor]) -> Tensor | None:
        """One gate per update: `[B, H, U]`; channels of a convolution share their head's."""
        if not parts:
            return None
        x = torch.stack(parts, dim=2)
        return x.repeat_interleave(width, dim=1) if conv else x

    def heads_last(parts: list[Tensor]) -> Tensor | None:
        return torch.cat(parts, dim=2).transpose(1, 2) if parts else None

    def channel_factors(parts: list[Tensor]) -> Tensor | None:
        """One factor per update and value channel: `[B, H, U, Dv]`."""
        if not parts:
            return None
        if conv:
            return torch.stack([x.reshape(x.shape[0], -1, 1) for x in parts], dim=2)
        return torch.stack([x.squeeze(-2) for x in parts], dim=2)

    def joined(parts: list[Tensor | None]) -> Tensor | None:
        found = [x for x in parts if x is not None]
        return torch.cat(found, dim=2) if found else None

    partial = None
    if partials:
        partial = Partial(
            joined([p.momentum for p in partials]),
            joined([p.retention for p in partials]),
            joined([p.rescaling for p in partials]),
            joined([p.step for p in partials]),
            partials[0].ahead,
        )
    rescaling, read_rescaling = channel_factors(note.rescaling), None
    if spec.normalize == "read" and partial is None:
        first = initial.new_ones(*initial.shape[:2], 1, 1) if rescaling is None else torch.ones_like(rescaling[:, :, :1])
        read_rescaling = first if rescaling is None else torch.cat((first, rescaling), dim=2)
    empty = initial.new_empty(*initial.shape[:2], 0, initial.shape[-2])
    anchored = share = head = None
    if spec.anchor is not None:
        pulls = [x.flatten(3).flatten(1, 2).unsqueeze(-1) if conv else x for x in note.pull]
        none = initial.new_empty(*initial.shape[:2], 0)
        follow = factors(note.follow)
        pulled = torch.stack(pulls, dim=2) if pulls else none[..., None, None]
        anchored = Anchored(pulled, none if follow is None else follow, spec.anchor.detach)
    if spec.read_rate:
        left = torch.stack(note.left, dim=2) if note.left else initial.new_empty(*initial.shape[:2], 0)
        share = SeenShare(tokens.gates["read_rate"], tuple(note.closes), left)
    behind = spec.network.output_head
    if behind is not None and note.gains:
        gain = torch.cat(note.gains, dim=2).transpose(1, 2)
        head = OutputHead(behind.eps, gain, heads_last(note.shifts), heads_last(note.skips))
    return LinearAttention(
        q=rows(note.q, empty, features=True),
        k=rows(note.k, empty, features=True),
        v=rows(note.v, tokens.v, features=False),
        initial_state=initial.flatten(3).flatten(1, 2).unsqueeze(-1) if conv else initial,
        gate=rows(note.gates, empty, features=False) if note.gates else None,
        write_tokens=torch.tensor(note.tokens, dtype=torch.long, device=initial.device),
        update_bounds=tuple(bounds),
        seen_updates=tuple(seen),
        sign=spec.sign,
        momentum=factors(note.momentum),
        retention=factors(note.retention),
        rescaling=None if spec.normalize == "read" else rescaling,
        read_rescaling=read_rescaling,
        clipping=channel_factors(note.clipping),
        orthogonalize=spec.orthogonalize,
        partial=partial,
        step=factors(note.step),
        window=spec.window_size if spec.sums_updates else 1,
        anchored=anchored,
        share=share,
        head=head,
    )
