"""Data that change between two lives of a run: noticed, told by name, and mixed in on demand alone."""

import json
import os
import re
import shutil

import pytest
from image_files import class_folders, idx_folder

from kvbind.cli import main
from kvbind.tasks import contents, open_task_module
from kvbind.tasks.contents import Contents, accepted, changes, check_unchanged, record
from kvbind.train.config import read_config


def data(root):
    return Contents({path.name: path for path in root.iterdir()}, {"hub:words": "1"})


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for name in "abcd":
        (root / f"{name}.txt").write_text(name * 100)
    return root


def edit(path, time=None):
    """Change one byte, and neither the size nor, where one is given, the time."""
    path.write_text("z" + path.read_text()[1:])
    if time is not None:
        os.utime(path, ns=(time, time))


def test_every_kind_of_change_is_told_by_name(folder):
    before = json.loads(json.dumps(record(data(folder))))
    assert changes(before, data(folder)) == {}
    edit(folder / "a.txt", (folder / "a.txt").stat().st_mtime_ns)
    (folder / "b.txt").unlink()
    (folder / "c.txt").rename(folder / "e.txt")
    found = Contents(data(folder).files, {"hub:words": "2"})
    assert changes(before, found) == {
        "edited": ["a.txt", "hub:words"],
        "removed": ["b.txt", "c.txt"],
        "added": ["e.txt"],
    }


def test_files_that_were_copied_or_touched_are_the_same(folder, tmp_path):
    before = record(data(folder))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    assert changes(before, data(folder)) == changes(before, data(tmp_path / "copy")) == {}


def test_of_large_data_sizes_and_times_decide(folder, monkeypatch):
    monkeypatch.setattr(contents, "HASHED", 399)
    before = record(data(folder))
    assert all(known is None for *_, known in before["files"].values())
    assert changes(before, data(folder)) == {}
    edit(folder / "a.txt", time=1)
    edit(folder / "b.txt", (folder / "b.txt").stat().st_mtime_ns)  # which nothing but its content would tell
    (folder / "c.txt").write_text("c" * 101)
    assert changes(before, data(folder)) == {"edited": ["a.txt", "c.txt"]}


def test_a_run_that_has_not_begun_takes_what_there_is(folder, tmp_path):
    check_unchanged(tmp_path / "run", data(folder), [])
    edit(folder / "a.txt")
    check_unchanged(tmp_path / "run", data(folder), [])
    check_unchanged(tmp_path / "run", data(folder), [tmp_path / "step-00000001"])


def test_a_run_that_goes_on_refuses_other_data_until_they_are_accepted(folder, tmp_path):
    run, done = tmp_path / "run", [tmp_path / "step-00000003"]
    check_unchanged(run, data(folder), [])
    edit(folder / "a.txt")
    for i in range(9):
        (folder / f"new{i}.txt").write_text("new")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"\(edited a\.txt; added new0\.txt, .*new4\.txt and 4 more\).*--accept-changed"
        ):
            check_unchanged(run, data(folder), done)
    assert accepted(run) == []
    check_unchanged(run, data(folder), done, accept=True)
    (entry,) = json.loads((run / "data.json").read_text())["accepted"]
    assert (entry["behind"], entry["edited"], len(entry["added"])) == ("step-00000003", ["a.txt"], 9)
    check_unchanged(run, data(folder), done)
    (folder / "d.txt").unlink()
    check_unchanged(run, data(folder), [tmp_path / "step-00000007"], accept=True)
    assert accepted(run) == ["step-00000003", "step-00000007"]


def test_a_run_of_an_earlier_version_gets_a_record_and_a_broken_record_is_named(folder, tmp_path):
    run, done = tmp_path / "run", [tmp_path / "step-00000003"]
    check_unchanged(run, data(folder), done)
    assert (run / "data.json").is_file()
    for content in ("", "[]", '{"files": 1}', '{"files": {"a.txt": 1}, "others": {}}'):
        (run / "data.json").write_text(content)
        with pytest.raises(ValueError, match=r"data\.json must be the record of a run's data"):
            check_unchanged(run, data(folder), done)


