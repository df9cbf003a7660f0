import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvbind.experiments.training import jobs, runs, workers
from kvbind.experiments.training.jobs import TrainingJob, WorkerKilledError, default_workers, visible_gpus
from kvbind.experiments.training.plans import configuration
from kvbind.experiments.training.runs import OutOfTimeError, Run, run_name, train_run
from kvbind.experiments.training.worker_process import Worker
from kvbind.experiments.training.workers import train_all
from kvbind.train import TrainingStoppedError, latest_checkpoint
from kvbind.train.bars import BEFORE
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
        return TrainingJob("language", config, tmp_path / name / run_name("language", config), name)

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
        def __init__(self, *args):
            super().__init__(*args)
            crew.append(self)

    monkeypatch.setattr(workers, "Worker", Watched)
    bad = job("bad", "train.clip=1e-30", "train.max_skipped=1")
    bad.folder.mkdir(parents=True)
    (bad.folder / "config.yaml").write_text("# kvbind train language\nseed: 7\n")
    long = job("long", "train.steps=100000")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train_all([bad, long], 2, None, lambda job, run: None)
    assert not long.finished
    assert all(worker.process.poll() is not None for worker in crew)


def test_a_worker_that_is_ended_leaves_a_checkpoint(job):
    worker, mine = Worker(), job("mine", "train.steps=100000", "train.checkpoint_every=0", "train.checkpoint_minutes=0")

    def end(step, note):
        if step == 3:
            worker.end()

    with pytest.raises(OutOfTimeError, match=r"was stopped after step .* with a checkpoint"):
        worker.train(mine, end)
    worker.process.wait()
    assert latest_checkpoint(mine.folder)["done"]["step"] >= 3


def test_a_worker_that_dies_is_noticed(job):
    worker = Worker()

    def kill(step, note):
        worker.process.kill()

    with pytest.raises(WorkerKilledError, match=rf"trained mine \({worker.process.pid}\) was killed by SIGKILL"):
        worker.train(job("mine", "train.steps=100000"), kill)
    worker.stop()


