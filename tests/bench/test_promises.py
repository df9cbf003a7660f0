import json

import pytest
import torch
from typer.testing import CliRunner

from kvbind.bench.app import app
from kvbind.bench.verify import promises
from kvbind.bench.verify.small_models import SMALL

CPU = torch.device("cpu")
CASES = {promise.name: promise for promise in promises.promises()}


@pytest.mark.parametrize(
    "name",
    [
        "language model, rung 2: compiled blocks with a cache",
        "generate, greedy, float32",
        "generate, beams, bfloat16",
        "generate from a cache",
        "Trainer, bf16",
        "gradient checkpointing, reentrant",
        "activation_checkpointing=selective",
        "view synthesis: bfloat16 autocast",
        "saved and loaded, float32",
    ],
)
def test_promises_of_models_are_kept_on_the_cpu(name):
    row = promises.tried(CASES[name], SMALL, CPU)
    assert row["problems"] == []
    assert row["passed"]
    assert row["found"]


def test_a_broken_promise_is_found():
    def wrong(scale, device):
        return {"loss": 1.0, "gradients": float("nan")}

    row = promises.tried(promises.Promise("x", wrong, {"loss": 1e-4, "gradients": 1e-2}), SMALL, CPU)
    assert row["problems"] == ["loss: 1.0e+00 > 1.0e-04", "gradients: nan > 1.0e-02"]
    assert not row["passed"]


def test_a_package_that_is_missing_and_an_error_are_problems():
    def fails(scale, device):
        raise RuntimeError("no such device")

    for promise, said in (
        (promises.Promise("x", fails, {}), "RuntimeError: no such device"),
        (promises.Promise("x", fails, {}, needs="no_such_package"), "no_such_package is not installed"),
    ):
        row = promises.tried(promise, SMALL, CPU)
        assert (row["problems"], row["passed"]) == ([said], False)


def test_every_case_has_a_name_of_its_own_and_a_bound():
    listed = promises.promises()
    assert len({promise.name for promise in listed}) == len(listed)
    assert all(promise.bounds for promise in listed)


def test_the_command_writes_a_record_and_fails_with_a_case(tmp_path, monkeypatch):
    one = CASES["gradient checkpointing, not reentrant"]
    monkeypatch.setattr(promises, "promises", lambda: [one])
    out = tmp_path / "models.json"
    command = ["verify", "--what", "models", "--small", "--device", "cpu", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["complete"]
    assert [row["case"] for row in record["rows"]] == [one.name]
    monkeypatch.setattr(promises, "promises", lambda: [promises.Promise(one.name, one.check, {"loss": -1.0})])
    assert CliRunner().invoke(app, command).exit_code == 1
    assert CliRunner().invoke(app, [*command, "--only", "no such case"]).exit_code != 0


def test_promises_in_several_processes_give_the_same_rows_in_order():
    one, two = (list(promises.verified_promises(CPU, small=True, only="saved", workers=workers))[-1] for workers in (1, 2))
    assert [row["case"] for row in two["rows"]] == [row["case"] for row in one["rows"]]
    assert two["complete"]
    assert all(row["passed"] for row in two["rows"])
    late = list(promises.verified_promises(CPU, small=True, only="saved", workers=2, budget=0.0))[-1]
    assert not late["complete"]
    assert {row["skipped"] for row in late["rows"]} == {"no time left"}
