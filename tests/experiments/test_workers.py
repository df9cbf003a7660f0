import json
import subprocess
import sys
import time

import pytest
import torch

from kvbind.experiments import workers
from kvbind.experiments.plan import configuration
from kvbind.experiments.runs import run_name
from kvbind.experiments.workers import Job, Worker, default_workers, train_all
from kvbind.train import TrainingStoppedError, latest_checkpoint
from kvbind.train.config import to_plain
from kvbind.train.metrics import read_metrics

SMALL = [
    "model.fields.hidden_size=16", "model.fields.num_hidden_layers=1", "model.fields.num_attn_heads=2",
    "model.fields.num_lact_heads=1", "model.fields.window_size=8", "model.fields.intermediate_size=16",
    "model.inner.chunk=8", "data.length=32", "data.batch=2", "data.window=8", "data.evaluation_samples=2",
    "train.warmup=1", "train.device=cpu", "train.checkpoint_every=1",
]  # fmt: skip


@pytest.fixture
def job(tmp_path):
    (tmp_path / "book.txt").write_text("it was the best of times, it was the worst of times. " * 60)

    def make(name, *edits):
        config = configuration(
            "language", "smoke", 0, [*SMALL, f"data.source={tmp_path / 'book.txt'}", "train.steps=4", *edits]
        )
        return Job("language", config, tmp_path / name / run_name("language", config), name)

    return make


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def test_runs_side_by_side_come_out_as_one_after_another(job):
    rates = [f"train.learning_rate={1e-3 * i}" for i in (1, 2, 3)]
    order = []
    together = train_all([job("a", rate) for rate in rates], 2, None, lambda job, run: order.append(run.folder))
    alone = train_all([job("b", rate) for rate in rates], 1, None, lambda job, run: None)
    assert [losses(run.folder) for run in together] == [losses(run.folder) for run in alone]
    assert [run.result["held_out"] for run in together] == [run.result["held_out"] for run in alone]
    assert sorted(order) == sorted(run.folder for run in together)
    assert not any(run.reused for run in together)
    assert all(run.result["machine"]["threads"] == 1 for run in together)
    twice = train_all([job("a", rates[0])] * 2 + [job("a", rates[1])], 2, None, lambda job, run: None)
    assert [run.folder for run in twice] == [together[i].folder for i in (0, 0, 1)]
    again = train_all([job("a", rate) for rate in rates], 2, None, lambda job, run: None)
    assert all(run.reused for run in again)
    assert [run.result for run in again] == [run.result for run in together]


def test_the_trouble_of_a_run_is_raised_here_and_the_others_end(job, monkeypatch):
    crew = []

    class Watched(Worker):
        def __init__(self):
            super().__init__()
            crew.append(self)

    monkeypatch.setattr(workers, "Worker", Watched)
    bad = job("bad", "train.clip=1e-30", "train.max_skipped=1")
    bad.folder.mkdir(parents=True)
    (bad.folder / "config.yaml").write_text("# kvbind train language\nseed: 7\n")
    started = time.monotonic()
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train_all([bad, job("long", "train.steps=100000")], 2, None, lambda job, run: None)
    assert time.monotonic() - started < 60
    assert all(worker.process.poll() is not None for worker in crew)


def test_a_worker_that_dies_is_noticed(job):
    worker = Worker()

    def kill(step, note):
        worker.process.kill()

    with pytest.raises(RuntimeError, match=r"the process that trained mine ended with code -9"):
        worker.train(job("mine", "train.steps=100000"), kill)
    worker.stop()


def test_a_worker_ends_when_its_parent_has(job):
    mine = job("mine", "train.steps=1000000", "train.checkpoint_every=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbind.experiments.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps({"task": "language", "config": to_plain(mine.config), "folder": str(mine.folder)}) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["step"] == 1
    process.stdout.close()  # as it is when nobody is there any more
    assert process.wait(timeout=60) == 0
    process.stdin.close()
    assert latest_checkpoint(mine.folder) is None


@pytest.mark.parametrize(
    ("kind", "raised"), [("stopped", TrainingStoppedError), ("value", ValueError), ("memory", torch.OutOfMemoryError)]
)
def test_what_a_run_raises_is_raised_here(job, kind, raised):
    message = json.dumps({"error": "stopped at step 3", "kind": kind})
    worker = Worker.__new__(Worker)
    worker.process = subprocess.Popen(
        [sys.executable, "-c", f"print({message!r})"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(raised, match="stopped at step 3"):
        worker.train(job("mine"), lambda step, note: None)
    worker.stop()


def test_a_gpu_trains_one_run_at_a_time():
    assert default_workers(torch.device("cuda")) == 1
    assert 1 <= default_workers(torch.device("cpu")) <= workers.MOST_WORKERS
