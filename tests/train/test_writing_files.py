import json
import math
import os

import pytest

from kvbind.train import files
from kvbind.train.metrics import Metrics, lacking, read_metrics, spans

HELD = {"a": math.nan, "b": [math.inf, -math.inf, 1.5, None], "c": (1, {"d": math.nan}), "e": "text"}


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_valid_json_and_come_back():
    text = files.to_json(HELD)
    assert json.loads(text, parse_constant=refuse)["b"] == ["Infinity", "-Infinity", 1.5, None]
    back = files.from_json(text)
    assert math.isnan(back["a"])
    assert back["b"] == HELD["b"]
    assert math.isnan(back["c"][1]["d"])
    assert math.isinf(files.from_json('{"old": Infinity}')["old"])  # as files were written before


def test_metrics_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(1, loss=1.0, perplexity=math.inf, error=math.nan)
    metrics.close()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert row["perplexity"] == math.inf
    assert math.isnan(row["error"])


def test_a_file_that_is_no_json_is_named(tmp_path):
    for text in ("{", "[" * 100_000, ""):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json must be (JSON|at most)"):
            files.read_json(tmp_path / "x.json")


def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    files.write_text(path, "old")
    with pytest.raises(TypeError), files.atomic_write(path) as file:
        file.write("no bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    files.write_folder(path, lambda partial: (partial / "a").write_text("old"))

    def fail(partial):
        (partial / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_folder(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (path / "a").read_text() == "old"
    files.write_folder(path, lambda partial: (partial / "b").write_text("new"))
    assert [p.name for p in path.iterdir()] == ["b"]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="a system without O_NOFOLLOW")
def test_links_are_not_followed_by_any_kind_of_write(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for partial in ("a.txt.partial", ".a.png.partial.png"):
        (tmp_path / partial).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        files.write_text(tmp_path / "a.txt", "x")
    with pytest.raises(OSError, match="symbolic link"):
        files.write_with(tmp_path / "a.png", lambda path: path.write_text("x"))
    assert precious.read_text() == "mine"


def test_steps_that_rows_lack_are_told_in_spans():
    rows = [{"step": step, "loss": None} for step in (1, 2, 5, 9)] + [{"step": 3, "held_out/error": 1.0}]
    assert lacking(rows, 10) == [3, 4, 6, 7, 8, 10]
    assert spans(lacking(rows, 10)) == "3 to 4, 6 to 8, 10"
