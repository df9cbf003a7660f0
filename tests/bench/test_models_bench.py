"""`kvbind bench models`: rows say what was measured of both, time is divided, and peers compute what they should."""

import importlib.util
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from kvbind.bench.app import app
from kvbind.bench.harness import timing
from kvbind.bench.harness.record import OUT_OF_TIME, rounded
from kvbind.bench.models import beside_peers, decoding, plans, softmax_peers
from kvbind.bench.tables.models import model_grids
from kvbind.bench.training import cases, cuda_graphs
from kvbind.models import PRESETS, LactConfig, peers, vittt

CPU = torch.device("cpu")
KEYS = {"name", "unit", "ours", "peer", "peer_name", "higher_is_better", "ratio", "mfu", "peak_bytes", "first_seconds"}


class Softmax(nn.Module):
    """What stands in for timm's transformer."""

    def __init__(self, name, size):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 16, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, 1000)

    def forward(self, images):
        x = self.embed(images).flatten(2).mean(2)
        return self.head(self.blocks[0](x))


@pytest.fixture
def quick(monkeypatch):
    """Without timm, without compilers; what was compiled."""
    compiled = []
    monkeypatch.setattr(plans, "vision_transformer", Softmax)
    monkeypatch.setattr(softmax_peers, "vision_transformer", Softmax)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    monkeypatch.setattr(cuda_graphs, "FIRST", 5)
    monkeypatch.setitem(vittt.SIZES, "vittt_tiny", {**vittt.SIZES["vittt_tiny"], "depth": 1})
    monkeypatch.setattr(decoding, "LEAST", 4)
    monkeypatch.setattr(decoding, "QUEUED", 2)
    return compiled


