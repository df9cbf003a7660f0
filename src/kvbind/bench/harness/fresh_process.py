"""Work in a process of its own: first calls with caches empty or warm, and what may take longer than one would wait.

`python -m kvbind.bench.harness.fresh_process JSON` does one job and writes its result as the last line of its output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from kvbind.bench.harness.device_time import first_line


class TookTooLongError(RuntimeError):
    """A job did not end within its time."""


def in_fresh_process(job: str, fields: Mapping[str, Any], environment: Mapping[str, str], limit: float) -> dict[str, Any]:
    """Do a job in a new process.

    Args:
        job: a name in `JOBS`.
        fields: its arguments, plain data.
        environment: variables to set on top of this process's.
        limit: seconds after which the process and those it started are ended.

    Raises:
        TookTooLongError: it did not end in time.
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbind.bench.harness.fresh_process", json.dumps({"job": job, **fields})],
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
        raise TookTooLongError(f"no result after {limit:.0f} s") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        said = errors.strip().splitlines()
        raise RuntimeError(said[-1][:300] if said else f"exit code {process.returncode}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def first_calls(fields: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the first forward and backward pass of a case, of one more, and of the first at other lengths.

    The first contains the import of kernels, their compilation and their tuning; not that of PyTorch, nor the start of
    the device, its matrix library and autograd.
    """
    import torch

    from kvbind.bench.harness.named_operands import draw_leaves, in_precision, run
    from kvbind.bench.harness.timing import now
    from kvbind.bench.kernels.speed import Case

    case = Case.of(fields["case"])
    device = torch.device(fields["device"])
    # what PyTorch starts and imports at its own first product and gradient
    warm = torch.ones(64, 64, device=device, requires_grad=True)
    torch.autograd.grad(warm @ warm, warm, torch.ones_like(warm))

    def once(tokens: int) -> float:
        size = case.size_at(tokens)
        leaves = in_precision(draw_leaves(case.spec, size, device), case.torch_dtype, torch.float32, grad=True)
        begin = now(device)
        y, _ = run(case.spec, leaves, case.form)
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)
        return now(device) - begin

    tokens = case.tokens
    first, again = once(tokens), once(tokens)
    others = {str(other): once(other) for other in (tokens + case.chunk, tokens // 2 + 37, tokens - 1)}
    return {"first_seconds": first, "again_seconds": again, "new_length_seconds": others}


def measured(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a case's row: under `torch.compile`, with the seconds of its first forward and training calls."""
    import torch

    from kvbind.bench.kernels.speed import Case, measure

    case = Case.of(fields["case"])
    with compiling_configurations() if case.by == "fla" else contextlib.nullcontext():
        return measure(case, torch.device(fields["device"]), fields["seconds"])


def compiled_step(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row of `kvbind bench compile`."""
    from kvbind.bench.training.compile_time import compiled_step

    return compiled_step(fields)


def served(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row of `kvbind bench serving`."""
    from kvbind.bench.models.serving import served

    return served(fields)


@contextlib.contextmanager
def compiling_configurations() -> Iterator[None]:
    """Inside, all that an autotuner of Triton's chooses from is compiled at once, at its first launch.

    fla's kernels of linear attention choose from up to 48 configurations each, some 120 in all, compiled one by one.
    """
    from triton.runtime.autotuner import Autotuner

    from kvbind.kernels.ahead import compiling_ahead

    before, met = Autotuner.run, set()

    def run(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if self not in met:
            met.add(self)
            with compiling_ahead():
                self.warmup(*args, **kwargs)
        return before(self, *args, warmup=warmup, **kwargs)

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = before


JOBS = {"first_calls": first_calls, "measured": measured, "compiled_step": compiled_step, "served": served}


def main() -> None:
    """Do the job on the command line."""
    fields = json.loads(sys.argv[1])
    try:
        result = JOBS[fields.pop("job")](fields)
    except Exception as problem:  # whatever it is, the process that waits reports it
        sys.exit(first_line(problem))
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
