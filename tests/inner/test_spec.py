import dataclasses
import json
from itertools import pairwise

import pytest
import yaml
from hypothesis import given

import kvbind
from kvbind import GLU, DepthwiseConv, InnerLoop, Linear, NewtonSchulz, SwiGLU, systems
from kvbind.inner.gates import GATES
from kvbind.inner.systems import RUNGS, SOURCES, SYSTEMS
from kvbind.inner.systems.registry import KV_BINDING
from strategies import memory, specs


def test_lact_llm_is_the_value_that_the_documentation_spells_out():
    assert systems.lact_llm(chunk=2048) == InnerLoop(
        network=SwiGLU(),
        loss="dot",
        update="all",
        momentum=True,
        orthogonalize=NewtonSchulz(),
        normalize=True,
        direction="descent",
        query="query",
        steps=1,
        chunk=2048,
        visibility="past",
    )


@given(specs())
def test_every_spec_survives_plain_data_and_yaml(spec):
    assert InnerLoop.from_dict(spec.to_dict()) == spec
    assert InnerLoop.from_dict(yaml.safe_load(spec.to_yaml())) == spec
    assert InnerLoop.from_yaml(spec.to_yaml()) == spec


def test_yaml_files_are_written_and_read(tmp_path):
    spec = systems.vittt("conv", grid=(3, 5))
    spec.to_yaml(tmp_path / "inner.yaml")
    assert InnerLoop.from_yaml(tmp_path / "inner.yaml") == spec
    assert InnerLoop.from_yaml(str(tmp_path / "inner.yaml")) == spec


def test_a_short_yaml_takes_defaults():
    assert InnerLoop.from_yaml("{network: SwiGLU, chunk: 16}") == InnerLoop(network=SwiGLU(), chunk=16)


