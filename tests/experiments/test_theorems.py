import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kvbind import MLP, InnerLoop, Linear, NewtonSchulz, linearize, systems
from kvbind.experiments import theorems
from kvbind.experiments.theorems import CLAIMS, PARALLEL, Errors, Setting, check, inner_loops, judge, reproduce

TINY = Setting(1, 16, 1, 4, 6, 3)


def some(names):
    every = inner_loops(TINY.chunk)
    return {name: every[name] for name in names}


COVERING = ["lact_llm", "lact_nvs", "vittt", "vittt_conv", "gated_delta_net", "titans", "rung 2 of lact_llm",
            "lact_llm, ascent", "lact_llm, key for query", "lact_llm, 4 steps", "titans, one step"]  # fmt: skip
"""Inner loops that every claim concerns one of."""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(theorems.SETTINGS, "smoke", TINY)
    monkeypatch.setattr(theorems, "inner_loops", lambda chunk: some(COVERING))


def test_every_named_system_and_rung_is_checked_with_several_updates_and_with_one():
    specs = inner_loops(12)
    assert set(systems.SYSTEMS) <= set(specs)
    rungs = [spec for name, spec in specs.items() if name.startswith("rung ")]
    assert [specs["lact_llm"], *rungs] == list(systems.ladder(systems.lact_llm(12)).values())
    for name in systems.SYSTEMS:
        single = specs[name] if specs[name].visibility == "full" else specs[f"{name}, one step"]
        assert single.visibility == "full"
        assert single.network == specs[name].network
    for claim in (*CLAIMS, PARALLEL):
        assert any(claim.concerns(spec) for spec in specs.values())
        assert any(claim.concerns(spec) for spec in some(COVERING).values())


@pytest.mark.parametrize(
    "spec",
    [
        InnerLoop(MLP(), momentum=True, retention=True, normalize=True, chunk=3, visibility="token"),
        InnerLoop(Linear(), loss="squared", orthogonalize=NewtonSchulz(), steps=2, chunk=3),
        InnerLoop(MLP(depth=2), clip=True, chunk=5, visibility="chunk"),
    ],
)
def test_outputs_agree_but_for_rounding_in_both_precisions(spec):
    found = check(spec, TINY, seed=1)
    assert 0 < found.float64.largest < 1e-12
    assert 1e-9 < found.float32.largest < 1e-3
    assert found.float64.parallel is None
    assert found.operator.shape == (16, 16)


@pytest.mark.parametrize("field", ["v", "q"])
def test_operands_that_are_off_by_a_millionth_refute_the_claims(field, monkeypatch):
    def wrong(*args, **options):
        attention = linearize(*args, **options)
        x = getattr(attention, field)
        # token by token, as Newton-Schulz does not see a factor on all of them
        return replace(attention, **{field: x * (1 + 1e-6 * torch.arange(x.shape[1])[:, None, None])})

    monkeypatch.setattr(theorems, "linearize", wrong)
    checked = {name: [check(spec, TINY, 0)] for name, spec in some(COVERING).items()}
    verdicts = {verdict.claim.partition(":")[0]: verdict.holds for verdict in judge(checked)}
    # the parallel form has no part in it
    assert [name for name, holds in verdicts.items() if holds] == [PARALLEL.name]


def test_agreement_of_outputs_that_hold_nothing_written_is_no_evidence():
    fine = {name: [check(spec, TINY, 0)] for name, spec in some(COVERING).items()}
    assert all(verdict.holds for verdict in judge(fine))
    empty = {name: [replace(found, written=0.001) for found in own] for name, own in fine.items()}
    assert not any(verdict.holds for verdict in judge(empty))


def test_one_bad_draw_refutes_the_claims_that_concern_it():
    checked = {name: [check(spec, TINY, 0)] for name, spec in some(COVERING).items()}
    good = checked["titans"][0]
    checked["titans"].append(replace(good, float64=Errors(1e-16, 1e-9, None)))
    failed = {verdict.claim.partition(":")[0] for verdict in judge(checked) if not verdict.holds}
    assert failed == {claim.name for claim in CLAIMS if claim.concerns(good.spec)}
    assert "theorem 5.3" in failed


def test_the_report_holds_numbers_verdicts_and_pictures_in_two_formats(tiny, tmp_path):
    console = Console(record=True, width=200, force_terminal=False)
    results = reproduce(out=tmp_path, seeds=2, console=console)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["seeds"] == [0, 1]
    assert results["task"] is None
    assert results["config"]["tokens"] == TINY.tokens
    assert {"versions", "machine", "wall_seconds", "command"} <= set(results)
    assert [case["name"] for case in results["cases"]] == COVERING
    for case in results["cases"]:
        assert len(case["draws"]) == 2
        assert case["draws"][0] != case["draws"][1]
        assert (case["draws"][0]["float64"]["parallel"] is None) == bool(case["obstacles"])
        assert InnerLoop.from_dict(case["inner"]).network is not None
    page = (tmp_path / "index.html").read_text()
    assert all(claim.name in page for claim in CLAIMS)
    for name in ("operators", "errors"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "holds: theorem 5.1" in console.export_text()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("wrong", [{"scale": "paper"}, {"data": "book.txt"}, {"overrides": ["train.steps=1"]}, {"seeds": 0}])
def test_what_it_has_no_use_for_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        reproduce(out=tmp_path, **wrong)