def opened(task, preset, *edits, training=True):
    module = open_task_module(task)
    return module.Task(module.resolve(read_config(module.Config, module.PRESETS, preset, edits)), training)


def language(source, *edits):
    return opened("language", "tiny", f"data.source={source}", "data.length=16", "data.evaluation_samples=2", *edits)


def test_text_is_told_by_its_files_in_both_splits(folder, tmp_path):
    (tmp_path / "texts" / ".hidden.txt").write_text("no")
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("e" * 100)
    found = language(folder, f"data.held_out_source={elsewhere}").contents()
    assert set(found.files) == {*(f"{folder}/{name}.txt" for name in "abcd"), str(elsewhere)}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(40)))
    for stream in ("true", "false"):
        assert language(rows, f"data.stream={stream}").contents().files == {str(rows): rows}
    stdlib = language("stdlib").contents()
    assert "stdlib/argparse.py" in stdlib.files
    assert not changes(record(stdlib), stdlib)


def test_images_are_told_by_their_files_in_both_splits(tmp_path):
    pictures = class_folders(tmp_path / "x", {"train": {"blue": 1, "red": 2}, "val": {"red": 1}})
    small = ("augment.randaugment=0", "data.images=0", "data.size=8", "data.batch=1", "epochs=0", "warmup_epochs=0")
    found = opened("images", "imagenet", f"data.source={pictures}", *small).contents()
    names = ("train/blue/000.png", "train/red/000.png", "train/red/001.PNG", "val/red/000.png")
    assert found.files == {f"{pictures}/{name}": pictures / name for name in names}
    arrays = idx_folder(tmp_path / "idx")
    found = opened("images", "digits", f"data.source={arrays}", "data.batch=4").contents()
    assert {name.rpartition("/")[2] for name in found.files} == {path.name for path in arrays.iterdir()}
    assert len(found.files) == 4


def test_data_without_files_are_told_by_what_they_are():
    digits = opened("images", "digits").contents()
    assert not digits.files
    assert set(digits.others) == {"digits"}
    small = ("data.procedural.scenes=2", "data.evaluation_scenes=2")
    one = opened("views", "tiny", *small).contents()
    other = opened("views", "tiny", "data.procedural.scenes=3", "data.evaluation_scenes=2").contents()
    assert changes(record(one), one) == {}
    assert set(changes(record(one), other)["edited"]) == {"procedural, train", "procedural, held_out"}


def test_training_goes_on_with_changed_data_on_demand_alone(folder, tmp_path, capsys):
    for name in "efghijkl":
        (folder / f"{name}.txt").write_text(name * 200)
    run = tmp_path / "run"

    def train(*options):
        """What the command ends with, and its last words."""
        edits = (
            "data.length=16", "data.batch=2", "data.window=4", "data.evaluation_samples=1", "data.held_out=0.3",
            "train.steps=2", "train.checkpoint_every=1", "train.warmup=0", "train.device=cpu",
            "model.fields.num_hidden_layers=1", "model.fields.hidden_size=32", "model.fields.num_attn_heads=1",
            "model.fields.num_lact_heads=1",
        )  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(["train", "language", "--preset", "tiny", "--data", str(folder), "--out", str(run), *options, *edits])
        return end.value.code, capsys.readouterr().err

    assert train()[0] == 0
    # as if it had been killed behind its first step
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    edit(folder / "a.txt")
    code, said = train()
    assert code == 2
    assert re.search(r"holds a run on data that have changed since \(edited .*texts/a\.txt\)", said)
    assert train("--accept-changed-data")[0] == 0
    assert json.loads((run / "result.json").read_text())["data_changed_behind"] == ["step-00000001"]
    # what a finished run has come to is not what other data would
    assert train()[0] == 0
    (folder / "b.txt").unlink()
    code, said = train()
    assert (code, "removed" in said) == (2, True)
