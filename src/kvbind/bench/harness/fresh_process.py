"""Work in a process of its own: first calls with caches empty or warm, and what may take longer than one would wait.

`python -m kvbind.bench.harness.fresh_process JSON` does one job and writes its result as the last line of its output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from kvbind.bench.harness.device_time import first_line
from kvbind.screen import duration


class TookTooLongError(RuntimeError):
    """A job did not end within its time."""


def in_fresh_process(
    job: Callable[[dict[str, Any]], dict[str, Any]], fields: Mapping[str, Any], environment: Mapping[str, str], limit: float
) -> dict[str, Any]:
    """Do a job in a new process.

    Args:
        job: a module's function of plain data, that returns plain data.
        fields: what it is called with.
        environment: variables to set on top of this process's.
        limit: seconds after which the process and those it started are ended.

    Raises:
        TookTooLongError: it did not end in time.
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbind.bench.harness.fresh_process", json.dumps([job.__module__, job.__name__, fields])],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # a compiler has worker processes of its own
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise TookTooLongError(f"no result after {duration(limit)}") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        said = errors.strip().splitlines()
        raise RuntimeError(said[-1][:300] if said else f"exit code {process.returncode}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def main() -> None:
    """Do the job on the command line."""
    module, name, fields = json.loads(sys.argv[1])
    try:
        result = getattr(importlib.import_module(module), name)(fields)
    except Exception as problem:  # whatever it is, the process that waits reports it
        sys.exit(first_line(problem))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
