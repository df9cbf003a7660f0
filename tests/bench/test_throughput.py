import pytest
import torch

from kvbind import NoParallelFormError, systems
from kvbind.bench.harness import timing
from kvbind.bench.harness.operands import Size
from kvbind.bench.kernels.forms import tokens_per_second

SHAPE = Size(batch=2, tokens=32, heads=2, width=8)
CPU = torch.device("cpu")


def test_every_rung_is_timed_with_its_own_gates_and_rates():
    cases = [(inner, "recurrent") for inner in systems.ladder(systems.lact_llm(chunk=8)).values()]
    rates = tokens_per_second(cases, SHAPE, CPU, rounds=1)
    assert len(rates) == 7
    assert min(rates) > 0


def test_a_system_with_retention_is_timed_too():
    assert tokens_per_second([(systems.titans(chunk=8), "recurrent")], SHAPE, CPU, rounds=1)[0] > 0


def test_the_asked_form_is_the_one_that_runs():
    with pytest.raises(NoParallelFormError):
        tokens_per_second([(systems.lact_llm(chunk=8), "parallel")], SHAPE, CPU, rounds=1)


def test_throughput_is_tokens_over_the_median_time_of_each_case(monkeypatch):
    # the start, then three rounds of two cases: passes of 1, 2 and 100 seconds, and of 4 seconds each
    clock = iter([0.0, 0.0, 1.0, 1.0, 5.0, 5.0, 7.0, 7.0, 11.0, 11.0, 111.0, 111.0, 115.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    cases = [(systems.linear_attention(chunk=8), "recurrent"), (systems.linear_attention(chunk=8), "parallel")]
    assert tokens_per_second(cases, SHAPE, CPU, rounds=3) == pytest.approx([2 * 32 / 2.0, 2 * 32 / 4.0])
