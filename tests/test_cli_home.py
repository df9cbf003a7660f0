"""What a newcomer meets: own files, progress, an interruption, what to type next."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kvbind
from kvbind import cli
from kvbind.cli.arguments import run_and_rest
from kvbind.experiments.training.run_folders import open_run
from kvbind.screen import Screen
from kvbind.train import latest_checkpoint
from kvbind.train.config import to_plain

SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.window_size=8", "model.fields.intermediate_size=16", "model.inner.chunk=8", "data.length=32",
    "data.batch=2", "data.window=8", "data.evaluation_samples=2", "train.steps=3", "train.warmup=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def book(home):
    (home / "texts").mkdir()
    (home / "texts" / "book.txt").write_text("it was the best of times, it was the worst of times. " * 60)
    return ["train", "language", "--data", "texts", "--out", "mine", *SMALL]


def test_a_folder_of_one_file_trains_and_every_end_says_what_comes_next(run, book):
    code, out, errors = run(*book)
    assert (code, errors) == (0, "")
    lines = out.splitlines()
    assert "parameters, 3 steps, on cpu" in lines[0]
    assert lines[1] == "run folder: mine (the configuration is in its config.yaml)"
    assert lines[2].startswith("training: step 1 of 3  loss ")
    assert lines[-3:] == ["model: mine/model", 'next: kvbind generate mine --prompt "The "', "      kvbind eval mine"]
    assert "hidden_size" not in out
    assert "hidden_size: 16" in Path("mine/config.yaml").read_text()
    code, out, _ = run("eval", "mine")
    assert code == 0
    assert run("eval", "language", "mine") == (0, out, "")
    assert run("eval", "mine", "data.length=16", "--json", "x.json")[0] == 0
    assert json.loads(Path("x.json").read_text())["tokens"] == 2 * 15
    code, _, errors = run("eval", "images", "mine")
    assert code == 2
    assert "run must be one of task 'images'; 'mine' is one of 'language'" in errors

    # again: nothing is trained, and that is said; longer: it goes on, and that is said
    code, out, _ = run(*book)
    assert code == 0
    assert "finished earlier: nothing was trained" in out
    assert "training: step" not in out
    code, out, _ = run(*book, "train.steps=5")
    assert code == 0
    assert "training: goes on from the checkpoint at step 3 of 5" in out
    result = json.loads(Path("mine/result.json").read_text())
    assert (result["steps"], result["lengths"]) == (5, [[0, 3], [3, 5]])
    assert open_run(Path("mine"))[1].train.steps == 5
    code, _, errors = run(*book)
    assert code == 2
    assert "train.steps may be raised, not lowered" in errors
    assert run(*book, "train.steps=5", "train.learning_rate=1e-4")[0] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(run, book, monkeypatch, tmp_path, number):
    from kvbind.tasks.language import LanguageTask

    whole, calls = LanguageTask.loss, []

    def interrupted(self, model, batch):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return whole(self, model, batch)

    monkeypatch.setattr(LanguageTask, "loss", interrupted)
    code, _, errors = run(*book, "train.checkpoint_minutes=0", "train.steps=6")
    assert code == 130
    assert "mine was stopped after step 2 of 6, with a checkpoint; the same command goes on from there" in errors
    assert latest_checkpoint(tmp_path / "mine")["done"]["step"] == 2
    code, out, _ = run(*book, "train.checkpoint_minutes=0", "train.steps=6")
    assert code == 0
    assert "goes on from the checkpoint at step 2 of 6" in out


def test_a_run_that_is_made_longer_keeps_its_result_and_model_until_it_has_newer_ones(run, book, monkeypatch):
    from kvbind.tasks.language import LanguageTask

    assert run(*book)[0] == 0
    short = Path("mine/result.json").read_text()
    whole = LanguageTask.loss

    def interrupted(self, model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(self, model, batch)

    monkeypatch.setattr(LanguageTask, "loss", interrupted)
    assert run(*book, "train.steps=6")[0] == 130
    assert Path("mine/result.json").read_text() == short
    assert run("eval", "mine")[0] == 0
    monkeypatch.setattr(LanguageTask, "loss", whole)
    # the same command is not told that this was finished
    code, out, _ = run(*book, "train.steps=6")
    assert code == 0
    assert "goes on from the checkpoint at step 4 of 6" in out
    assert json.loads(Path("mine/result.json").read_text())["steps"] == 6
    Path("mine/result.json").write_text("[]")
    code, _, errors = run(*book, "train.steps=6")
    assert code == 2
    assert "result.json must be a run's result, with its steps; it holds []" in errors


def test_more_steps_without_a_folder_name_the_run_that_might_go_on(run, book):
    words = [word for word in book if word not in ("--out", "mine")]
    code, out, _ = run(*words)
    assert code == 0
    assert "a new run" not in out
    (first,) = Path("runs").iterdir()
    code, out, _ = run(*words, "train.steps=5")
    assert code == 0
    assert f"a new run: {first} is the same with 3 steps, and the same command with --out {first} goes on from it" in out
    assert len(list(Path("runs").iterdir())) == 2
    code, out, _ = run(*words, "train.steps=5", "--out", str(first))
    assert code == 0
    assert "goes on from the checkpoint at step 3 of 5" in out
    assert "a new run" not in run(*words, "train.steps=7", "seed=3")[1]

    Path("texts/book.txt").write_text("other words " * 300)
    code, out, _ = run(*words, "train.steps=5")
    assert code == 0
    assert "is the same on data that have changed since, and the same command with --out runs/language-tiny-" in out
    assert "--accept-changed-data goes on with it" in out


BROKEN = {
    "broken JSONL": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, must be a JSON object"),
    "JSONL in another encoding": (
        "a.jsonl",
        '{"text": "a"}\n{"text": "Käse"}\n'.encode("latin-1"),
        "a.jsonl, line 2, must be UTF-8; byte 12 is 0xe4 (data.encoding names another, such as data.encoding=cp1252)",
    ),
    "text in another encoding": (
        "a.txt",
        "Käse".encode("latin-1"),
        "a.txt must be text in utf-8; byte 2 is not (data.encoding names another, such as data.encoding=cp1252)",
    ),
    "text in UTF-16": ("a.txt", "Käse".encode("utf-16"), "(data.encoding=utf-16 reads it)"),
    "no text": ("a.pdf", b"x", "holds no text (.txt, .md, .rst, .py, .tex, .html, .jsonl, .parquet); its files are 1 .pdf"),
    "nothing": (None, b"", "there are no files in it"),
    "a short text": (
        "a.txt",
        b"it was the best of times",
        "data.length must be at most the held-out text, 4 tokens; got 32",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_data_that_cannot_be_read_end_in_one_line_before_anything_else(run, home, case):
    name, content, message = BROKEN[case]
    (home / "own").mkdir()
    if name:
        (home / "own" / name).write_bytes(content)
    code, out, errors = run("train", "language", "--data", "own", "--out", "mine", "--verbose", *SMALL)
    assert (code, out) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (home / "mine").exists()


PRESETS = {
    "empty": ("", "its.yaml must hold a mapping of configuration keys, such as 'train: {steps: 100}'; it is empty"),
    "a list": ("[1]", "its.yaml must hold a mapping of configuration keys, such as 'train: {steps: 100}'; it holds [1]"),
    "malformed": ("model:\n  size: [tiny\n", "its.yaml must be YAML: expected ',' or ']', but got '<stream end>' in line 3"),
    "another encoding": ("seed: 1\n# K\xe4se\n".encode("latin-1"), "its byte 11, in line 2, is none"),
    "an unknown key": ("seed: 1\ntrain:\n  step: 3\n", "its.yaml, line 3: no configuration key is named 'train.step'"),
    "a value of another kind": ("seed: 1\ntrain:\n  steps: [3]\n", "its.yaml, line 3: configuration key 'train.steps'"),
    "an unhashable kind": ("model:\n  inner: {network: {kind: []}}\n", "network's kind must be one of Linear"),
    "an unhashable system": ("model:\n  inner: {system: [a]}\n", "no system is named ['a']"),
}


@pytest.mark.parametrize("case", PRESETS)
def test_a_broken_configuration_ends_in_one_line_with_file_and_line(run, home, case):
    content, message = PRESETS[case]
    (home / "its.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, errors = run("train", "language", "--preset", "its.yaml", "--out", "mine")
    assert (code, out) == (2, "")
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_a_broken_inner_loop_in_a_file_names_the_file(run, home):
    (home / "its.yaml").write_text("{network: Linear, chunks: 3}")
    code, _, errors = run("explain", "its.yaml")
    assert code == 2
    assert "its.yaml: InnerLoop has no field 'chunks'" in errors


def test_explain_says_which_sizes_are_assumed(run):
    assert (
        "assumed: the sizes of a layer of the 760M language model, where --heads, --key-width, --tokens"
        in (run("explain", "lact_llm")[1])
    )
    assert "where --key-width would say others" in run("explain", "lact_llm", "--heads", "2", "--tokens", "64")[1]
    assert "assumed" not in run("explain", "lact_llm", "--heads", "2", "--tokens", "64", "--key-width", "8")[1]


def test_a_terminal_without_a_size_is_one_of_eighty_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    found = run("explain", "gla", "--tokens", "64")[1]
    monkeypatch.setenv("COLUMNS", "80")
    assert found == run("explain", "gla", "--tokens", "64")[1] != ""


def test_an_interrupt_before_anything_is_written_is_said(book, monkeypatch, capfd):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def wrapped(*_, **__):
        raise RuntimeError("a class") from KeyboardInterrupt()

    explained = ("kvbind.forms.explained.analysis.explain", ["explain", "gla"])
    for name, words in (("kvbind.train.config.read_config", book), explained):
        for ending in (interrupted, wrapped):
            monkeypatch.setattr(name, ending)
            with pytest.raises(SystemExit) as ended:
                cli.main(list(words))
            out, errors = capfd.readouterr()
            assert (ended.value.code, out, errors.split()) == (130, "", ["interrupted"])
    assert not Path("mine").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder in which none can be made")
def test_a_folder_that_cannot_be_made_is_named(run, book):
    code, _, errors = run(*book, "--out", "/proc/x/y")
    assert code == 2
    assert "the run's folder '/proc/x/y' cannot be made: " in errors


@pytest.mark.parametrize("columns", [50, 60, 64, 80, 110])
def test_tables_fit_narrow_terminals(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run("plan", "--preset", "760m", "--gpus", "8,16")
    assert code == 0
    prose = ("torchrun", "calibration", "note", "760m")
    assert max(len(line) for line in out.splitlines() if not line.startswith(prose)) <= columns


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_systems_are_a_line_each_below_their_family_that_a_terminal_folds(run, monkeypatch, columns):
    whole = run("systems")[1]
    assert "no token lr, erase, writes 2\n" in whole
    monkeypatch.setattr("kvbind.cli.output.console", lambda: Screen(width=columns, force_terminal=True, color_system=None))
    code, out, _ = run("systems")
    assert code == 0
    assert max(map(len, out.splitlines())) <= columns
    assert out.split() == whole.split()  # nothing is cut
    lines = [line for line in out.splitlines() if not line.startswith("  ")]  # without what goes on below itself
    families = [i for i, line in enumerate(lines) if not line]
    assert lines[families[0] + 1][:8] == "LaCT and"
    assert len(families) == 6  # of systems five, and what to type next
    assert sum(line.split()[0] in kvbind.systems.SYSTEMS for line in lines if line) == len(kvbind.systems.SYSTEMS)


def photos(root, grey=False):
    rng = np.random.default_rng(0)
    for shift, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.normal(100 + 60 * shift, 30, (70 + i, 90) if grey else (70 + i, 90, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.mark.parametrize("grey", [False, True])
def test_own_photos_are_looked_at(run, home, grey):
    photos(home / "own", grey)
    edits = ["model.fields.embed_dim=12", "model.fields.num_heads=2", "model.fields.depth=1", "epochs=1", "warmup_epochs=0"]
    code, out, errors = run(
        "train", "images", "--data", "own", "--out", "mine", *edits, "train.device=cpu", "train.warmup=1"
    )
    assert (code, errors) == (0, "")
    assert "images, preset photos: " in out
    assert "next: kvbind show mine --out attention.png" in out
    _, config = open_run(home / "mine")
    data = to_plain(config)["data"]
    assert (data["size"], data["channels"], data["batch"]) == (64, 1 if grey else 3, 10)
    assert config.model.fields["patch_size"] == 4
    assert data["mean"] == pytest.approx([130 / 255] * len(data["mean"]), abs=0.02)
    assert len(data["mean"]) == len(data["std"]) == data["channels"]
    assert all(0.05 < x < 0.3 for x in data["std"])
    assert run("show", "mine", "--out", "picture.png")[0] == 0
    assert run("show", "images", "mine", "--out", "picture.png")[0] == 0
    code, _, errors = run("show", "mine", "extra=1", "--out", "picture.png")
    assert code == 2
    assert "show takes a run alone" in errors


@pytest.mark.parametrize("name", ["x.txt", "x", "held/x.png", "file/x.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(run, home, monkeypatch, name):
    monkeypatch.setattr("kvbind.experiments.saved_models.attention_maps.open_run", lambda _: pytest.fail("opened the run"))
    (home / "file").write_text("")
    (home / "held").mkdir()
    # whoever runs this may be allowed everything
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "held")
    code, _, errors = run("show", "mine", "--out", name)
    assert code == 2
    message = {"held/x.png": f"'{home}/held' may not be written to", "file/x.png": f"'{home}/file' is no folder"}
    assert message.get(name, f"out must end on .png, .svg, .pdf; got '{name}'") in errors


def test_benchmarks_look_at_where_they_write_first_and_know_the_home(run, home, monkeypatch):
    code, _, errors = run("bench", "growth", "--out", str(home))
    assert code == 2
    assert f"--out must be a file to write; '{home}' is a folder" in errors
    monkeypatch.setenv("HOME", str(home / "me"))
    small = ["--tokens", "16", "--chunk", "8", "--width", "4", "--heads", "1", "--seconds", "0", "--device", "cpu"]
    assert run("bench", "forms", *small, "--out=~/found.json")[0] == 0
    assert json.loads((home / "me/found.json").read_text())["rows"]
    assert not (home / "~").exists()


def test_names_of_files_need_not_be_utf8_and_others_must(run, home):
    photos(home / "own")
    for name in ("own/cat/0.png", "texts/a.txt"):
        path = home / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("it was the best of times, it was the worst of times. " * 60)
        os.rename(path, os.fsencode(path.with_suffix("")) + b"\xe4" + path.suffix.encode())
    assert run("train", "images", "--data", "own", "--out", "mine", "train.steps=1", *SMALL_PHOTOS)[0] == 0
    assert run("eval", "mine")[0] == 0
    assert run("train", "language", "--data", "texts", "--out", "its", *SMALL)[0] == 0
    code, _, errors = run("train", "language", "--data", "texts", "--out", os.fsdecode(b"m\xe4"), *SMALL)
    assert code == 2
    assert "words on the command line must be UTF-8, in a locale that reads it; got 'm\\udce4'" in errors
    os.rename(home / "own/cat", os.fsencode(home) + b"/own/cat\xff")
    code, _, errors = run("train", "images", "--data", "own", "--out", "other", *SMALL_PHOTOS)
    assert code == 2
    assert r"a class must have a name that can be shown, in UTF-8; 'own' has 'cat\udcff'" in errors


@pytest.mark.parametrize("fault", ["'newt' has none", "there is 'cat' alone"])
def test_classes_without_pictures_or_without_another_are_refused(run, home, fault):
    photos(home / "own")
    if "newt" in fault:
        (home / "own" / "newt").mkdir()
    else:
        shutil.rmtree(home / "own" / "dog")
    code, _, errors = run("train", "images", "--data", "own", "--out", "mine", *SMALL_PHOTOS)
    assert code == 2
    assert "data.source must hold two class folders or more, each with pictures" in errors
    assert fault in errors


SMALL_PHOTOS = ["model.fields.embed_dim=12", "model.fields.num_heads=2", "model.fields.depth=1", "train.device=cpu"]


def test_steps_of_ones_own_replace_the_photos_presets_epochs(run, home):
    photos(home / "own")
    code, out, errors = run("train", "images", "--data", "own", "--out", "mine", "train.steps=4", *SMALL_PHOTOS)
    assert (code, errors) == (0, "")
    assert "images, preset photos: " in out
    assert "4 steps, on cpu" in out
    assert "top5" not in out  # of two classes
    assert open_run(home / "mine")[1].train.warmup == 0


@pytest.mark.parametrize("edits", [["train.steps=2"], ["epochs=2", "warmup_epochs=1"]])
def test_photos_that_came_or_went_are_what_a_run_that_goes_on_tells(run, home, edits):
    photos(home / "own")
    words = ["train", "images", "--data", "own", "--out", "mine", "data.batch=2", *edits, *SMALL_PHOTOS]
    assert run(*words)[0] == 0
    mean = open_run(home / "mine")[1].data.mean
    Path("mine/result.json").unlink()
    (home / "own" / "cat" / "5.png").unlink()
    (home / "own" / "cat" / "4.png").unlink()
    code, _, errors = run(*words)
    assert code == 2
    assert "mine holds a run on data that have changed since (removed own/cat/4.png, own/cat/5.png); put them" in errors
    if len(edits) == 1:
        assert run(*words, "--accept-changed-data")[0] == 0
        assert open_run(home / "mine")[1].data.mean == mean


def test_photos_that_become_thumbnails_are_said(run, home):
    photos(home / "own")
    edits = ["model.fields.embed_dim=12", "model.fields.num_heads=2", "model.fields.depth=1", "augment.crop=none"]
    words = ["--data", "own", "augment.shift=0", "data.batch=4", "train.steps=1", "train.warmup=1", "train.device=cpu"]
    code, _, errors = run("train", "images", "--preset", "digits", "--out", "mine", *edits, *words)
    assert code == 0
    assert "the first image of own, 90 x 70, is shrunk to 8 x 8 grey; --preset photos" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["mine"], (None, "mine", [])),
        (["language", "mine", "a=b"], ("language", "mine", ["a=b"])),
        (["mine", "a=b"], (None, "mine", ["a=b"])),
        (["language"], (None, "language", [])),
        (["language", "a=b"], (None, "language", ["a=b"])),
    ],
)
def test_the_task_may_stand_before_the_run(words, found):
    task, run, rest = run_and_rest(words)
    assert (task, str(run), rest) == found


def test_a_task_that_is_none_is_said():
    with pytest.raises(ValueError, match="did you mean 'language'"):
        run_and_rest(["langauge", "mine"])
