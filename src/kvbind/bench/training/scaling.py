"""`kvbind bench scaling`: training the language model on 1, 2, 4, 8 GPUs, in one command with a limit on its time.

For each number of GPUs `torchrun` starts that many processes of `kvbind.bench.training.scaling_worker`, which run its cases:

- *fsdp*: sequences of one length, one per GPU, weights in shards.
- *sequence*: one sequence, ever longer, cut over all GPUs.
- *equality*: the losses of the same steps, on the same tokens, in both ways, beside those of one GPU.

Rows are handed out as they are measured, so that what was stopped has lost nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvbind.bench.harness.record import OUT_OF_TIME
from kvbind.bench.training.scaling_worker import OUT_OF_MEMORY, ScalingCase
from kvbind.inner.systems import ladder
from kvbind.models import PRESETS, LactConfig
from kvbind.plan.calibration import load_calibration
from kvbind.plan.costs import Mesh, PlannedTraining, host_bytes, memory
from kvbind.screen import duration

WHATS = ("fsdp", "sequence", "equality")

POLL_SECONDS = 0.2

LARGER_THAN_ONE = "a shorter one ran out of memory"

NEEDS_MORE = "needs more memory, by kvbind plan"

SURELY = 1.15
"""By how much memory must fall short of what formulas say for a case not to be tried; they are off by less."""

PINNED_SHARE = 0.8
"""Of the machine's memory, what may be pinned for block inputs."""

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")

STOP_SECONDS = 45
"""For torchrun to end its processes, the hard way after 30 seconds."""

ERROR = re.compile(r"((?:\b(?!Child)\w+Error|what\(\)): .*)")

REASON_LENGTH = 300
"""Characters of an error that rows quote."""


@dataclass(frozen=True)
class ScalingSettings:
    """What to measure.

    Attributes:
        preset: the model's size.
        rung: of the ladder.
        form: "parallel" or "recurrent".
        fsdp_length: tokens of each sequence of "fsdp".
        lengths: of the sequence of "sequence".
        equality_preset: the model's size of "equality".
        equality_length: tokens of its sequences.
        equality_steps: how many.
        recompute: what is made again in the backward pass.
        seconds: how long to time each case.
    """

    preset: str = "760m"
    rung: str = "rung2"
    form: str = "parallel"
    fsdp_length: int = 32768
    lengths: tuple[int, ...] = tuple(1 << n for n in range(17, 23))
    equality_preset: str = "125m"
    equality_length: int = 32768
    equality_steps: int = 20
    recompute: str = "block"
    seconds: float = 6.0


def cases(whats: Sequence[str], gpus: Sequence[int], settings: ScalingSettings) -> list[ScalingCase]:
    """Everything to measure, by the number of GPUs: the fewest first, then the most; shorter sequences first.

    Args:
        whats: some of `WHATS`.
        gpus: numbers of them, rising.
        settings: sizes.
    """
    s, found = settings, []
    # were a run cut off, what is missing should not be what all else is compared with, nor the largest
    for n in (gpus[0], *reversed(gpus[1:])):

        def case(
            what: str, length: int, *, sequence: bool, batch: int, preset: str = s.preset, steps: int = 0, n: int = n
        ) -> ScalingCase:
            shard, cut = (1, n) if sequence else (n, 1)
            return ScalingCase(what, n, shard, cut, preset, s.rung, s.form, length, batch, s.recompute, steps, s.seconds)

        if "fsdp" in whats:
            found.append(case("fsdp", s.fsdp_length, sequence=False, batch=n))
        if "sequence" in whats:
            chunk = PRESETS[s.preset]["inner"].chunk
            found += [case("sequence", x, sequence=True, batch=1) for x in sorted(s.lengths) if x >= n * chunk]
        if "equality" in whats:
            # as many sequences as divide among any number of GPUs, so that all train on the same
            for sequence, batch in ((False, max(gpus)), (True, 1)):
                found.append(
                    case(
                        "equality",
                        s.equality_length,
                        sequence=sequence,
                        batch=batch,
                        preset=s.equality_preset,
                        steps=s.equality_steps,
                    )
                )
    return found


def too_large(case: ScalingCase, memory_bytes: float) -> bool:
    """Whether a case is so large, by the formulas of `kvbind plan`, that it need not be tried on this machine.

    Args:
        case: what would be run.
        memory_bytes: of each GPU.
    """
    inner = ladder(PRESETS[case.preset]["inner"])[case.rung]
    config = LactConfig(**{**PRESETS[case.preset], "inner": inner, "ttt_form": case.form})
    job, mesh = PlannedTraining(config, case.length, case.batch, case.recompute), Mesh(1, case.shard, case.sequence)
    needed = memory(job, mesh, load_calibration().block_bytes).total
    # pinned memory cannot be swapped out: asking for more than there is ends more than this program
    pinned = case.gpus * host_bytes(job, mesh)
    return needed > SURELY * memory_bytes or pinned > PINNED_SHARE * host_memory()