def test_a_worker_ends_when_its_parent_has(job):
    mine = job("mine", "train.steps=1000000", "train.checkpoint_every=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbind.experiments.training.worker_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(json.dumps({"task": "language", "config": to_plain(mine.config), "folder": str(mine.folder)}) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["step"] == 1
    process.stdout.close()  # as it is when nobody is there any more
    assert process.wait() == 0
    process.stdin.close()
    # nobody hears of its steps, which are not lost
    found = latest_checkpoint(mine.folder)
    assert found is not None
    assert not mine.finished


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


def test_a_gpu_trains_one_run_at_a_time(monkeypatch):
    assert default_workers(torch.device("cuda")) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert default_workers(torch.device("cuda")) == 3
    assert default_workers(torch.device("cuda:1")) == 1
    assert 1 <= default_workers(torch.device("cpu")) <= jobs.MOST_WORKERS


def test_gpus_are_called_what_the_environment_calls_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(jobs.VISIBLE, "5, GPU-abc")
    assert visible_gpus() == ["5", "GPU-abc"]
    monkeypatch.delenv(jobs.VISIBLE)
    assert visible_gpus() == ["0", "1"]


def test_a_run_that_is_out_of_time_leaves_a_checkpoint_and_goes_on_as_if_it_had_not_been(job, monkeypatch):
    whole, parts = job("whole", "train.checkpoint_every=0"), job("parts", "train.checkpoint_every=0")
    train_run("language", whole.config, whole.folder)
    steps, clock = [], [0.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(step, note):
        steps.append(step)
        clock[0] += 300.0

    with pytest.raises(OutOfTimeError, match="stopped after step 1 of 4, with a checkpoint"):
        train_run("language", parts.config, parts.folder, slow, 200.0)
    assert steps == [1]
    assert sorted(path.name for path in (parts.folder / "checkpoints").iterdir()) == ["step-00000001"]
    assert not parts.finished
    with pytest.raises(OutOfTimeError, match="not finished in time"):
        train_run("language", parts.config, parts.folder, slow, 300.0)
    assert train_run("language", parts.config, parts.folder, None, 600.0).result["steps"] == 4
    assert losses(parts.folder) == losses(whole.folder)


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_begun_behind_the_deadline_and_what_is_finished_is_read(job, count):
    done, never = job("a"), job("b", "train.learning_rate=0.5")
    train_run("language", done.config, done.folder)
    told = []
    found = train_all([never, done], count, None, lambda job, run: told.append(job.title), deadline=time.monotonic())
    assert found[0] is None
    assert found[1].reused
    assert told == ["a"]
    assert not never.folder.exists()


def test_a_job_is_to_begin_anew_until_it_has_taken_a_step(job):
    told = []
    begun = workers.Begun(replace(job("x"), fresh=True), lambda step, note: told.append((step, note)))
    begun(0, f"{BEFORE}making it")
    assert begun.job.fresh
    begun(1, "loss 1")
    assert not begun.job.fresh
    assert told == [(0, f"{BEFORE}making it"), (1, "loss 1")]


def test_the_time_of_a_run_says_what_it_is_of(tmp_path):
    result = {"training_seconds": 7.4}
    assert Run(tmp_path, result, reused=False).time_note == "7.4 s of training alone"
    assert Run(tmp_path, result, reused=True).time_note == "finished earlier"


def test_a_run_that_fails_does_not_end_the_others_where_somebody_takes_its_error(job):
    bad, good = job("bad"), job("good")
    bad.folder.mkdir(parents=True)
    (bad.folder / "config.yaml").write_text("# kvbind train language\nseed: 7\n")
    failed = []
    found = train_all([bad, good], 2, None, lambda job, run: None, failed=lambda job, error: failed.append((job, error)))
    assert found[0] is None
    assert found[1].result["steps"] == 4
    ((failing, error),) = failed
    assert failing is bad
    assert "another configuration" in str(error)


@pytest.fixture
def crew(monkeypatch):
    """Workers that train nothing: which job each GPU had, and whether another was at work there."""
    log, busy = [], {}

    class Pretending:
        def __init__(self, gpu):
            self.gpu = gpu
            self.process = type("Process", (), {"poll": lambda self: None})()

        def train(self, job, watch, deadline):
            busy.setdefault(self.gpu, set()).add(job.title)
            time.sleep(0.05)
            log.append((self.gpu, job.title, len(busy[self.gpu])))
            busy[self.gpu].remove(job.title)

        def end(self):
            pass

        def wait(self, until):
            pass

        def stop(self):
            pass

    monkeypatch.setattr(workers, "Worker", Pretending)
    monkeypatch.setattr(workers, "train_run", lambda task, config, folder: Run(folder, {}, reused=False))
    return log


def pretended(job, titles, alone=()):
    one = job("x", "train.device=auto")
    return [replace(one, folder=one.folder / title, title=title, alone=title in alone) for title in titles]


def test_processes_are_spread_over_all_gpus(job, crew, monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1"])
    train_all(pretended(job, "abcd"), 4, None, lambda job, run: None)
    assert sorted(gpu for gpu, _, _ in crew) == ["0", "0", "1", "1"]


@pytest.mark.parametrize("gpus", [["0", "1"], ["0"]])
def test_a_job_whose_speed_counts_has_its_gpu_to_itself(job, crew, monkeypatch, gpus):
    monkeypatch.setattr(workers, "visible_gpus", lambda: gpus)
    found = train_all(pretended(job, "abcdefgh12", alone="12"), 6, None, lambda job, run: None)
    assert all(found)
    alone = [entry for entry in crew if entry[1] in "12"]
    assert [(gpu, beside) for gpu, _, beside in alone] == [(gpus[-1], 1)] * 2
    assert [title for _, title, _ in alone] == ["1", "2"]
    on_that_gpu = [title for gpu, title, _ in crew if gpu == gpus[-1]]
    # first, where others have somewhere else to be; else last
    assert (on_that_gpu[:2] if len(gpus) > 1 else on_that_gpu[-2:]) == ["1", "2"]
