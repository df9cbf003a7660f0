"""What the command prints of names that come from users, and what it reads of models from elsewhere."""

import io
import json
import logging
import os
import pickle
import re

import pytest

from kvbind import cli
from kvbind.screen import Screen, visible
from kvbind.tasks.start import weights_hash
from kvbind.train.unfinished import unfinished

NAME = "[red]a[/red] [/] :smile: \x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp"
SHOWN = r"[red]a[/red] [/] :smile: \x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp"


def test_names_are_printed_as_they_are_and_move_no_cursor():
    file = io.StringIO()
    screen = Screen(file=file, force_terminal=True, width=200)
    screen.print(NAME, soft_wrap=True)
    assert file.getvalue() == SHOWN + "\n"
    assert visible("a\tb\nc é 漢") == "a\tb\nc é 漢"


def test_names_in_tables_are_printed_as_they_are():
    from rich.table import Table

    file = io.StringIO()
    table = Table(title=NAME, box=None)
    table.add_column(NAME)
    table.add_row(NAME)
    Screen(file=file, width=200).print(table)
    assert file.getvalue().count(SHOWN) == 3


def test_errors_say_names_as_they_are_in_one_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "language", NAME])
    (first,) = capsys.readouterr().err.splitlines()
    assert first.startswith("error: run must be the folder of a training run")
    assert "[red]a[/red] [/] :smile:" in first
    assert not any(ord(letter) < 32 or letter in "\x9b\u202e" for letter in first)


def test_the_log_says_names_as_they_are_in_one_line(capsys):
    logger = logging.getLogger("kvbind.tests-of-names")
    handler = cli.LogLines()
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning("%s is broken", NAME)
    logger.removeHandler(handler)
    assert capsys.readouterr().err == f"warning: {SHOWN} is broken\n"


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("words", [["generate", "{run}/model"], ["generate", "{run}"], ["eval", "language", "{run}"]])
def test_a_model_is_loaded_from_safetensors_alone_whatever_lies_around_it(tmp_path, monkeypatch, words):
    ran, run = tmp_path / "ran", tmp_path / "run"
    hostile, checkpoint = pickle.dumps(Hostile(ran)), run / "checkpoints" / "step-00000001"
    for folder in (checkpoint, run / "model"):
        folder.mkdir(parents=True)
        for name in ("plain.pt", ".metadata", "__0_0.distcp", "pytorch_model.bin", "model.pt", "training_args.bin"):
            (folder / name).write_bytes(hostile)
    (checkpoint / "complete").write_text("step-00000001\n")
    (run / "config.yaml").write_text("# kvbind train language\nseed: 0\n")
    (run / "model" / "config.json").write_text(json.dumps({"model_type": "lact"}))
    with pytest.raises(SystemExit) as caught:
        cli.main([word.format(run=run) for word in words])
    assert caught.value.code == 2
    assert not ran.exists()


def test_an_unfinished_run_is_no_model(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("# kvbind train language\nseed: 0\n")
    for words in (
        ["generate", str(tmp_path)],
        ["eval", "language", str(tmp_path), "data.length=64", f"data.source={__file__}"],
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "run must be finished" in capsys.readouterr().err


def test_a_run_that_has_left_no_model_says_how_far_it_is_and_how_to_go_on(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    config = run / "config.yaml"
    config.write_text("# kvbind train images\ntrain:\n  steps: 2000\n")
    command = f"kvbind train images --preset '{config}' --out '{run}'"
    assert unfinished(run).endswith(f"no model/ and no checkpoint yet; {command} begins at its first step")
    for name, whole in (("step-00000040", True), ("step-00000082", True), ("step-00000090", False)):
        (run / "checkpoints" / name).mkdir(parents=True)
        if whole:
            (run / "checkpoints" / name / "complete").write_text(f"{name}\n")
    there = f"'{run}' is at step 82 of 2,000, and has no model/ yet; {command} goes on with it"
    assert unfinished(run) == there
    with pytest.raises(ValueError, match=f"start.model must be of a finished run; {re.escape(there)}"):
        weights_hash(run)
    (run / "result.json").write_text("{}")
    assert unfinished(run).endswith(f"without its model/; {command} --fresh trains it anew")
    config.write_text("steps: 3\n")
    assert unfinished(run).endswith("has no model/ yet, which the command that trains it leaves there")
    (run / "model").mkdir()
    with pytest.raises(ValueError, match=f"whose model is {re.escape(repr(str(run / 'model')))}"):
        weights_hash(run)
