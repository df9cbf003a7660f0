"""Arguments and options that commands share, and what is read out of their words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbind.tasks import TASKS

TASK_NAMES = ", ".join(TASKS)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Edits of the configuration, such as train.steps=500 model.inner.update=last."
    ),
]

Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Data to use in place of the configuration's: a file, a folder, or hub:NAME.", metavar="PATH"
    ),
]

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the whole configuration too, which the run's folder has in any case.")
]


def with_data(overrides: list[str] | None, key: str, data: str | None) -> list[str]:
    """Edits of a configuration, and after them `--data`, if it is given, as the data's `key`."""
    if data == "":
        raise ValueError(f"data must name a file, a folder or hub:NAME; got {data!r}")
    return [*(overrides or []), *([] if data is None else [f"data.{key}={json.dumps(data)}"])]


def run_and_rest(words: Sequence[str]) -> tuple[str | None, Path, list[str]]:
    """What `[TASK] RUN [KEY=VALUE]...` says: the task, where it is named before the run, the run's folder, and the rest.

    Raises:
        ValueError: no run.
    """
    named = words[0] in TASKS and len(words) > 1 and ("=" not in words[1] or Path(words[1]).is_dir())
    task, rest = (words[0], words[1:]) if named else (None, words)
    if not named and len(words) > 1 and "=" not in words[1]:
        from kvbind.inner.value import nearest

        raise ValueError(f"task must be one of {TASK_NAMES}; got {words[0]!r}{nearest(words[0], TASKS)}")
    return task, Path(rest[0]).expanduser(), list(rest[1:])


def check_task(task: str | None, trained_on: str, run: Path) -> None:
    """Raise `ValueError` where a task was named that is not the run's."""
    if task not in (None, trained_on):
        raise ValueError(f"run must be one of task {task!r}; {str(run)!r} is one of {trained_on!r}")


def inner_loops(words: Sequence[str], most: int) -> list[tuple[str, Any]]:
    """The inner loops of a command line, `SYSTEM [FIELD=VALUE]...` at most so many times, with what was written of each.

    Raises:
        ValueError, TypeError: edits before any system, more systems than that, or one or an edit that is none.
    """
    groups: list[list[str]] = []
    for word in words:
        if "=" not in word or Path(word).is_file():
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"an edit must stand behind the system that it is of; got {word!r} first")
    if len(groups) > most:
        found = " and ".join(x[0] for x in groups)
        raise ValueError(f"there must be at most {most} system{'s' * (most > 1)}, with edits FIELD=VALUE; got {found}")
    return [(" ".join(group), edited_loop(*group)) for group in groups]


def edited_loop(system: str, *edits: str) -> Any:
    """A named system, or that in a file, with edits."""
    from kvbind.inner.systems.registry import named_or_file

    inner = named_or_file(system)
    if not edits:
        return inner
    from omegaconf import OmegaConf

    from kvbind.tasks.inner_loops import edited
    from kvbind.train.config import parse_overrides

    fields: Any = OmegaConf.to_container(parse_overrides(edits))
    return edited(inner, fields)
