"""What ranks run in these tests, and the same on one process: outputs, end states and gradients of one `ttt` call."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kvbind import SequenceShard, count_bytes, sequence_parallel, shard_batch, ttt
from kvbind.models import LactForCausalLM
from kvbind.train.config import ParallelConfig
from kvbind.train.parallel import MeshLayout
from strategies import operands

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from lact_small import LADDER, small_config, tokens

from checkpointing import enable_checkpointing


def named_leaves(o):
    """A call's differentiable tensors by name."""
    leaves = {"q": o.q, "k": o.k, "v": o.v} | {f"weights.{n}": x for n, x in o.weights.items()}
    for name, x in o.options.items():
        leaves |= {f"{name}.{n}": y for n, y in x.items()} if isinstance(x, dict) else {name: x}
    return {name: x.detach().requires_grad_() for name, x in leaves.items()}


def call(spec, leaves, cut=lambda x, axis=1, rows=1: x, **options):
    """`ttt` on the leaves, those with a token axis cut."""
    weights = {name.removeprefix("weights."): x for name, x in leaves.items() if name.startswith("weights.")}
    each = {"rows": spec.writes}
    rates = {name.removeprefix("lr."): cut(x, **each) for name, x in leaves.items() if name.startswith("lr.")}
    gates = {name: cut(leaves[name], **each if gate.writes == "itself" else {}) for name, gate in spec.gates.items()}
    q, (k, v) = cut(leaves["q"]), (cut(leaves[name], **each) for name in ("k", "v"))
    return ttt(spec, weights, q, k, v, lr=rates or 1.0, **gates, **options)


def probe(shape, seed, dtype):
    """Fixed random cotangents."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def held(state, document):
    """What one document's state holds, but for the pending tokens."""
    return {
        name: x[document] for name, x in state.tensors.items() if name.startswith(("weights.", "momentum.", "accumulated."))
    }


def state_loss(state, document, place):
    """A scalar of one document's end state, the document counted from the row's start."""
    total = 0.0
    for i, (_, x) in enumerate(sorted(held(state, document).items())):
        total = total + (x * probe(x.shape, 100 * place + i, x.dtype)).sum()
    return total


def alone(spec, sizes, cu_seqlens, options):
    """One process: outputs, end states by document, gradients by name."""
    leaves = named_leaves(operands(spec, **sizes))
    y, state = call(spec, leaves, cu_seqlens=cu_seqlens, **options)
    loss = (y * probe(y.shape, 1, y.dtype)).sum()
    for document in range(state.batch):
        loss = loss + state_loss(state, document, document)
    loss.backward()
    return y.detach(), [held(state.detach(), i) for i in range(state.batch)], gradients(leaves)


def over_ranks(group, spec, sizes, cu_seqlens, lengths, schedule, options):
    """One rank: outputs of its slice, end states of the documents that end in it, its share of the gradients."""
    shard = SequenceShard(group, lengths, cu_seqlens, schedule)
    leaves = named_leaves(operands(spec, **sizes))
    y, state = call(spec, leaves, shard.take, sequence=shard, **options)
    whole = probe((leaves["q"].shape[0], shard.tokens, *y.shape[2:]), 1, y.dtype)
    loss = (y * shard.take(whole)).sum()
    ends = {}
    for document, place in ending(shard, state.batch):
        loss = loss + state_loss(state, document, place)
        ends[place] = held(state.detach(), document)
    loss.backward()
    return y.detach(), ends, gradients(leaves)


def ending(shard, batch):
    """Which of a slice's documents end in it: their places in the slice and in the row."""
    here, bounds = shard.here, shard.cu_seqlens
    if bounds is None:
        last = here.length > 0 and here.start + here.length == shard.tokens
        return [(i, i) for i in range(batch)] if last else []
    found = []
    for i, (start, stop) in enumerate(itertools.pairwise(here.bounds)):
        ends = here.start + stop
        if start < stop and ends in bounds:
            found.append((i, bounds.index(ends) - 1))
    return found


def gradients(leaves):
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def distance(x, reference):
    """Relative error in norm."""
    return float((x.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-12))


