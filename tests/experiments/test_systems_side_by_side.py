"""Systems side by side: models of one size, and the whole command in small."""

import json
import math

import pytest
import torch
from transformers import DynamicCache

from kvbind.bench.models import decoding
from kvbind.experiments.report.page import find_parts
from kvbind.experiments.studies import systems
from kvbind.experiments.studies.state_bytes import state_bytes
from kvbind.experiments.studies.systems import MIXERS, fitting, parameters
from kvbind.experiments.training.plans import configuration
from kvbind.inner.systems import in_place_ttt
from kvbind.models import LactConfig
from kvbind.models.lact.cache import CACHE
from kvbind.models.peers import in_place_llama, llama
from kvbind.tasks import language

SMALL = [
    "model.fields.hidden_size=32", "model.fields.num_attn_heads=2", "model.fields.num_lact_heads=2",
    "model.fields.window_size=8", "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=4",
    "train.steps=2", "train.warmup=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("it was the best of times, it was the worst of times. " * 60)
    return str(path)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(systems, "TOKENS", {"smoke": 2})
    monkeypatch.setattr(decoding, "QUEUED", 2)


def test_all_models_have_the_parameters_of_the_first():
    target = parameters(configuration("language", "smoke"))
    for name, edits in MIXERS.items():
        width = fitting("smoke", list(edits), target)
        own = configuration("language", "smoke", 0, [*edits, f"model.fields.intermediate_size={width}"])
        assert parameters(own) == pytest.approx(target, rel=0.03), name


def test_the_first_is_the_full_system_and_rung_2_its_rung():
    full = configuration("language", "smoke")
    own = language.resolve(configuration("language", "smoke", 0, MIXERS["rung2"]))
    assert own.model.inner == language.rows(full)["rung2"]
    assert not MIXERS["rung0"]
    layers = {name: language.resolve(configuration("language", "smoke", 0, edits)).model for name, edits in MIXERS.items()}
    alone = {name for name, model in layers.items() if "projections" in model.fields}
    assert alone == {"linear_attention", "gla", "gated_delta_net", "kda", "ttt_linear", "titans"}
    full_attention = language.baselines(full)["softmax"]
    assert {name: layers["softmax"].fields[name] for name in ("fast_weights", "window_size")} == {
        name: full_attention[name] for name in ("fast_weights", "window_size")
    }


def test_state_bytes_of_attention_are_its_keys_and_values():
    config = LactConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attn_heads=2, num_lact_heads=1,
                        intermediate_size=24, inner=in_place_ttt(chunk=4))  # fmt: skip
    torch.manual_seed(0)
    plain, fast = llama(config).eval(), in_place_llama(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        cache = getattr(plain(ids, use_cache=True), CACHE)
        both = getattr(fast(ids, use_cache=True), CACHE)
    keys = 4 * 2 * 2 * 10 * 16
    assert isinstance(cache, DynamicCache)
    assert state_bytes(cache) == keys
    # one layer of the two has a fast MLP: what was written, and two tokens of an unfinished chunk
    assert fast.config.fast_layers == (0,)
    assert state_bytes(both) == keys + 4 * (24 * 16 + 2 * (24 + 16))


@pytest.mark.usefixtures("quick")
def test_the_command_trains_times_and_compares_and_goes_on(book, tmp_path, monkeypatch):
    options = {
        "out": tmp_path, "data": book, "overrides": SMALL, "workers": 1, "seeds": 1,
        "rows": ["rung2", "gla", "in_place_ttt", "softmax"],
    }  # fmt: skip
    results = systems.reproduce(**options)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == options["rows"]
    for row in rows.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["training_tokens_per_second"] > 0
        assert row["decoding"]["milliseconds"] > 0
    assert rows["softmax"]["decoding"]["bytes"] == 4 * 2 * 2 * 32 * 32
    # 32 more tokens would make it no larger
    assert rows["gla"]["decoding"]["bytes"] < rows["softmax"]["decoding"]["bytes"]
    assert len(results["tables"][0]["rows"]) == 4
    assert (tmp_path / "positions.png").is_file()
    (part,) = find_parts([tmp_path])[0]
    assert [len(chart["series"]) for charts in part.charts.values() for chart in charts] == [4]

    def refuse(*args, **named):
        raise AssertionError("done again")

    monkeypatch.setattr("kvbind.experiments.training.runs.train", refuse)
    monkeypatch.setattr(systems, "load_model", refuse)
    again = systems.reproduce(**options)
    assert again["rows"] == json.loads(json.dumps(results["rows"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "views"}, "task must be one of 'language'"),
        ({"scale": "paper"}, "scale must be one of 'smoke', 'small', 'large'"),
        ({"rows": ["softmx"]}, "rows must be one of 'rung0', .*got 'softmx'"),
        ({"overrides": ["model.mixer=in_place"]}, "overrides must leave model.mixer to the comparison"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        systems.reproduce(**{"out": tmp_path, "workers": 1} | options)