@given(specs())
def test_specs_are_frozen_hashable_and_shown_by_what_is_not_default(spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.loss = "dot"
    assert hash(spec) == hash(InnerLoop.from_dict(spec.to_dict()))
    assert (f"normalize={spec.normalize!r}" in repr(spec)) == bool(spec.normalize)


def test_an_edit_is_a_copy():
    spec = systems.lact_llm(chunk=4)
    edited = spec.replace(update="last", normalize=False)
    assert (edited.update, edited.normalize, edited.chunk) == ("last", False, 4)
    assert spec.normalize
    assert spec.orthogonalize.replace(coefficients=((1.0, 2.0, 3.0),)).coefficients == ((1.0, 2.0, 3.0),)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"network": "SwiGLU"}, TypeError, "network must be one of Linear"),
        ({"loss": "dott"}, ValueError, "loss must be one of 'dot', 'squared'; got 'dott' .did you mean 'dot'"),
        ({"update": "first"}, ValueError, "update must be one of"),
        ({"visibility": "future"}, ValueError, "visibility must be one of"),
        ({"direction": "up"}, ValueError, "direction must be one of"),
        ({"query": "value"}, ValueError, "query must be one of"),
        ({"momentum": 0.9}, TypeError, "momentum must be True or False; got 0.9"),
        ({"orthogonalize": True}, TypeError, "orthogonalize must be a NewtonSchulz or None"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1; got 0"),
        ({"chunk": 0}, ValueError, "chunk must be an int of at least 1; got 0"),
        ({"chunk": 2.0}, TypeError, "chunk must be an int"),
        ({"chunk": None}, ValueError, "chunk must be an int of at least 1 under visibility='past'; got None"),
        ({"visibility": "full", "network": DepthwiseConv()}, ValueError, "DepthwiseConv needs chunk=None"),
        ({"clip": True, "orthogonalize": NewtonSchulz()}, ValueError, "exclude each other"),
        ({"network": DepthwiseConv()}, ValueError, "DepthwiseConv needs visibility='full'"),
        (
            {"network": DepthwiseConv(), "visibility": "full", "chunk": None, "orthogonalize": NewtonSchulz()},
            ValueError,
            "orthogonalize must be None for DepthwiseConv",
        ),
        ({"visibility": "token", "orthogonalize": NewtonSchulz()}, ValueError, "orthogonalize acts on whole chunks"),
        ({"visibility": "token", "clip": True}, ValueError, "clip acts on whole chunks"),
        ({"visibility": "token", "steps": 2}, ValueError, "steps must be 1 under visibility='token'"),
        ({"momentun": True}, TypeError, "no field 'momentun' .did you mean 'momentum'"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message):
        InnerLoop(network=Linear(), chunk=4).replace(**fields)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"chunk": 4}, "needs a field 'network'"),
        ({"network": "SwiGlu", "chunk": 4}, "did you mean 'SwiGLU'"),
        ({"network": {"kind": "MLP", "deepth": 2}, "chunk": 4}, "did you mean 'depth'"),
        ({"network": "Linear", "chunks": 4}, "did you mean 'chunk'"),
        ([], "needs a dict"),
    ],
)
def test_bad_plain_data_is_refused_by_name(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        InnerLoop.from_dict(data)


def test_every_named_system_is_valid_and_unknown_names_get_the_nearest():
    for name in SYSTEMS:
        assert isinstance(systems.named(name), InnerLoop)
    with pytest.raises(ValueError, match="did you mean 'lact_llm'"):
        systems.named("lact_lm")
    with pytest.raises(ValueError, match="branch must be"):
        systems.vittt("gelu")
    with pytest.raises(ValueError, match="grid belongs to the conv branch"):
        systems.vittt("glu", grid=(2, 2))


def test_every_system_is_cited_by_name_and_by_value():
    for name in SYSTEMS:
        entries = kvbind.cite(name)
        assert entries.count("@misc{") == len(SOURCES[name]) + 1 >= 2, name
        assert entries.endswith(KV_BINDING.bibtex())
        equal = [other for other in SYSTEMS if systems.named(other) == systems.named(name)]
        assert kvbind.cite(systems.named(name)) == f"% {equal[0]}\n{kvbind.cite(equal[0])}"
    assert "eprint = {2406.06484}" in kvbind.cite(systems.delta_net(chunk=64))
    edited = kvbind.cite(systems.lact_llm().replace(steps=2, update="last"))
    assert edited.startswith("% nearest named system: lact_llm; differs in update, steps\n@misc{arxiv2505.23884")
    with pytest.raises(ValueError, match="did you mean 'titans'"):
        kvbind.cite("titan")
    with pytest.raises(TypeError, match=r"what must be a kvbind\.InnerLoop or the name of a system; got int"):
        kvbind.cite(3)


@given(specs())
def test_gates_are_those_that_the_fields_ask_for(spec):
    assert list(spec.gates) == [gate.name for gate in GATES if getattr(spec, gate.name)]
    assert all(gate.name == name for name, gate in spec.gates.items())


def test_what_is_written_of_an_inner_loop_stays_as_stored_runs_have_it():
    """Runs are shared by a hash of these words."""
    assert json.dumps(memory(4).to_dict()) == (
        '{"network": {"kind": "MLP", "activation": "silu", "depth": 1}, "loss": "squared", "update": "all", '
        '"momentum": true, "orthogonalize": null, "clip": false, "retention": true, "normalize": false, '
        '"direction": "descent", "query": "query", "steps": 1, "chunk": 4, "visibility": "past", "token_lr": true}'
    )


def test_the_ladder_goes_from_the_system_to_linear_attention_one_change_at_a_time():
    rungs = systems.ladder(systems.lact_llm(chunk=8))
    assert list(rungs) == list(RUNGS)
    assert rungs["rung0"] == systems.lact_llm(chunk=8)
    values = list(rungs.values())
    for above, below in pairwise(values):
        changed = [name for name in above.field_names() if getattr(above, name) != getattr(below, name)]
        assert len(changed) == 1, changed
    assert values[-1] == InnerLoop(network=Linear(), update="last", chunk=8, token_lr=False)
    assert [kvbind.explain(spec).parallel for spec in values] == [False, False, True, True, True, True, True]


def test_the_ladder_of_vittt_drops_the_gate_and_the_clipping_and_keeps_the_convolution():
    glu, conv = systems.ladder(systems.vittt()), systems.ladder(systems.vittt("conv"))
    assert glu["rung0"].network == GLU()
    assert glu["rung3"].network == Linear()
    assert glu["rung5"].clip
    assert not glu["rung6"].clip
    assert all(spec.network == DepthwiseConv() for spec in conv.values())


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{network: [", ValueError, "source must be YAML; the text is not: "),
        ("{network: 3}", TypeError, "network must be a kind, or a dict with one"),
        ("{network: Swiglu}", ValueError, "did you mean 'SwiGLU'"),
        ("hello", ValueError, r"the text must hold fields of an inner loop, such as .*; it holds 'hello'"),
        ("", ValueError, "chunk: 512}; it is empty"),
        (3, TypeError, "source must be a path or YAML text; got int"),
    ],
)
def test_yaml_that_is_no_inner_loop_is_refused(text, kind, message):
    with pytest.raises(kind, match=message):
        InnerLoop.from_yaml(text)