def host_memory() -> float:
    """Bytes of memory that this machine has, or of them what its control group may use."""
    present = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return min(present, float(MEMORY_LIMIT.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no control groups, or no limit
        return present


def measured(
    planned: Sequence[ScalingCase], device: str, *, budget: float, limit: float, memory_bytes: float | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of results, one for each case, as soon as they are there.

    A row has what its case says and what was measured, or "skipped", the reason why nothing was.

    Args:
        planned: by their number of GPUs.
        device: "cuda" or "cpu".
        budget: seconds after which nothing further is run.
        limit: seconds that one case may take, the start of its processes included.
        memory_bytes: of each GPU; None to try everything.
    """
    deadline = time.monotonic() + budget
    for n in dict.fromkeys(case.gpus for case in planned):
        waiting = [case for case in planned if case.gpus == n]
        if memory_bytes is not None:
            large = [case for case in waiting if too_large(case, memory_bytes)]
            yield from (case.row() | {"skipped": NEEDS_MORE} for case in large)
            waiting = [case for case in waiting if case not in large]
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                yield from (case.row() | {"skipped": OUT_OF_TIME} for case in waiting)
                break
            done = 0
            for outcome in _run(waiting, device, deadline, limit):
                yield waiting[done].row() | outcome
                done += 1
                if outcome.get("skipped") == OUT_OF_MEMORY:
                    small = waiting[done - 1]
                    rest = [case for case in waiting[done:] if not _larger(case, small)]
                    larger = [case for case in waiting[done:] if _larger(case, small)]
                    yield from (case.row() | {"skipped": LARGER_THAN_ONE} for case in larger)
                    waiting, done = rest, 0
                    break
            waiting = waiting[done:]


def finished(rows: Sequence[dict[str, Any]], planned: Sequence[ScalingCase]) -> dict[int, dict[str, Any]]:
    """Of an earlier record's rows, those that need not be measured again, by the number of their case.

    These are what was measured and what does not fit. What failed or had no time is tried again.

    Args:
        rows: of a record.
        planned: the cases of now.

    Raises:
        KeyError, TypeError: rows that do not say what was measured.
    """
    lasting = (None, OUT_OF_MEMORY, LARGER_THAN_ONE, NEEDS_MORE)
    settled = [row for row in rows if row["what"] in WHATS and row.get("skipped") in lasting]
    return {number: row for number, case in enumerate(planned) for row in settled if row | case.row() == row}


def _larger(case: ScalingCase, small: ScalingCase) -> bool:
    return case.what == small.what and case.length >= small.length and case.sequence == small.sequence


def _run(waiting: Sequence[ScalingCase], device: str, deadline: float, limit: float) -> Iterator[dict[str, Any]]:
    """Start processes for cases of one number of GPUs; outcomes in their order, up to the first that has none.

    Where a case ends the processes, its outcome says so, and is the last.
    """
    with tempfile.TemporaryDirectory(prefix="kvbind-scaling-") as home:
        described, lines, log = (Path(home) / name for name in ("cases.json", "rows.jsonl", "log"))
        described.write_text(
            json.dumps({"device": device, "cases": [[i, asdict(case)] for i, case in enumerate(waiting)]}), encoding="utf-8"
        )
        lines.touch()
        command = _command(waiting[0].gpus, described, lines)
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            began, given = time.monotonic(), 0
            while given < len(waiting):
                ended = process.poll() is not None
                outcome = _outcome(lines, given)
                if outcome is None and ended:
                    outcome = {"skipped": f"failed: {_reason(log)}"}
                if outcome is None and time.monotonic() > deadline:
                    outcome = {"skipped": OUT_OF_TIME}
                if outcome is None and time.monotonic() - began > limit:
                    outcome = {"skipped": f"took more than {duration(limit)}"}
                if outcome is None:
                    time.sleep(POLL_SECONDS)
                    continue
                yield outcome
                began, given = time.monotonic(), given + 1
                if "skipped" in outcome:
                    return
        finally:
            _stop(process)


def _command(gpus: int, described: Path, lines: Path) -> list[str]:
    """What starts one process per GPU for the cases in a file."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    return [*launcher, "-m", "kvbind.bench.training.scaling_worker", str(described), str(lines)]


def _outcome(lines: Path, number: int) -> dict[str, Any] | None:
    """What processes have written of a case, or None."""
    for text in lines.read_text(encoding="utf-8").split("\n")[:-1]:
        line = json.loads(text)
        if line["case"] == number:
            if "skipped" in line:
                return {"skipped": line["skipped"]}
            if "row" in line:
                row: dict[str, Any] = line["row"]
                return row
    return None


def _reason(log: Path) -> str:
    """The first error that a process printed; others follow from it."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = ERROR.search(text)
    return found[1][:REASON_LENGTH].strip() if found else "processes ended without a word"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a run and all its processes, which torchrun does when it is told to."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def equality(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the losses of several GPUs are from those of one, of every row of "equality" that has both.

    Returns:
        For each such row its number of GPUs and mesh, and the largest relative difference over its steps.
    """
    found = []
    runs = [row for row in rows if row["what"] == "equality" and "losses" in row]
    for row in runs:
        alone = next((r for r in runs if r["gpus"] == 1 and r["batch"] == row["batch"]), None)
        if alone is None or row["gpus"] == 1:
            continue
        apart = [abs(a - b) / abs(b) for a, b in zip(row["losses"], alone["losses"], strict=True)]
        found.append({"gpus": row["gpus"], "mesh": row["mesh"], "steps": len(apart), "largest": max(apart)})
    return found
