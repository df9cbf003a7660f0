import json
import re
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbind.bench import output
from kvbind.bench.harness.record import OUT_OF_TIME, answered, growing, provenance, resumed

ROWS = st.lists(st.sampled_from([{"seconds": 1}, {"skipped": "out of memory"}, {"skipped": OUT_OF_TIME}]), max_size=6)


@given(ROWS, ROWS, st.integers(0, 12))
def test_a_record_grows_by_one_row_behind_those_kept(kept, rows, planned):
    records = list(growing({"config": 1}, planned, rows, kept))
    assert [record["rows"] for record in records] == [kept + rows[:n] for n in range(len(rows) + 1)]
    for record in records:
        assert list(record) == ["config", "planned", "complete", "rows"]
        assert record["complete"] == (answered(record) == planned)
    assert answered(records[-1]) == len(kept) + len(rows) - (kept + rows).count({"skipped": OUT_OF_TIME})


def test_a_row_is_handed_on_before_the_next_is_measured():
    begun = []
    records = growing({}, 3, (begun.append(n) or {"n": n} for n in count()))
    for expected in ([], [0], [0, 1]):
        assert [row["n"] for row in next(records)["rows"]] == begun == expected


def test_what_was_measured_before_an_interruption_is_on_disk(tmp_path, capsys):
    def rows():
        for n in range(3):
            yield {"n": n}
        raise KeyboardInterrupt

    path = tmp_path / "results" / "record.json"
    with pytest.raises(KeyboardInterrupt):
        output.write_growing(growing({}, 4, rows()), path)
    assert json.loads(path.read_text()) == {"planned": 4, "complete": False, "rows": [{"n": 0}, {"n": 1}, {"n": 2}]}
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "measuring: row 1 of 4\n")  # others at intervals


@pytest.mark.parametrize(("part", "name"), [("machine", "device"), ("machine", "threads"), ("versions", "torch")])
def test_rows_of_another_machine_or_of_other_versions_are_not_gone_on_with(part, name, tmp_path):
    about, path = provenance(torch.device("cpu")), tmp_path / "record.json"
    path.write_text(json.dumps(about | {"rows": [{"n": 1}]}))
    assert resumed(path, about, list) == [{"n": 1}]
    path.write_text(json.dumps(about | {"rows": [{"n": 1}], part: about[part] | {name: "another"}}))
    here = re.escape(repr(about[part][name]))
    said = f"of this machine and these versions, to go on with; it has {name} 'another'; here is {name} {here}"
    with pytest.raises(ValueError, match=f"record.json must be {said}$"):
        resumed(path, about, list)


@pytest.mark.parametrize("command", [["models", "--sizes", "tiny"], ["scaling", "--preset", "tiny", "--tokens", "128"]])
def test_a_file_that_is_no_record_is_not_gone_on_with(command, run, tmp_path):
    path, about = tmp_path / "it.json", provenance(torch.device("cpu"), ("triton", "timm"))
    options = ["bench", *command, "--device", "cpu", "--budget", "0", "--out", str(path), "--resume"]
    rows = [5, [5], [{}], [{"name": "x"}], [{"what": "x"}, 5], [{"name": "x", "ours_ways": {"eager": 5}}]]
    for held in ({}, [], 5, *({"rows": x} for x in rows), *(about | {"rows": x} for x in rows)):
        path.write_text(json.dumps(held))
        code, out, errors = run(*options)
        assert (code, out) == (2, ""), held
        assert "it.json must be what this command wrote, to go on with; it is not: " in errors
        assert errors.count("\n") == 1
        assert json.loads(path.read_text()) == held
