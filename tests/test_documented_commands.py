"""Commands in the documentation are ones that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from kvbind.cli import app
from kvbind.experiments import EXPERIMENTS
from kvbind.tasks import TASKS, preset_files

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = ("kvbind ", "torchrun ")


def commands(page):
    """Each command of a page's shell blocks, as words behind `kvbind`."""
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if part.strip().startswith(STARTS):
                    words = shlex.split(part, comments=True)
                    while "kvbind" in words:
                        words = words[words.index("kvbind") + 1 :]
                    yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist_with_their_options_and_presets(page):
    for words in commands(page):
        found, rest = get_command(app), list(words)
        while hasattr(found, "commands"):
            name = rest.pop(0)
            if "|" in name:  # several in one line
                assert set(name.split("|")) <= {"all", *found.commands}, words
                break
            if name.startswith("--"):
                assert name == "--version", words
                break
            assert name in found.commands, words
            found = found.commands[name]
        if found.name == "serve" or hasattr(found, "commands"):
            continue
        known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = [word.partition("=")[0] for word in rest if word.startswith("--")]
        assert set(used) <= {*known, "--help", "--traceback"}, words
        if found.name == "reproduce":
            assert set(rest[0].split("|")) <= {"all", *EXPERIMENTS}, words
        if "--preset" in rest and found.name in ("train", "plan"):
            task = rest[0] if found.name == "train" else "language"
            assert task in TASKS, words
            preset = rest[rest.index("--preset") + 1]
            assert preset in preset_files(task) or preset.endswith(".yaml"), words


def test_pages_hold_commands():
    assert sum(1 for page in PAGES for _ in commands(page)) > 40
