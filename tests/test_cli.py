import ast
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

import kvbind
import kvbind.bench.commands
import kvbind.cli.commands
import kvbind.models.lact_nvs
from kvbind import cli, screen
from kvbind.cli import main
from kvbind.cli.commands.reproduce import sources
from kvbind.cli.output import continuable
from kvbind.experiments import EXPERIMENTS
from kvbind.experiments.subjects import SUBJECTS
from kvbind.tasks import TASKS, open_task_module
from released import released, weights_of

SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.window_size=8", "model.fields.intermediate_size=16", "model.inner.chunk=8", "data.length=32",
    "data.batch=2", "data.window=8", "data.evaluation_samples=2", "train.steps=3", "train.warmup=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("it was the best of times, it was the worst of times. " * 60)
    return path


@pytest.fixture
def trained(run, book, tmp_path):
    code, _, errors = run("train", "language", "--data", str(book), "--out", str(tmp_path / "mine"), *SMALL)
    assert (code, errors) == (0, "")
    return tmp_path / "mine"


def test_the_version_is_shown(run):
    assert run("--version") == (0, f"kvbind {kvbind.__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["systems"],
        ["explain"],
        ["reproduce"],
        ["train"],
        ["eval"],
        ["generate"],
        ["convert"],
        ["in-place"],
        ["probe"],
        ["simplify"],
    ],
)
def test_every_command_explains_itself(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert " ".join(["Usage: kvbind", *command]) in out
    assert len(out.splitlines()) > 8


@pytest.mark.parametrize("command", ["reproduce", "train", "eval"])
def test_help_names_every_task(run, command):
    code, out, errors = run(command, "--help")
    assert code == 0, errors
    # tests of other files may have added a task of their own
    assert [task for task, module in TASKS.items() if module.startswith("kvbind.") and task not in out] == []


def test_help_names_the_shipped_configurations_of_every_task(run):
    _, out, _ = run("train", "--help")
    text = " ".join(out.replace("│", "").split())
    for task in TASKS:
        assert f"{task.capitalize()}: {', '.join(open_task_module(task).PRESETS)}." in text


def test_help_imports_neither_transformers_nor_matplotlib():
    code = (
        "import sys, kvbind.cli\nsys.exit(any(name in sys.modules for name in ('transformers', 'matplotlib', 'omegaconf')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "kvbind", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kvbind {kvbind.__version__}\n"


def test_systems_are_listed_with_whether_they_are_parallel(run):
    code, out, _ = run("systems")
    assert code == 0
    answers = {line.split()[0]: line.split()[1] for line in out.splitlines() if line and not line.startswith(" ")}
    assert {name: answers[name] for name in ("lact_llm", "linear_attention")} == {
        "lact_llm": "no",
        "linear_attention": "yes",
    }
    assert set(kvbind.systems.SYSTEMS) <= set(answers)


def test_a_system_is_explained_at_the_asked_shapes(run):
    code, out, _ = run("explain", "lact_llm", "--heads", "2", "--key-width", "64", "--tokens", "4096", "--chunk", "128")
    assert code == 0
    shapes = kvbind.forms.explained.analysis.Shapes(2, 64, 64, 64, 4096)
    assert out.strip() == str(kvbind.explain(kvbind.systems.lact_llm(128), shapes))


@pytest.mark.parametrize("rung", [0, 2, 6])
def test_a_rung_of_the_ladder_is_explained(run, rung):
    _, out, _ = run("explain", "lact_llm", "--rung", str(rung))
    inner = kvbind.systems.ladder(kvbind.systems.lact_llm())[f"rung{rung}"]
    assert out.strip().startswith(str(kvbind.explain(inner)))


def test_two_inner_loops_are_compared_field_by_field(run, tmp_path):
    mine = kvbind.systems.titans().replace(network=kvbind.MLP("tanh"), momentum=False)
    mine.to_yaml(tmp_path / "mine.yaml")
    code, out, _ = run("compare", "titans", str(tmp_path / "mine.yaml"))
    assert code == 0
    rows = [line.split() for line in out.strip().splitlines()]
    assert [row[0] for row in rows[1:] if len(row) == 3] == ["network.activation", "momentum"]
    assert ["momentum", "True", "False"] in rows
    assert "are the same inner loop" in run("compare", "titans", "titans")[1]
    assert run("compare", "gdn2", "kda", "erase=true", "token_lr=false")[1] == (
        "gdn2 and kda erase=true token_lr=false are the same inner loop\n"
    )
    code, out, _ = run("compare", "simple_gla", "retnet")
    assert out.startswith("simple_gla and retnet are the same inner loop, in layers that make its operands in other ways:\n")
    assert ["rotary", "'none'", "'sequence'"] in [line.split() for line in out.splitlines()]
    code, out, _ = run("compare", "lact_llm", "momentum=false", "chunk=64")
    assert (code, [line.split()[0] for line in out.splitlines()[1:]]) == (0, ["momentum", "chunk"])
    assert "did you mean 'titans'" in " ".join(run("compare", "titan", "titans")[2].split())


def test_an_inner_loop_in_a_file_is_explained(run, tmp_path):
    inner = kvbind.systems.titans(chunk=32)
    inner.to_yaml(tmp_path / "mine.yaml")
    _, out, _ = run("explain", str(tmp_path / "mine.yaml"))
    assert out.strip().startswith(str(kvbind.explain(inner)))


def test_an_edited_inner_loop_is_explained(run):
    _, out, _ = run("explain", "titans", "momentum=false", "refresh=1")
    assert out.startswith(str(kvbind.explain(kvbind.systems.titans().replace(momentum=False, refresh=1))))
    # what is not there is not counted
    assert "orthogonalization" not in run("explain", "kda")[1]
    assert "MFLOP per token, of which orthogonalization" in run("explain", "lact_llm")[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train"], "error: missing argument 'task' (kvbind train --help says what it takes)"),
        (["train", "language", "--owt", "x"], "error: no such option: --owt"),
        (["explain", "lact_llm", "--rung", "9"], "error: invalid value for '--rung': "),
        (["bench", "form"], "error: no such command 'form'. Did you mean 'forms'? (kvbind bench --help says what it takes)"),
        (["in-place", "a", "b", "--layers", "x"], "error: invalid value for --layers: must be a number or numbers"),
    ],
)
@pytest.mark.parametrize("further", [[], ["--traceback"]])
def test_a_command_line_that_is_none_is_said_in_one_line(run, words, line, further):
    code, out, errors = run(*words, *further)
    assert (code, out) == (2, "")
    # the oldest typer names arguments in capitals
    assert errors.lower().startswith(line.lower())
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_without_a_word_there_is_help(run, words):
    code, out, errors = run(*words)
    assert code == 2
    assert "Usage: kvbind" in out + errors
    assert "error:" not in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "kda"], "compare takes two inner loops, or edits of one, such as update=last; got 'kda' alone"),
        (["compare", "erase=true", "kda"], "an edit must stand behind the system that it is of; got 'erase=true' first"),
        (["compare", "kda", "gdn2", "comba"], "at most 2 systems, with edits FIELD=VALUE; got kda and gdn2 and comba"),
        (["compare", "kda", "eras=true"], "did you mean 'erase'"),
        (
            ["compare", "kda", "network=[a"],
            "overrides must be key=value with a YAML value; got ['network=[a']: while parsing",
        ),
        (["train", "language", "seed=99999999999999999999"], "seed must have at most 63 bits; got 99999999999999999999"),
        (["train", "language", "train=3"], "configuration key 'train' must be a mapping, of keys steps, "),
        (["reproduce", "table2", "--price", "inf"], "invalid value for '--price'"),
        (["reproduce", "table2", "--efficiency", "0"], "invalid value for '--efficiency'"),
        (["plan", "--budget", "nan"], "budget must be above 0 and at most 1.13e+15 tokens; got nan"),
        (["plan", "--json", "."], "--json must be a file to write; '.' is a folder"),
        (["report", "--out", "."], "--out must be a file to write; '.' is a folder"),
        (["reproduce", "table2", "--out", "empty.yaml"], "empty.yaml' is none"),
        (["reproduce", "table2", "--trained", "empty.yaml/x"], "--trained must be a folder; "),
        (["simplify", "nowhere", "--to", "rung2", "--out", "empty.yaml"], "--out must be a folder; "),
        (["probe", "nowhere", "--out", "empty.yaml"], "--out must be a folder; "),
        (["generate", "nowhere", "--seed", "99999999999999999999"], "seed must have at most 64 bits"),
        (["explain", "empty.yaml"], "empty.yaml must hold fields of an inner loop, such as {network: SwiGLU"),
        (["explain", "kda", "gdn2"], "at most 1 system, with edits FIELD=VALUE; got kda and gdn2"),
        (["explain", "lact_lm"], "did you mean 'lact_llm'"),
        (["explain", "missing.yaml"], "there is no 'missing.yaml'"),
        (["explain", "lact_llm", "--rung", "9"], "--rung"),
        (["explain", "lact_llm", "--value-width", "0"], "value_width must be an int of at least 1; got 0"),
        (["reproduce", "tabel2"], "did you mean 'table2'"),
        (["reproduce", "table2", "--scale", "smok"], "did you mean 'smoke'"),
        (["reproduce", "table2", "--task", "langauge"], "did you mean 'language'"),
        (["reproduce", "table2", "train.step=1"], "did you mean 'train.steps'"),
        (["reproduce", "table1", "--task", "views", "data.input=2"], "did you mean 'data.inputs'"),
        (["reproduce", "table1", "--task", "images", "--scale", "larg"], "scale must be one of 'smoke'"),
        (["reproduce", "table1", "--task", "all", "--data", "book.txt"], "data must be None or name a task"),
        (["train", "views", "--preset", "smal", "--preset", "huge"], "preset must be one of"),
        (["train", "images", "data.batc=1"], "did you mean 'data.batch'"),
        (["train", "langauge"], "did you mean 'language'"),
        (["train", "language", "--preset", "tinny"], "did you mean 'tiny'"),
        (["train", "language", "train.lerning_rate=1"], "did you mean 'train.learning_rate'"),
        (["train", "language", "model.inner.updat=last"], "did you mean 'update'"),
        (["train", "language", "model.fields.hiden_size=8"], "did you mean 'hidden_size'"),
        (["train", "language", "--data", "nowhere"], "which does not exist"),
        (["train", "language", "--data", ""], "data must name a file, a folder or hub:NAME; got ''"),
        (["train", "language", "seed=-1"], "seed must be at least 0; got -1"),
        (["train", "language", "--out", "new", "train.device=cuda:99"], "train.device must be a device of this machine"),
        (["eval", "language", "nowhere"], "must be the folder of a training run"),
        (["generate", "nowhere"], "must be the folder of a training run or of a model"),
        (["convert", "nowhere", "there"], "config.json"),
        (["convert", "nowhere", "there"], "does not exist"),
        (["convert", "nowhere", "there", "--to", "release"], "--to"),
        (["in-place", "nowhere", "there"], "source must be the folder of a model"),
        (["in-place", "nowhere", "there", "--layers", "first"], "must be a number or numbers with commas"),
        (["explian"], "explain"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(run, words, message):
    Path("empty.yaml").touch()
    code, _, errors = run(*words)
    assert code == 2
    assert message in " ".join(errors.replace("│", "").split())
    assert "Traceback" not in errors


def test_a_path_may_start_at_the_users_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    kvbind.systems.titans(chunk=32).to_yaml(tmp_path / "home" / "mine.yaml")
    assert "refresh" in run("compare", "titans", "~/mine.yaml")[1]
    # as shells leave it that expand `~` at the start of a word alone
    assert "--json must be a file" in run("plan", "--json=~/")[2]
    code, _, errors = run("generate", "~/none")
    assert code == 2
    assert f"got '{tmp_path}/home/none'" in errors


def test_letters_that_a_terminal_has_not_are_no_error(tmp_path):
    kvbind.systems.titans().to_yaml(tmp_path / "K\xe4se.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "kvbind", "compare", "K\xe4se.yaml", "kda"], cwd=tmp_path, capture_output=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert rb"K\xe4se.yaml" in done.stdout


def test_a_traceback_is_there_for_the_asking():
    with pytest.raises(ValueError, match="did you mean 'lact_llm'"):
        main(["explain", "lact_lm", "--traceback"])


def test_training_prints_for_the_asking_and_saves_the_whole_configuration(run, book, tmp_path):
    code, out, _ = run("train", "language", "--verbose", "--data", str(book), "--out", str(tmp_path / "mine"), *SMALL)
    assert code == 0
    saved = (tmp_path / "mine" / "config.yaml").read_text()
    for line in ("hidden_size: 16", "steps: 3", "visibility: past", "weight_decay: 0.1"):
        assert line in out
        assert line in saved
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert f"{result['held_out']['perplexity']:.4f}" in out


def test_training_again_goes_on_and_fresh_starts_anew(run, trained, book):
    before = (trained / "metrics.jsonl").stat().st_mtime_ns
    words = ["train", "language", "--data", str(book), "--out", str(trained), *SMALL]
    assert run(*words)[0] == 0
    assert (trained / "metrics.jsonl").stat().st_mtime_ns == before
    assert run(*words, "--fresh")[0] == 0
    assert (trained / "metrics.jsonl").stat().st_mtime_ns > before
    code, _, errors = run(*words, "seed=5")
    assert code == 2
    assert "seed was 0, is 5" in errors


def test_training_without_a_folder_makes_one_by_configuration(run, book, tmp_path):
    run("train", "language", "--data", str(book), *SMALL)
    run("train", "language", "--data", str(book), *SMALL, "seed=1")
    assert len(list((tmp_path / "runs").glob("language-tiny-*/result.json"))) == 2


def test_a_run_is_evaluated_as_it_was_after_training(run, trained):
    code, out, _ = run("eval", "language", str(trained), "--json", str(trained / "new" / "again.json"))
    assert code == 0
    held_out = json.loads((trained / "result.json").read_text())["held_out"]
    assert json.loads((trained / "new" / "again.json").read_text()) == held_out
    assert f"{held_out['perplexity']:.4f}" in out
    assert "bits per byte" in out


def test_a_folder_with_a_run_of_another_task_is_left_alone(run, trained):
    code, _, errors = run("train", "images", "--out", str(trained))
    assert code == 2
    assert "holds a run of task 'language'; name another folder" in errors


TINY = {
    "recall": ["data.batch=2", "data.evaluation_samples=2", "data.evaluation_batch=2"],
    "images": ["model.fields.embed_dim=12", "model.fields.num_heads=2", "model.fields.depth=1"],
    "views": ["data.procedural.scenes=2", "data.procedural.views=8", "data.evaluation_scenes=1", "data.batch=1"],
}


@pytest.mark.parametrize("task", TINY)
def test_other_tasks_train_from_their_smallest_preset_and_show_their_own_metrics(run, task, tmp_path):
    if task == "images":
        pytest.importorskip("sklearn")
    code, out, errors = run("train", task, *TINY[task], "train.steps=1", "train.warmup=1", "train.device=cpu")
    assert (code, errors) == (0, "")
    folder = next((tmp_path / "runs").glob(f"{task}-{open_task_module(task).SMALLEST}-*"))
    held_out = json.loads((folder / "result.json").read_text())["held_out"]
    assert next(iter(held_out)) == (SUBJECTS[task].metric.name if task in SUBJECTS else "accuracy")
    code, again, _ = run("eval", task, str(folder))
    assert code == 0
    for name, value in held_out.items():
        if isinstance(value, float):
            assert f"{name.replace('_', ' ')}" in again
            assert f"{value:.4f}" in again
    assert again.strip() in out
    if task == "recall":
        for command, *words in (["probe"], ["simplify", "--to", "rung2"]):
            assert "model must be of a run of language, images, views" in run(command, str(folder), *words)[2]


def test_a_released_checkpoint_of_another_family_converts(run, tmp_path):
    import torch

    config, tensors = released("lact_nvs")
    torch.save({"model": weights_of(tensors)}, tmp_path / "lact.pt")
    code, _, errors = run("convert", str(tmp_path / "lact.pt"), str(tmp_path / "ours"))
    assert code == 2
    assert "config must name it" in " ".join(errors.split())
    (tmp_path / "lact.json").write_text(json.dumps(config))
    code, out, _ = run("convert", str(tmp_path / "lact.pt"), str(tmp_path / "ours"), "--config", str(tmp_path / "lact.json"))
    assert code == 0
    assert "ours" in out
    assert kvbind.models.lact_nvs.LactNvs.from_pretrained(tmp_path / "ours").config.dim == config["dim"]


def test_a_run_is_evaluated_on_other_text_at_another_length(run, trained, tmp_path):
    (tmp_path / "other.txt").write_text("zzzz " * 200)
    run("eval", "language", str(trained), "--data", str(tmp_path / "other.txt"), "--json", "other.json", "data.length=64")
    other = json.loads((tmp_path / "other.json").read_text())
    assert other["tokens"] == 2 * 63
    assert other["perplexity"] != json.loads((trained / "result.json").read_text())["held_out"]["perplexity"]


def test_a_run_is_not_evaluated_as_another_model(run, trained):
    for edit in ("model.fields.hidden_size=32", "model.inner.momentum=false"):
        code, _, errors = run("eval", "language", str(trained), edit)
        assert code == 2
        assert "must leave the parameters that" in errors


@pytest.mark.parametrize("folder", ["", "model"])
def test_a_run_writes_text_that_starts_with_the_prompt(run, trained, folder):
    words = ("generate", str(trained / folder), "--prompt", "it was", "--tokens", "20", "--seed", "3")
    code, out, errors = run(*words)
    assert code == 0, errors
    assert out.startswith("it was")
    assert len(out) > len("it was\n")
    assert run(*words)[1] == out


def test_greedy_text_does_not_depend_on_the_seed(run, trained):
    words = ("generate", str(trained), "--prompt", "it was", "--tokens", "12", "--temperature", "0", "--seed")
    assert run(*words, "1")[1] == run(*words, "2")[1]


def test_each_of_several_prompts_gets_the_text_that_it_gets_alone(run, trained):
    words = ("generate", str(trained), "--tokens", "12", "--seed", "3")
    alone = [run(*words, "--prompt", prompt)[1] for prompt in ("it was", "the best of times")]
    code, out, errors = run(*words, "--prompt", "it was", "--prompt", "the best of times")
    assert code == 0, errors
    assert out == "\n".join(alone)


def test_a_series_of_metrics_breaks_between_its_places(capsys):
    from kvbind.cli.output import show_metrics
    from kvbind.screen import Screen

    series = [(place, 3.0) for place in range(0, 256, 32)]
    show_metrics(Screen(width=40), {"loss_by_position": series})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "loss by position: 0: 3.000  32: 3.000",
        "64: 3.000  96: 3.000  128: 3.000",
        "160: 3.000  192: 3.000  224: 3.000",
    ]


def test_an_empty_prompt_is_refused(run, trained):
    code, _, errors = run("generate", str(trained), "--prompt", "")
    assert code == 2
    assert "prompt must hold at least one token" in errors


def test_a_trained_model_converts_to_the_released_layout_and_back(run, book, tmp_path):
    trained = tmp_path / "mine"
    words = [*SMALL, "model.inner.orthogonalize.dtype=bfloat16"]  # as the release has it
    run("train", "language", "--data", str(book), "--out", str(trained), *words)
    assert run("convert", str(trained / "model"), str(tmp_path / "released"), "--to", "released")[0] == 0
    assert run("convert", str(tmp_path / "released"), str(tmp_path / "ours"))[0] == 0
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (trained / "model", tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert run("generate", str(tmp_path / "ours"), "--tokenizer", "bytes", "--tokens", "4")[0] == 0
    # a vocabulary of 256 is that of bytes
    assert run("generate", str(tmp_path / "ours"), "--tokens", "4")[0] == 0


def test_training_that_stops_says_why_without_a_traceback(run, book, monkeypatch):
    from kvbind.tasks.language import LanguageTask

    whole = LanguageTask.loss
    monkeypatch.setattr(LanguageTask, "loss", lambda *args: float("nan") * whole(*args))
    code, _, errors = run("train", "language", "--data", str(book), *SMALL, "train.max_skipped=2")
    assert code == 1
    assert "not finite in 2 steps in a row" in errors
    assert "Traceback" not in errors


def test_an_interruption_says_how_to_go_on(run, book, monkeypatch):
    from kvbind.experiments.training import runs

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupted)
    code, _, errors = run("train", "language", "--data", str(book), *SMALL)
    assert code == 130
    assert "goes on from the last checkpoint" in errors


@pytest.mark.parametrize("name", ["typer", "rich"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interruption_while_modules_are_imported_is_said(name, wrapped, tmp_path):
    # as Python 3.11 does where it comes while a class is made
    said = "raise RuntimeError('a class') from KeyboardInterrupt()" if wrapped else "raise KeyboardInterrupt"
    (tmp_path / f"{name}.py").write_text(said)
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "kvbind", "systems"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


IMPORTING = {
    "an error": "raise KeyboardInterrupt",
    "a signal whose error comes to nothing": (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(1000): pass\n"
        "except KeyboardInterrupt: raise SystemExit('an error in C++')"
    ),
}
"""What PyTorch does while it is imported."""


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize("what", IMPORTING)
def test_an_interruption_while_pytorch_is_imported_ends_the_process(what, listens, tmp_path):
    (tmp_path / "torch.py").write_text(IMPORTING[what])
    path = os.pathsep.join((str(tmp_path), *sys.path))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvbind", "systems"], stdout=subprocess.PIPE, stderr=subprocess.PIPE if listens else full,
            text=True, check=False, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n" if listens else None)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)])
def test_a_run_that_nobody_listens_to_ends_with_the_code_of_an_interruption(error, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stderr", Closed())
    with pytest.raises(SystemExit) as ended, continuable():
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_the_entry_point_imports_nothing_before_it_heeds_an_interruption():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"kvbind": "kvbind.__main__:main"}
    code = (
        "import sys, kvbind.__main__\nprint(*(x for x in sys.modules if x.partition('.')[0] in ('kvbind', 'typer', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kvbind", "kvbind.interrupt", "kvbind.__main__"]


def test_help_does_not_wait_for_pytorch():
    code = "import sys\nfrom kvbind.cli import main\ntry:\n    main(['--help'])\nfinally:\n    print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "--data", "a", "--data", "b"], "data must be one path, or TASK=PATH with a task among language"),
        (["table2", "--data", "language=a", "--data", "language=b"], "data must name each task once"),
        (["table2", "--task", "views", "--data", "language=a"], "data must be of the task views; got data for language"),
        (["table2", "--task", "all", "--data", "somewhere"], "data must be None or name a task, such as language=PATH"),
        (["table2", "--rows", "rung9"], "rows must be"),
        (
            ["figure1", "--scale", "paper"],
            "figure1 looks at trained models, of which --scale paper has none without --train",
        ),
        (["tabel2"], "experiment must be one of table1, table2"),
    ],
)
def test_what_does_not_fit_together_in_reproduce_is_said(run, words, message):
    code, _, errors = run("reproduce", *words)
    assert code == 2
    assert message in " ".join(errors.split())


def test_data_are_named_by_task():
    assert sources([]) is None
    assert sources(["a=b"]) == "a=b"
    assert sources(["language=a", "images=b=c"]) == {"language": "a", "images": "b=c"}


def test_steps_of_paper_scale_are_measured_and_nothing_is_trained(run, tmp_path):
    edits = [*SMALL[:6], "data.length=32", "train.device=cpu"]
    words = ["--scale", "paper", "--measure-steps", "1", "--rows", "rung6", "--price", "4", "--out", str(tmp_path / "steps")]
    code, out, errors = run("reproduce", "table2", *words, *edits)
    assert (code, errors) == (0, "")
    results = json.loads((tmp_path / "steps" / "results.json").read_text())
    assert [row["name"] for row in results["measured"]] == ["rung6"]
    assert results["measure"]["price"] == 4
    assert "on 64" in out
    assert not list(tmp_path.rglob("result.json"))


COMMANDS = [
    importlib.import_module(f"{package.__name__}.{found.name}")
    for package in (kvbind.cli.commands, kvbind.bench.commands)
    for found in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.removeprefix("kvbind."))
def test_no_option_is_taken_and_ignored(module):
    command = next(node for node in ast.parse(inspect.getsource(module)).body if getattr(node, "name", "") == "command")
    used = {node.id for body in command.body for node in ast.walk(body) if isinstance(node, ast.Name)}
    assert {argument.arg for argument in command.args.args} <= used


def test_help_names_every_experiment_once_and_breaks_no_paragraph_in_the_middle(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run("reproduce", "--help")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    named = words.split("Which: ")[1].split(" or all.")[0]
    for name in EXPERIMENTS:
        assert len(re.findall(rf"(?:^|, ){name}(?= \(|,)", named)) == 1, name
    assert len(re.findall(r"\([^)]*\)", named)) == len(set(re.findall(r"\([^)]*\)", named)))
    assert "trains all seven rungs of the ladder and two controls" in out


def test_a_silent_command_is_heard_of(monkeypatch):
    heard, said = threading.Event(), []
    monkeypatch.setattr(screen, "SILENCE", 0.03)
    monkeypatch.setattr(screen, "break_silence", lambda what, begun: (said.append(what), heard.set()))
    monkeypatch.setattr(cli, "app", lambda words, **options: not heard.wait(60))
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "verify", "--small"])
    assert ended.value.code == 0
    assert said[0] == "kvbind bench verify"
    # of several processes, the first one speaks
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "heard_of", pytest.fail)
    with pytest.raises(SystemExit):
        cli.main(["train", "language"])


