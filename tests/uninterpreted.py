"""Runs a test file as a program that compiles kernels: to interpret them or not is settled when they are imported."""

import json
import os
import subprocess
import sys


def printed_by(file, *arguments, **variables):
    """What a file prints as JSON.

    Args:
        file: to run.
        *arguments: of its command line.
        **variables: of its environment, besides those that are here.
    """
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    run = subprocess.run([sys.executable, file, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
