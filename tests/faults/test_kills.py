"""Processes that are killed: at random moments, as ranks, and as workers of a table."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.launching import environment, torchrun
from faults import small
from kvbind.experiments.training import workers
from kvbind.experiments.training.plans import configuration
from kvbind.experiments.training.workers import TrainingJob, Worker, WorkerKilledError, train_all
from kvbind.train import latest_checkpoint

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KVBIND_KILLS", "12"))
"""`make test-faults` has 200 of them."""


@pytest.mark.timeout(60 + 10 * KILLS)
def test_runs_killed_at_random_moments_end_bit_for_bit_like_one_that_was_not(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", tmp_path, str(KILLS), str(seed)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    found = json.loads(done.stdout)
    assert found["kills"] == KILLS
    assert found["runs"] >= 1


def test_a_run_whose_ranks_are_killed_in_a_step_and_in_a_save_goes_on_and_ends_like_one_that_was_not(tmp_path):
    number = random.Random().randrange(4, 8)  # the step in which the first process dies; checkpoints come every two
    code, _, errors = torchrun(2, HERE / "killed_ranks.py", tmp_path, number, restarts=3)
    assert code == 0, errors[-4000:]

    for rank in range(2):
        first, second, third = (line.split() for line in (tmp_path / f"attempts-{rank}").read_text().splitlines())
        assert first == ["0", "-"]
        # the newest checkpoint may still have been under way
        latest = number - number % 2
        assert second[0] == "1"
        assert second[1] in {f"step-{latest:08d}", f"step-{latest - 2:08d}"}
        assert third == ["2", "step-00000006"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]

    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    found, expected = (latest_checkpoint(tmp_path / name) for name in ("run", "whole"))
    for part in ("model", "trained", "optimizer"):
        assert found[part].keys() == expected[part].keys()
        assert all(x.equal(expected[part][name]) for name, x in found[part].items())

    # then a bit of what the second process had written was flipped, and both went on from the one before
    said = {(tmp_path / f"flipped-{rank}").read_text() for rank in range(2)}
    assert said == {"step-00000010 {'step-00000012': 'shard-00001.bin has another checksum'}"}
    assert rows(tmp_path / "flipped") == rows(tmp_path / "whole")


def rows(folder):
    return [{name: x for name, x in row.items() if name not in small.VARYING} for row in small.read_metrics(folder)]


class Fragile(Worker):
    """A worker that somebody kills once."""

    kills = 1

    def train(self, job, watch, deadline=None):
        def struck(step, note):
            watch(step, note)
            if step == 3 and Fragile.kills:
                Fragile.kills -= 1
                os.kill(self.process.pid, signal.SIGKILL)

        super().train(job, struck, deadline)


def test_a_killed_worker_is_named_and_its_row_is_trained_by_another(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers, "Worker", Fragile)
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 60)
    (run,) = train_all([job_on(tmp_path / "book.txt", tmp_path / "a")], 2, None, lambda job, run: None)
    assert run.result["steps"] == 6
    assert "the process that trained a (" in caplog.text
    assert "was killed by SIGKILL; another goes on with it" in caplog.text


@pytest.mark.parametrize("begins", [True, False])
def test_a_row_whose_workers_are_always_killed_fails_alone(tmp_path, monkeypatch, begins):
    lives = []

    class Doomed:
        def __init__(self, gpu):
            self.process = type("Process", (), {"poll": lambda self: None})()

        def train(self, job, watch, deadline):
            lives.append(job.fresh)
            if begins:
                watch(1, "")
            raise WorkerKilledError("the process that trained x (7) was killed by SIGKILL")

        def end(self):
            pass

        def wait(self, until):
            pass

        def stop(self):
            pass

    monkeypatch.setattr(workers, "Worker", Doomed)
    failed = []
    job = TrainingJob("small", small.config(), tmp_path / "x", "x", fresh=True)
    found = train_all([job], 2, None, lambda job, run: None, failed=lambda job, error: failed.append((job, error)))
    ((given_up, error),) = failed
    assert found == [None]
    assert isinstance(error, WorkerKilledError)
    # what has begun anew goes on instead of beginning once more
    assert lives == [True, not begins, not begins]
    assert given_up.fresh != begins


def job_on(book, folder):
    edits = [
        "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
        "model.fields.num_lact_heads=1", "model.fields.window_size=8", "model.fields.intermediate_size=16",
        "model.inner.chunk=8", "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=2",
        "train.warmup=1", "train.device=cpu", "train.checkpoint_every=1", "train.steps=6", f"data.source={book}",
    ]  # fmt: skip
    return TrainingJob("language", configuration("language", "smoke", 0, edits), folder, folder.name)
