"""Checkpoints that are not what was written: named, passed over for the next older one, and never a loss without a word."""

import json
import logging
import os
import pickle
import random
import shutil
import zipfile
from contextlib import closing

import pytest
import torch

from faults import small
from kvbind.train import latest_checkpoint
from kvbind.train.checkpoint import Saver, newest_whole
from kvbind.train.metrics import read_metrics
from kvbind.train.storage import facts_of, fault, mark

FLIPS = int(os.environ.get("KVBIND_FLIPS", "40"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with checkpoints of steps 4 and 5, interrupted in step 6."""
    return small.stopped(tmp_path_factory.mktemp("begun") / "run", 6)


@pytest.fixture
def run(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def newest(folder):
    return max((folder / "checkpoints").glob("step-*[0-9]"))


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed(run):
    draw, checkpoint = random.Random(0), newest(run)
    assert fault(checkpoint) is None
    files = sorted(path for path in checkpoint.iterdir() if path.name != "complete")
    assert {path.name for path in files} == {"index.json", "plain.pt", "shard-00000.bin"}
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert fault(checkpoint) == f"{path.name} has another checksum"
        flip(path, bit)
    assert fault(checkpoint) is None


def test_a_marker_with_a_flipped_bit_is_broken_or_says_the_same(run):
    checkpoint, marker = newest(run), newest(run) / "complete"
    said = json.loads(marker.read_text())
    for bit in range(0, 8 * marker.stat().st_size, 29):
        flip(marker, bit)
        assert fault(checkpoint) is not None or json.loads(marker.read_text()) == said
        flip(marker, bit)


BREAKS = {
    "a flipped bit": lambda path: flip(path / "shard-00000.bin", 800),
    "a shard cut short": lambda path: os.truncate(path / "shard-00000.bin", 100),
    "no shard": lambda path: (path / "shard-00000.bin").unlink(),
    "no marker": lambda path: (path / "complete").unlink(),
    "no index": lambda path: (path / "index.json").unlink(),
    "an index that is none": lambda path: (path / "index.json").write_text("{garbage"),
    "a marker that is none": lambda path: (path / "complete").write_text("[" * 100_000),
    "a marker of something else": lambda path: (path / "complete").write_text('{"files": {"../../config.yaml": {}}}'),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(run, whole, broken, caplog):
    checkpoint = newest(run)
    BREAKS[broken](checkpoint)
    with caplog.at_level(logging.WARNING, "kvbind.train"):
        small.run(run)
    assert f"checkpoint {checkpoint} is broken: " in caplog.text
    assert "step-00000004 is the newest whole one: 1 steps are lost" in caplog.text
    assert small.left(run) == whole
    # what was broken is kept for whoever wants to look, and is no checkpoint any more
    assert {path.name for path in checkpoint.parent.iterdir()} == {"step-00000005.broken", "step-00000007", "step-00000008"}


def test_a_run_without_one_whole_checkpoint_is_refused_and_stays_as_it_is(run):
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / "plain.pt", 3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(step-00000005: plain\.pt has 3 bytes .*--fresh"):
        small.run(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_users_folders_among_checkpoints_stay(run, whole):
    for name in ("step-notes", "step-1", "step-00000001.old", ".partial", "mine"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "notes.txt").write_text("a thesis")
    (run / "checkpoints" / "step-99999999").symlink_to(run / "checkpoints" / "mine")
    small.run(run)
    assert small.left(run) == whole
    kept = [path for path in (run / "checkpoints").iterdir() if (path / "notes.txt").exists()]
    assert len(kept) == 6


def test_checkpoints_that_are_half_written_are_cleared_away(run, whole):
    (run / "checkpoints" / ".step-00000006.partial").mkdir()
    (run / "checkpoints" / ".step-00000006.partial" / "shard-00000.bin").write_bytes(b"x")
    small.run(run)
    assert small.left(run) == whole
    assert not list((run / "checkpoints").glob(".step-*"))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_of_a_checkpoint_runs_code(run, tmp_path):
    ran, checkpoint = tmp_path / "ran", newest(run)
    hostile = pickle.dumps(Hostile(ran))
    with zipfile.ZipFile(tmp_path / "plain.pt", "w") as archive:
        archive.writestr("plain/data.pkl", hostile)
        archive.writestr("plain/version", "3\n")
    (checkpoint / ".metadata").write_bytes(hostile)  # as PyTorch's own format has it
    for name, content in (
        ("plain.pt", (tmp_path / "plain.pt").read_bytes()), ("plain.pt", hostile), ("index.json", hostile),
        ("shard-00000.bin", hostile),
    ):  # fmt: skip
        good = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        remark(checkpoint)  # as whoever wrote the file would have
        with pytest.raises(Exception, match=r"."):
            latest_checkpoint(run)
        (checkpoint / name).write_bytes(good)
    assert not ran.exists()
    pickle.loads(hostile)
    assert ran.exists()


def remark(checkpoint):
    mark(checkpoint, {name: facts_of(checkpoint / name) for name in ("plain.pt", "index.json", "shard-00000.bin")})


@pytest.mark.parametrize("edit", [
    lambda index, name: index["tensors"][name]["pieces"][0].__setitem__(2, "../plain.pt"),
    lambda index, name: index["tensors"][name]["pieces"][0].__setitem__(3, 1 << 40),
    lambda index, name: index["tensors"][name]["pieces"][0].__setitem__(1, [1 << 40]),
    lambda index, name: index["tensors"][name].__setitem__("dtype", "load"),
    lambda index, name: index["tensors"].__setitem__(name, None),
    lambda index, name: index.__setitem__("tensors", None),
])  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(run, edit):
    checkpoint = newest(run)
    index = json.loads((checkpoint / "index.json").read_text())
    edit(index, next(iter(index["tensors"])))
    (checkpoint / "index.json").write_text(json.dumps(index))
    remark(checkpoint)
    with pytest.raises(ValueError, match=r"index\.json is no index of a checkpoint"):
        latest_checkpoint(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64])
def test_tensors_of_every_kind_come_back_as_they_were(tmp_path, dtype):
    drawn = (torch.randn(3, 4) * 9).to(dtype)
    tensors = {"a": drawn, "turned": drawn.T, "scalar": drawn[0, 0], "none": torch.empty(0, 2, dtype=dtype)}
    with closing(Saver(tmp_path, 1)) as saver:
        saver.save(3, {"model": tensors}, {"done": {"step": 3}})
    found = latest_checkpoint(tmp_path)["model"]
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], x)
    assert newest_whole(tmp_path)[1] == {}


@pytest.mark.parametrize("garbage", [b"{garbage", b"\xff\xfe", b"5", b"null", b'{"step": "x"}', b"[" * 100_000, b""])
def test_a_broken_line_of_metrics_is_left_out_alone_and_reported(run, garbage, caplog):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    (place,) = [i for i, line in enumerate(lines) if json.loads(line)["step"] == 3 and b'"loss"' in line]
    rows = read_metrics(run)
    path.write_bytes(b"\n".join([*lines[:place], garbage, *lines[place + 1 :]]) + b"\n")
    with caplog.at_level(logging.WARNING, "kvbind.train"):
        assert read_metrics(run) == rows[:place] + rows[place + 1 :]
        assert f"left out what cannot be read, line {place + 1}" in caplog.text
        done = small.run(run)
    assert "lacks steps 3 of the 5 before the checkpoint" in caplog.text
    assert [i for i, loss in enumerate(done.losses(), start=1) if loss is None] == [3]
    assert len(done.losses()) == 8


def test_metrics_that_are_gone_are_reported(run, caplog):
    (run / "metrics.jsonl").unlink()
    done = small.run(run)
    assert "lacks steps 1 to 5 of the 5 before the checkpoint" in caplog.text
    assert [loss is None for loss in done.losses()] == [True] * 5 + [False] * 3


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run):
    path = newest(run) / "plain.pt"
    path.unlink()
    os.mkfifo(path)
    assert fault(newest(run)) == "plain.pt is no file"
    assert small.run(run).result["steps"] == 8
