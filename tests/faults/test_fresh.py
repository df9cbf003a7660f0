"""`--fresh` and what is deleted: nothing but an earlier run of the task, and that only when the new one has a checkpoint."""

import shutil
from pathlib import Path

import pytest

from faults import small
from kvbind.experiments.training.runs import only_one
from kvbind.train import latest_checkpoint


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    small.run(folder, learning_rate=3e-3)
    return folder


@pytest.fixture
def old(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_is_replaced_by_one_of_another_configuration(old, whole):
    small.run(old, fresh=True)
    assert small.left(old) == whole
    assert {path.name for path in old.iterdir()} == {
        ".lock", "config.yaml", "data.json", "metrics.jsonl", "checkpoints", "model", "result.json",
    }  # fmt: skip


def test_the_old_run_is_there_until_the_new_one_has_a_checkpoint(old, whole):
    before = {path: x for path, x in contents(old).items() if path.name != ".lock"}
    with pytest.raises(KeyboardInterrupt):
        small.run(old, small.stop_at(2), fresh=True, checkpoint_every=5)
    aside = old / ".replaced"
    assert contents(aside) == before
    # once more: what has no checkpoint is no reason to lose what has
    with pytest.raises(KeyboardInterrupt):
        small.run(old, small.stop_at(3), fresh=True, checkpoint_every=5)
    assert contents(aside) == before
    with pytest.raises(KeyboardInterrupt):
        small.run(old, small.stop_at(7), checkpoint_every=5)
    assert not aside.exists()
    small.run(old)
    assert small.left(old) == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "cuda:7"}, "train.device must be a device of this machine"),
        ({"device": "gpuu"}, "train.device must be"),
        ({"gather": "bfloat16"}, "train.gather must be float32"),
    ],
)
def test_nothing_is_lost_to_a_command_that_cannot_run(old, fields, message):
    before = contents(old)
    with pytest.raises(ValueError, match=message):
        small.run(old, fresh=True, **fields)
    assert contents(old) == before


def test_nothing_is_lost_where_the_data_cannot_be_read(old, monkeypatch):
    def missing(task, config, training=True):
        raise FileNotFoundError("data.source: there is no noise")

    monkeypatch.setattr(small.Task, "__init__", missing)
    before = contents(old)
    with pytest.raises(FileNotFoundError):
        small.run(old, fresh=True)
    assert contents(old) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("# kvbind train language\n", "holds a run of task 'language'"),
        ("# kvbind train small-or-so\n", "holds a run of task 'small-or-so'"),
        ("", r"holds a config\.yaml that is of no run of kvbind"),
        ("# my thesis\n", r"holds a config\.yaml that is of no run of kvbind"),
        ("\x00\xff", r"holds a config\.yaml that is of no run of kvbind"),
    ],
)
def test_what_is_no_run_of_the_task_is_refused(tmp_path, head, message, fresh):
    (tmp_path / "chapter-1.tex").write_text("a thesis")
    (tmp_path / "config.yaml").write_bytes(head.encode("latin1") + b"seed: 3\n")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        small.run(tmp_path, fresh=fresh)
    assert contents(tmp_path) == before


def test_a_run_without_its_configuration_is_refused(old):
    (old / "config.yaml").unlink()
    before = contents(old)
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"holds a run without its config\.yaml"):
            small.run(old, fresh=fresh)
    assert contents(old) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_another_process_trains_in_is_refused(old, fresh):
    (old / "result.json").unlink()
    before = contents(old)
    fields = {} if fresh else {"learning_rate": 3e-3}
    with only_one(old), pytest.raises(ValueError, match="another process is training in"):
        small.run(old, fresh=fresh, **fields)
    assert contents(old) == before


def test_what_users_keep_in_a_runs_folder_stays(old, whole):
    for place in ("notes.md", "pictures/one.png", "checkpoints/step-notes/best.txt", "checkpoints/step-00000008.old/a"):
        (old / place).parent.mkdir(parents=True, exist_ok=True)
        (old / place).write_text("mine")
    small.run(old, fresh=True)
    assert small.left(old) == whole
    assert len([path for path in old.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]) == 4


@pytest.mark.parametrize("gone", ["model", "model/model.safetensors"])
def test_a_finished_runs_model_that_was_deleted_is_written_again(tmp_path, whole, gone):
    run = tmp_path / "run"
    first = small.run(run)
    if (run / gone).is_dir():
        shutil.rmtree(run / gone)
    else:
        (run / gone).unlink()
    again = small.run(run)
    assert again.reused
    assert again.result == first.result
    assert small.left(run) == whole
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    assert small.run(run).reused  # numbers that came without weights
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", [".lock", "config.yaml.partial", "metrics.jsonl.partial", "result.json.partial"])
def test_no_link_is_followed_where_a_run_writes(tmp_path, name):
    run, precious = tmp_path / "run", tmp_path / "precious.txt"
    precious.write_text("mine")
    run.mkdir()
    (run / name).symlink_to(precious)
    with pytest.raises(OSError, match=rf"{Path(name).name} is a symbolic link, which is not followed"):
        small.run(run)
    assert precious.read_text() == "mine"
    (run / name).unlink()
    small.run(run)
    assert latest_checkpoint(run)["done"]["step"] == 8


def test_links_in_the_place_of_what_a_run_writes_are_refused_before_it_and_replaced_by_it(tmp_path, whole):
    run, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (precious / "notes").write_text("mine")
    run.mkdir()
    for name, place in (("metrics.jsonl", precious / "notes"), ("model", precious)):
        (run / name).symlink_to(place)
        with pytest.raises(ValueError, match=f"holds a {name} that is of no run of kvbind"):
            small.run(run)
        (run / name).unlink()
    with pytest.raises(KeyboardInterrupt):
        small.run(run, small.stop_at(2))
    (run / "model").symlink_to(precious)
    small.run(run)
    assert small.left(run) == whole
    assert contents(precious) == {Path("notes"): b"mine"}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["model", "metrics.jsonl"])
def test_what_a_run_would_write_over_is_refused_where_no_run_has_written_it(tmp_path, name, fresh):
    mine = tmp_path / "run" / name
    mine.parent.mkdir()
    if name == "model":
        mine.mkdir()
        mine = mine / "mine.bin"
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"holds a {name} that is of no run of kvbind; name another folder"):
        small.run(tmp_path / "run", fresh=fresh)
    assert mine.read_text() == "mine"