def check(ranks, spec, sizes, cu_seqlens, lengths, bound, schedule="auto", **options):
    """Hold ranks to one process: within `bound`, or no further from float64 than twice what one process is."""
    y, ends, grads = alone(spec, sizes, cu_seqlens, options)
    results = ranks.run(over_ranks, len(lengths), spec, sizes, cu_seqlens, lengths, schedule, options)
    wanted = {"y": y} | grads
    found = {"y": torch.cat([r[0] for r in results], dim=1)}
    found |= {name: sum(r[2][name] for r in results) for name in grads}
    for r in results:
        for place, tensors in r[1].items():
            wanted |= {f"{name} of {place}": ends[place][name] for name in tensors}
            found |= {f"{name} of {place}": x for name, x in tensors.items()}
    documents = range(len(ends)) if cu_seqlens is None else np.flatnonzero(np.diff(cu_seqlens))
    assert sorted(place for r in results for place in r[1]) == list(documents)
    far = [name for name, x in found.items() if distance(x, wanted[name]) >= bound]
    if far and sizes["dtype"] == torch.float32:
        # Newton-Schulz magnifies rounding in what it nearly cancels
        y, ends, grads = alone(spec, sizes | {"dtype": torch.float64}, cu_seqlens, options)
        exact = {"y": y} | grads
        exact |= {f"{name} of {place}": x for place, held in enumerate(ends) for name, x in held.items()}
        far = [n for n in far if distance(found[n], exact[n]) > 2 * distance(wanted[n], exact[n])]
    assert not far, {name: distance(found[name], wanted[name]) for name in far}


def model_alone(inner, batch, fields, autocast=False):
    """One process: the model's loss and the gradient of every parameter."""
    model = make_model(inner, fields)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(dict(model.named_parameters()))


def model_over_ranks(group, inner, batch, lengths, schedule, fields, checkpointing, autocast=False):
    """One rank of the same: its part of the loss and of the gradients, and the bytes it received."""
    model = make_model(inner, fields)
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    shard = SequenceShard(group, lengths, batch.get("cu_seqlens"), schedule)
    with count_bytes() as traffic:
        with sequence_parallel(shard), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**shard_batch(batch, shard)).loss
        loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters()}, dict(traffic.received)


def make_model(inner, fields):
    torch.manual_seed(0)
    dtype = fields.get("dtype", torch.float64)
    return LactForCausalLM(small_config(inner, **{n: x for n, x in fields.items() if n != "dtype"})).to(dtype).train()


def refusals(group):
    """What a model does not take inside `sequence_parallel`."""
    model = make_model(LADDER["rung2"], {})
    ids = tokens(1, 20)
    shard = SequenceShard(group, [12, 8])
    batch = shard_batch({"input_ids": ids, "labels": ids}, shard)
    part = {"input_ids": batch["input_ids"]}
    for given, message in (
        (part | {"labels": part["input_ids"]}, "labels must be shift_labels inside sequence_parallel"),
        (part | {"shift_labels": batch["shift_labels"]}, "num_items_in_batch must be the whole row's"),
        (batch | {"labels": part["input_ids"]}, "at most one of labels and shift_labels"),
        (part | {"attention_mask": torch.ones_like(part["input_ids"])}, "attention_mask must be None inside"),
        (part | {"use_cache": True}, "no cache can be made inside sequence_parallel"),
        ({"input_ids": ids}, "the input must be the .* tokens of rank"),
    ):
        with pytest.raises(ValueError, match=message), sequence_parallel(shard):
            model(**given)


def refused(group, inner, fields, message):
    """A model that cannot run on a slice says so, on every rank."""
    model, ids = make_model(inner, fields), tokens(1, 16)
    shard = SequenceShard(group, [8, 8])
    with pytest.raises(ValueError, match=message), sequence_parallel(shard):
        model(**shard_batch({"input_ids": ids, "labels": ids}, shard))


def layouts(group):
    """By the number of ranks that share a sequence: which, in a group in which nothing else travels."""
    found = []
    for sequence in (1, 2, 4):
        layout = MeshLayout.of(ParallelConfig(sequence=sequence), torch.device("cpu"))
        of_weights = {layout.weights.get_group(name).group_name for name in ("replicate", "shard")}
        assert layout.group is None or layout.group.group_name not in of_weights | {dist.group.WORLD.group_name}
        found.append(None if layout.group is None else dist.get_process_group_ranks(layout.group))
    return found
