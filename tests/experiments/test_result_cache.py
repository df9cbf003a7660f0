import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbind import systems
from kvbind.bench.harness.operands import Size
from kvbind.experiments.results import cache
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.results.files import write_json
from kvbind.experiments.subjects import throughput
from kvbind.experiments.subjects.throughput import InnerLoopSpeed
from kvbind.provenance import machine, versions
from kvbind.train.config import config_hash
from kvbind.train.files import read_json

CPU = torch.device("cpu")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["key", "steps", "c"]), x, max_size=3),
    max_leaves=4,
)
FOUND = st.floats(allow_nan=False) | st.lists(st.floats(allow_nan=False), max_size=2)


@given(st.lists(st.tuples(PLAIN, FOUND, st.booleans()), min_size=1, max_size=6))
def test_what_was_put_last_is_got_also_by_a_later_command(entries):
    with TemporaryDirectory() as folder:
        path, expected = Path(folder) / "kept.json", {}
        one = ResultCache(path, CPU)
        for depends, found, again in entries:
            one.put(found, depends, 1)
            expected[json.dumps(depends, sort_keys=True)] = found
            one = ResultCache(path, CPU) if again else one
            assert {text: one.get(json.loads(text), 1) for text in expected} == expected
            assert one.get(depends, 2) is None
            assert one.get(depends) is None


def test_what_another_machine_or_other_versions_found_does_not_count(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    ResultCache(path, CPU).put(1.0, "a")
    for name, value in (("machine", lambda device: {"device": "another"}), ("versions", dict)):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            assert ResultCache(path, CPU).get("a") is None
    assert ResultCache(path, CPU).get("a") == 1.0


def test_a_fresh_start_forgets_everything_and_replaces_the_file_when_there_is_something_new(tmp_path):
    path = tmp_path / "kept.json"
    ResultCache(path, CPU).put(1.0, "a")
    fresh = ResultCache(path, CPU, fresh=True)
    assert fresh.get("a") is None
    assert ResultCache(path, CPU).get("a") == 1.0
    fresh.put(2.0, "b")
    assert [ResultCache(path, CPU).get(name) for name in "ab"] == [None, 2.0]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_a_file_that_holds_something_else_is_named_and_not_in_the_way_of_a_fresh_start(content, tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"kept\.json must hold what was kept for an earlier report; .*--fresh"):
        ResultCache(path, CPU)
    ResultCache(path, CPU, fresh=True).put(1.0, "a")
    assert ResultCache(path, CPU).get("a") == 1.0


def test_several_things_that_older_files_hold_under_names_are_found(tmp_path):
    path = tmp_path / "steps.json"
    keys = {row: config_hash([row, 3, machine(CPU), versions()]) for row in ("rung0", "rung6")}
    path.write_text(json.dumps({row: {"key": key, "steps": {"losses": [row]}} for row, key in keys.items()}))
    again = ResultCache(path, CPU)
    assert again.get("rung6", 3) == {"losses": ["rung6"]}
    again.put({"losses": []}, "rung1", 3)
    assert [ResultCache(path, CPU).get(row, 3) for row in ("rung0", "rung1")] == [{"losses": ["rung0"]}, {"losses": []}]


def test_throughput_that_an_older_file_holds_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def tokens_per_second(cases, size, device):
        asked.append(len(cases))
        return [float(n) for n in range(len(cases))]

    monkeypatch.setattr(throughput, "tokens_per_second", tokens_per_second)
    inner, size, path = systems.ladder(systems.lact_llm(chunk=8))["rung2"].to_dict(), Size(1, 16, 1, 8), tmp_path / "t.json"
    configs = {"rung2": SimpleNamespace(model=SimpleNamespace(inner=inner))}
    speed, before = InnerLoopSpeed(lambda config: size, {}), {"rung2": {"recurrent": 7.0, "parallel": None}}
    key = config_hash([{"rung2": inner}, vars(size), machine(CPU), versions()])
    path.write_text(json.dumps({"key": key, "tokens_per_second": before}))
    assert speed.measure(configs, {}, CPU, path, False) == before
    assert not asked
    path.write_text(json.dumps({"key": "of another machine", "tokens_per_second": before}))
    for fresh in (False, False, True):
        assert speed.measure(configs, {}, CPU, path, fresh) == {"rung2": {"recurrent": 0.0, "parallel": 1.0}}
    assert asked == [2, 2]


def test_what_fits_a_line_and_what_holds_numbers_alone_is_a_line_and_is_read_as_it_was(tmp_path):
    curve = [[i, i / 7] for i in range(99)]
    data = {
        "curve": curve,
        "by": {"a": 1.5e-9, "b": [None, math.nan]},
        "texts": ["a\n b" * 9, "c" * 120],
        "empty": [],
        "x": 7,
    }
    write_json(tmp_path / "a.json", data)
    found = read_json(tmp_path / "a.json")
    assert math.isnan(found["by"]["b"].pop())
    data["by"]["b"].pop()
    assert found == data
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert lines[:3] == ["{", f' "curve": {json.dumps(curve)},', ' "by": {"a": 1.5e-09, "b": [null, "NaN"]},']
    first, second = map(json.dumps, data["texts"])
    assert lines[3:] == [' "texts": [', f"  {first},", f"  {second}", " ],", ' "empty": [],', ' "x": 7', "}"]
