"""A row cut over 1 to 4 ranks gives what one process gives: outputs, end states and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import check, distance, layouts, model_alone, model_over_ranks, refusals, refused
from lact_small import LADDER, tokens
from ranks import started

from published import SYSTEMS
from strategies import affine_specs, general_specs, parallel_specs, specs


@pytest.fixture(scope="module")
def ranks():
    with started() as pool:
        yield pool


@st.composite
def rows(draw, spec, most=4):
    """How many tokens each rank has, and the documents of the whole row or None."""
    size = draw(st.integers(1, most))
    unit = spec.chunk if spec.visibility == "chunk" else 1
    longest = max(1, 12 // unit)
    lengths = [unit * n for n in draw(st.lists(st.integers(0, longest), min_size=size, max_size=size))]
    if not sum(lengths):
        lengths[0] = unit
    if not draw(st.booleans()):
        return lengths, None
    total = sum(lengths) // unit
    cuts = draw(st.lists(st.integers(1, max(total - 1, 1)), max_size=4, unique=True)) if total > 1 else []
    return lengths, [0, *(unit * c for c in sorted(cuts)), sum(lengths)]


def sizes(draw, lengths, bounds, dtype=torch.float64):
    batch = 1 if bounds is not None else draw(st.integers(1, 2))
    return {
        "batch": batch, "tokens": sum(lengths), "heads": 2, "key_width": 3, "value_width": 4, "hidden": 5,
        "seed": draw(st.integers(0, 1000)), "dtype": dtype,
    }  # fmt: skip


@given(st.data())
@settings(max_examples=60)
def test_any_inner_loop_that_has_a_parallel_form(ranks, data):
    spec = data.draw(parallel_specs(visibilities=("past", "token", "chunk")))
    lengths, bounds = data.draw(rows(spec))
    check(ranks, spec, sizes(data.draw, lengths, bounds), bounds, lengths, 1e-9)


@given(st.data())
@settings(max_examples=60)
def test_any_inner_loop_whose_writes_add_up(ranks, data):
    """Gates per key channel, decays before the gradient, erased keys, rates, biases, heads, windows, spans, writes."""
    spec = data.draw(affine_specs())
    spec = spec if spec.refresh != "call" else spec.replace(refresh=None)
    lengths, bounds = data.draw(rows(spec))
    # a residual head adds its input to what is read
    check(ranks, spec, sizes(data.draw, lengths, bounds) | {"value_width": 3}, bounds, lengths, 1e-9)


@given(st.data())
@settings(max_examples=60)
def test_any_causal_inner_loop_in_the_ring(ranks, data):
    spec = data.draw(specs(visibilities=("past", "token", "chunk")))
    lengths, bounds = data.draw(rows(spec))
    check(ranks, spec, sizes(data.draw, lengths, bounds), bounds, lengths, 1e-9, schedule="ring")


@given(st.data())
@settings(max_examples=60)
def test_any_causal_inner_loop_with_further_fields_in_the_ring(ranks, data):
    spec = data.draw(general_specs(visibilities=("past", "token", "chunk")))
    spec = spec if spec.refresh != "call" else spec.replace(refresh=None)
    if spec.anchor is not None and spec.anchor.peak == "batch":
        spec = spec.replace(anchor=spec.anchor.replace(peak="head"))
    lengths, bounds = data.draw(rows(spec))
    given = sizes(data.draw, lengths, bounds) | {"value_width": 3}
    check(ranks, spec, given, bounds, lengths, 1e-9, schedule="ring")


@given(st.data())
@settings(max_examples=25)
def test_the_language_model(ranks, data):
    rung = data.draw(st.sampled_from(sorted(LADDER)))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
    total, bounds = sum(lengths), None
    if data.draw(st.booleans()) and total > 1:
        bounds = [0, *sorted(data.draw(st.lists(st.integers(1, total - 1), max_size=3, unique=True))), total]
    rows = 1 if bounds else data.draw(st.integers(1, 2))
    ids = tokens(rows, total, seed=data.draw(st.integers(0, 99)))
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": bounds}
    loss, grads = model_alone(LADDER[rung], batch, {})
    results = ranks.run(model_over_ranks, len(lengths), LADDER[rung], batch, lengths, "auto", {}, data.draw(st.booleans()))
    assert distance(sum(r[0] for r in results), loss) < 1e-9
    for name, want in grads.items():
        # what reduces gradients over ranks needs one from every rank
        assert distance(sum(r[1][name] for r in results), want) < 1e-9, name


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rung_in_float32(ranks, name, size):
    lengths = [13, 3, 21, 8][:size]
    given = {"batch": 1, "tokens": sum(lengths), "heads": 2, "key_width": 6, "value_width": 6, "hidden": 6, "seed": size}
    for bounds in (None, [0, 14, 15, sum(lengths)]):
        check(ranks, LADDER[name], given | {"dtype": torch.float32}, bounds, lengths, 1e-5)


def test_rounding_to_bfloat16_comes_at_the_same_places_over_ranks(ranks):
    ids = tokens(1, 60)
    batch = {"input_ids": ids, "labels": ids}
    for rung in ("rung2", "rung0"):
        loss, grads = model_alone(LADDER[rung], batch, {"dtype": torch.float32}, autocast=True)
        results = ranks.run(model_over_ranks, 2, LADDER[rung], batch, [36, 24], "auto", {"dtype": torch.float32}, True, True)
        assert distance(sum(r[0] for r in results), loss) < 1e-4
        both = [torch.cat([g.flatten() for g in found.values()]) for found in (grads, *(r[1] for r in results))]
        assert distance(both[1] + both[2], both[0]) < 1e-2


@pytest.mark.parametrize("rung", ["rung2", "rung6", "rung0"])
def test_bytes_do_not_grow_with_the_row(ranks, rung):
    """Nor, but for the number of states that a scan gathers, with the ranks."""

    def received(size, each):
        ids = tokens(1, size * each)
        batch = {"input_ids": ids, "labels": ids}
        results = ranks.run(model_over_ranks, size, LADDER[rung], batch, [each] * size, "auto", {}, False)
        return [r[2] for r in results]

    few, many = received(2, 136), received(2, 272)
    assert few == many
    assert all(sum(kinds.values()) > 0 for kinds in few)
    # a state's worth for each layer, scan and direction: last layer of 2 heads, 16 x 16, and the gates' products
    if rung != "rung0":
        scans = 2 if rung == "rung2" else 1
        assert {kinds["scan"] for kinds in few} == {2 * 2 * scans * 8 * (2 * 16 * 16 + 2)}
        assert {kinds["scan"] for kinds in received(3, 136)} == {2 * few[0]["scan"]}


@pytest.mark.parametrize("name", ["gla", "mamba2", "gated_delta_net", "comba", "delta_product", "rwkv7", "ttt_mlp"])
def test_layers_of_published_systems_over_ranks(ranks, name):
    """Convolutions reach over slices, also over ones that are shorter than they are, and not over documents."""
    ids = tokens(1, 23)
    for bounds, lengths in ((None, [12, 2, 9]), ([0, 5, 13, 14, 23], [8, 8, 7])):
        batch = {"input_ids": ids, "labels": ids, "cu_seqlens": bounds}
        loss, grads = model_alone(SYSTEMS[name], batch, {"projections": name})
        results = ranks.run(model_over_ranks, 3, SYSTEMS[name], batch, lengths, "auto", {"projections": name}, True)
        assert distance(sum(r[0] for r in results), loss) < 1e-9
        for parameter, want in grads.items():
            assert distance(sum(r[1][parameter] for r in results), want) < 1e-9, parameter


def test_what_is_taken_at_the_weights_before_a_call_is_not_cut_over_ranks(ranks):
    inner = SYSTEMS["titans"].replace(refresh="call")
    ranks.run(refused, 2, inner, {"projections": "titans"}, "no inner loop with refresh='call'")


def test_the_model_refuses_what_a_slice_cannot_have(ranks):
    ranks.run(refusals, 2)


def test_a_sequence_has_a_group_of_its_own_also_where_it_spans_all_processes(ranks):
    everyone = [0, 1, 2, 3]
    for number, found in enumerate(ranks.run(layouts, 4)):
        assert found == [None, everyone[:2] if number < 2 else everyone[2:], everyone]
