import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# a shell has what it runs behind it ignore interrupts, which tests send themselves
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


@pytest.fixture
def run(capsys):
    """Run the command; its exit code, and what it wrote on stdout and stderr."""

    from kvbind.cli import main

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(words)
        written = capsys.readouterr()
        return caught.value.code or 0, written.out, written.err

    return call