def test_a_run_that_is_not_finished_is_gone_on_with_by_the_command_that_is_named(run, trained):
    shutil.rmtree(trained / "model")
    (trained / "result.json").unlink()
    code, _, errors = run("generate", str(trained))
    assert code == 2
    said = re.search(r"is at step 3 of 3, and has no model/ yet; kvbind (train .+) goes on with it$", errors.strip())
    code, out, errors = run(*shlex.split(said[1]))
    assert (code, errors) == (0, "")
    assert "goes on from the checkpoint at step 3 of 3" in out
    assert run("generate", str(trained), "--tokens", "2")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("words", [["systems"], ["explain", "kda"], ["--help"], ["bench", "--help"], ["--version"]])
def test_what_cannot_be_printed_is_one_line_or_none_and_no_success(words):
    start = [sys.executable, "-m", "kvbind", *words]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert "No space left on device" in found.stderr
        # not even the error can be said
        mute = subprocess.run([*start[:3], "nothing"], stdout=full, stderr=full, check=False)
        assert mute.returncode == 2


@pytest.mark.parametrize("words", [["systems"], ["explain", "kda"], ["--help"]])
def test_a_reader_that_leaves_is_no_error_to_speak_of(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found = subprocess.run(
            [sys.executable, "-m", "kvbind", *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    assert found.stderr == ""
    assert found.returncode in (0, 1)