def documentation():
    path = Path(__file__).parents[2] / "docs" / "tables.py"
    spec = importlib.util.spec_from_file_location("documentation_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(path, *parts):
    return beside_peers.main(path, "cpu", parts, sizes="tiny", seconds=0.0)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LactConfig(**PRESETS["tiny"])
    return peers.llama(config).eval()


def test_training_rows_have_ours_the_peers_best_and_every_way(quick, tmp_path):
    path = tmp_path / "models.json"
    record = measure(path, "small", "views", "vision")
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {*(f"lact-tinier-rung{n}" for n in (0, 2, 6)), "vittt-t-training", "vittt-t-forward",
                         "lact-nvs-training"}  # fmt: skip
    assert record["complete"]
    assert json.loads(path.read_text()) == rounded(record)
    training = [way for ways in plans.WAYS.values() for way in ways.values()]
    for name, row in rows.items():
        assert set(row) >= KEYS
        assert row["higher_is_better"]
        assert row["ratio"] == row["ours"] / row["peer"] > 0
        assert row["mfu"] is None
        assert list(row["peer_ways"]) == training
        values = {way: x["value"] for way, x in row["peer_ways"].items() if "value" in x}
        assert row["peer"] == values[row["peer_by"]] == max(values.values())
        assert row["ours"] == max(row[f"graphs_{how}"] or 0 for how in ("on", "off"))
        if name == "vittt-t-forward":
            assert row["ours_ways"]["graphs"] == {"failed": "not on a GPU"}
        else:
            assert row["ours_ways"]["graphs"]["captured"] == row["peer_ways"]["graphs"]["captured"] == 1
    # three rungs have one peer
    assert len({row["peer"] for name, row in rows.items() if "tinier" in name}) == 1
    assert {"LlamaDecoderLayer", "LlamaForCausalLM", "LactNvsBlock", "FullAttentionNvs", "Softmax"} <= set(quick)
    (table,) = model_grids(record)
    assert [line[0] for line in table.rows] == list(rows)
    # a page draws it from the file
    page = documentation().fill("<!-- table: models.json models -->\n<!-- end -->", tmp_path)
    assert all(f"| {name} |" in page for name in rows)


def test_decoding_rows_say_how_long_the_slowest_token_takes_and_what_the_cache_holds(quick, tmp_path):
    record = measure(None, "decode")
    one, many = record["rows"]
    assert (one["name"], many["name"]) == ("decode-tiny-batch1-ms", "decode-tiny-batch2")
    assert (one["unit"], one["higher_is_better"]) == ("ms", False)
    assert one["ratio"] == one["peer"] / one["ours"]
    assert one["peer"] == min(x["value"] for x in one["peer_ways"].values())
    assert set(one["peer_ways"]) == {"static graphs", "dynamic"}
    assert set(one["ours_ways"]) == {"graphs", "eager"}
    for row, value in ((one, "p50_ms"), (many, "tokens_per_second")):
        for x in (*row["ours_ways"].values(), *row["peer_ways"].values(), *row["beside_ways"].values()):
            assert x["value"] == x[value]
            assert 0 < x["p50_ms"] <= x["p99_ms"] <= x["slowest_ms"]
            assert x["tokens"] == 8
            assert x["cache_bytes"] > 0
            assert not x["captured"]
    config = LactConfig(**PRESETS["tiny"])
    # keys and values of the prompt, of every layer, in float32
    held = 2 * 4 * config.num_hidden_layers * config.hidden_size
    assert one["peer_ways"]["dynamic"]["cache_bytes"] == held * (one["peer_ways"]["dynamic"]["prompt"] + 1 + 8 + 2)
    _, table = model_grids(record)
    assert [line[0] for line in table.rows].count("LaCT, rung 2, graphs") == 2


def test_the_command_goes_on_where_an_earlier_one_ran_out_of_time(quick, tmp_path, monkeypatch):
    path = tmp_path / "models.json"
    options = ["models", "--sizes", "tiny", "--seconds", "0", "--device", "cpu", "--out", str(path)]
    result = CliRunner().invoke(app, [*options, "--what", "views", "--budget", "0"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())["rows"]
    assert row["skipped"] == OUT_OF_TIME
    result = CliRunner().invoke(app, [*options, "--what", "views", "--resume"])
    assert result.exit_code == 0, result.output
    assert "full attention" in result.output
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    assert record["complete"]
    assert "skipped" not in row
    # what is answered stays, other parts are added
    monkeypatch.setattr(cuda_graphs, "speed", lambda *_: pytest.fail("was measured"))
    again = beside_peers.main(path, "cpu", "decode,views", sizes="tiny", seconds=0.0, resume=True)
    kept = next(x for x in again["rows"] if x["part"] == "views")
    # of numbers as the file has them
    assert kept.pop("ratio") == pytest.approx(row.pop("ratio"))
    assert kept == row
    assert len(again["rows"]) == 3


def test_an_unknown_part_or_size_is_named():
    with pytest.raises(ValueError, match=r"what must be of language, .*; got 'small,big'"):
        beside_peers.main(None, "cpu", "small,big")
    with pytest.raises(ValueError, match="sizes must be one of full, tiny; got 'huge'"):
        beside_peers.main(None, "cpu", "small", sizes="huge")


def test_full_rows_are_named_as_the_documentation_does():
    rows, jobs = plans.plan(plans.PARTS, plans.SIZES["full"], CPU, 0.0)
    assert [row.name for row in rows] == [
        "lact-760m-rung0", "lact-760m-rung2", "lact-760m-rung6", "lact-30m-rung0", "lact-30m-rung2", "lact-30m-rung6",
        "vittt-b-training", "vittt-b-forward", "lact-nvs-training", "decode-760m-batch1-ms", "decode-760m-batch64",
    ]  # fmt: skip
    for row in rows:
        sides = {job.side for job in jobs if row.name in job.rows and job.first}
        assert sides == {"ours", "peer"}, row.name
        assert (row.flops is None) == (row.part == "decode" or row.name.endswith("forward"))


def job(name, work, **fields):
    return plans.Measurement((name,), fields.pop("side", "ours"), ("only",), work, **fields)


def test_every_row_is_measured_before_any_has_a_second_way_and_time_is_shared_by_weight(monkeypatch):
    shares, order, clock = {}, [], [0.0]
    monkeypatch.setattr(beside_peers, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def work(name):
        def run(share):
            clock[0] += 10.0
            order.append(name)
            shares[name] = share
            return {"only": {"value": 1.0}}

        return run

    jobs = [job("slow", work("slow"), first=False, limit=5.0), job("more", work("more"), first=False),
            job("a", work("a")), job("b", work("b"), weight=3.0)]  # fmt: skip
    results = {}
    assert [x.rows[0] for x in beside_peers.done(jobs, 100.0, results)] == order == ["a", "b", "more", "slow"]
    assert shares == {"a": 25.0, "b": 90.0, "more": 80.0, "slow": 70.0}
    assert all(found["only"]["value"] == 1.0 for found in results.values())


def test_what_fails_or_takes_too_long_is_told_and_stops_nothing():
    def fails(share):
        raise RuntimeError("no room")

    def hangs(share):
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("swallowed")

    jobs = [job("fails", fails), job("hangs", hangs, limit=0.05), job("works", lambda share: {"only": {"value": 2.0}})]
    results = {}
    assert len(list(beside_peers.done(jobs, 100.0, results))) == 3
    assert results["fails", "ours"] == {"only": {"failed": "RuntimeError: no room"}}
    assert results["hangs", "ours"] == {"only": {"failed": "given up after 50 ms"}}
    assert results["works", "ours"] == {"only": {"value": 2.0}}
    # of what the whole budget cut short, nothing is known
    results = {}
    assert list(beside_peers.done([job("hangs", hangs)], 0.05, results))
    assert results["hangs", "ours"] == {"only": {"skipped": OUT_OF_TIME}}
    row = plans.ModelRow("fails", "views", "ms", "nothing", higher=False)
    found = beside_peers.row_of(row, {("fails", "ours"): {"only": {"failed": "no room"}}}, None)
    assert (found["ours"], found["ratio"], found["skipped"]) == (None, None, OUT_OF_TIME)


def test_utilization_is_that_of_the_better_way():
    row = plans.ModelRow("a", "small", "tokens/s", "b", flops=2.0)
    ways = {("a", "ours"): {"graphs": {"value": 30.0, "peak_bytes": 7}, "eager": {"value": 10.0, "peak_bytes": 5}},
            ("a", "peer"): {"eager": {"value": 15.0}}}  # fmt: skip
    found = beside_peers.row_of(row, ways, 100.0)
    assert (found["mfu"], found["ratio"], found["peak_bytes"]) == (0.6, 2.0, 7)
    assert (found["graphs_on"], found["graphs_off"], found["ours_by"]) == (30.0, 10.0, "graphs")


def test_work_is_ended_and_clocks_are_put_back():
    with pytest.raises(timing.DeadlineError), timing.at_most(0.05):
        time.sleep(30)
    with timing.at_most(600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@torch.no_grad()
def test_llama_decodes_the_tokens_that_it_would_give_without_a_cache(llama):
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, llama(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for room in (None, 16):
        cache, logits = decoding.read_llama(llama, ids, room)
        one_more, token = decoding.llama_tokens(llama, cache, logits, ids.shape[1], room)
        found = [token.clone()]
        for _ in range(3):
            one_more()
            found.append(token.clone())
        assert torch.equal(torch.cat(found, 1), expected[:, ids.shape[1] :])


def test_llama_is_causal_without_a_mask_and_of_the_same_size(llama):
    config = LactConfig(**PRESETS["tiny"])
    ids = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 5:] = 3
    with torch.no_grad():
        a, b = (llama(x, use_cache=False).logits for x in (ids, other))
    assert torch.allclose(a[:, :5], b[:, :5], atol=1e-5)
    assert not torch.allclose(a[:, 5:], b[:, 5:], atol=1e-3)
    assert len(llama.model.layers) == config.num_hidden_layers
    assert llama.model.layers[0].mlp.up_proj.weight.shape == (config.mlp_width, config.hidden_size)
    assert llama.get_input_embeddings().weight is llama.lm_head.weight


def test_steps_of_a_peer_learn_alike_with_and_without_graphs(quick):
    case = cases.language("a", "tiny", "rung6", 32, 1, 256)
    found = softmax_peers.training(
        softmax_peers.language(case, LactConfig(**PRESETS["tiny"])), CPU, 0.0, ways=("eager", "graphs")
    )
    again = softmax_peers.training(softmax_peers.language(case, LactConfig(**PRESETS["tiny"])), CPU, 0.0, ways=("graphs",))
    assert found["eager"]["loss"] == pytest.approx(again["graphs"]["loss"], rel=1e-4)
    assert found["graphs"]["loss"] < found["eager"]["loss"]
