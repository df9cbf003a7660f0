"""Replayed steps on the CPU, where nothing is captured: the same buffers, order of work and decisions as on a GPU."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from toy import Toy, config, make_model

from kvbind.train import GraphedStep, TrainingStoppedError, graphs, latest_checkpoint, step, train
from kvbind.train.average import Average
from kvbind.train.config import TrainConfig, read_config, what_matters
from kvbind.train.metrics import read_metrics
from kvbind.train.ranks import WHOLE
from kvbind.train.step import replays_wanted
from tape import capture

CPU = torch.device("cpu")


class Tensors(Toy):
    """A `Toy` whose batches are tensors, the factor on the loss among them; `sizes` gives their rows, in turns."""

    def __init__(self, faults=None, sizes=(8,), raises=None):
        super().__init__(faults)
        self.sizes, self.raises = sizes, raises

    def batches(self, position, share=WHOLE):
        for batch, behind in super().batches(position, share):
            number = batch["number"]
            if number == self.raises:
                raise KeyboardInterrupt
            factor = torch.tensor(self.faults.get(number, 1.0))
            yield {"x": batch["x"][: self.sizes[number % len(self.sizes)]], "factor": factor}, behind

    def loss(self, model, batch):
        return batch["factor"] * (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()


class Weighted(Tensors):
    def weight(self, batch):
        return 0.3 + float(batch["x"][0, 0].abs())


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def rows(folder):
    timed = {"seconds", "data_wait", "rows_per_second"}
    return [{name: x for name, x in row.items() if name not in timed} for row in read_metrics(folder)]


def state(folder):
    saved = latest_checkpoint(folder)
    return {f"{part}.{name}": x for part in ("model", "optimizer", "trained") for name, x in saved.get(part, {}).items()}


def assert_same(a, b):
    assert rows(a) == rows(b)
    one, other = state(a), state(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [make_model, normed])
@pytest.mark.parametrize(
    ("task", "edits"),
    [
        (Tensors, {}),
        (Tensors, {"accumulate": 2, "clip": 0.1}),
        (Weighted, {"accumulate": 3, "ema": 0.9}),
        (Weighted, {"ema": 0.5, "activation_checkpointing": "block"}),
        (Tensors, {"precision": "bfloat16"}),
    ],
)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(tmp_path, make, task, edits):
    faults = {0: math.nan, 20: math.nan, 21: math.inf}
    for how in ("off", "on"):
        done = train(
            make(), task(faults), config(graphs=how, steps=30, evaluate_every=7, checkpoint_every=0, **edits), tmp_path / how
        )
        assert done.skipped >= 2
    assert_same(tmp_path / "off", tmp_path / "on")


@pytest.mark.parametrize(
    ("make", "edits"),
    [
        (make_model, {"clip": 0.1}),
        (normed, {"accumulate": 3, "ema": 0.9}),
        (normed, {"ema": 0.5}),
        (make_model, {"activation_checkpointing": "block", "accumulate": 2}),
    ],
)
def test_what_is_written_down_once_does_for_all_steps(tmp_path, monkeypatch, make, edits):
    monkeypatch.setattr(graphs.Replays, "_capture", capture)
    faults = {11: math.nan, 20: math.nan, 21: math.inf}
    for how in ("off", "on"):
        train(make(), Weighted(faults), config(graphs=how, evaluate_every=7, **edits), tmp_path / how)
    assert_same(tmp_path / "off", tmp_path / "on")


def test_nothing_is_read_within_a_step(tmp_path, monkeypatch, caplog):
    class Reads(Tensors):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            loss.item()
            return loss

    monkeypatch.setattr(graphs.Replays, "_capture", capture)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        train(make_model(), Reads(), config(graphs="on"), tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("first", "then"), [("off", "on"), ("on", "off"), ("on", "on")])
def test_a_run_goes_on_from_the_checkpoints_of_the_other_kind(tmp_path, first, then, accumulate):
    edits = {"evaluate_every": 5, "ema": 0.9, "accumulate": accumulate}
    train(make_model(), Tensors({17: math.nan}), config(graphs="off", **edits), tmp_path / "whole")
    broken = Tensors({17: math.nan}, raises=13 * accumulate)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), broken, config(graphs=first, **edits), tmp_path / "parts")
    torch.manual_seed(99)  # whatever another process starts with
    train(make_model(), Tensors({17: math.nan}), config(graphs=then, **edits), tmp_path / "parts")
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_shapes_beyond_a_few_run_as_they_are_and_that_is_said_once(tmp_path, caplog):
    for how in ("off", "on"):
        train(make_model(), Tensors(sizes=(1, 2, 3, 4, 5, 6)), config(graphs=how), tmp_path / how)
    assert_same(tmp_path / "off", tmp_path / "on")
    (said,) = [x.getMessage() for x in caplog.records if "CUDA graphs" in x.getMessage()]
    assert said == "training steps are not replayed as CUDA graphs, or not all of them: batches have more than 4 shapes"


def test_a_step_that_cannot_be_captured_runs_as_it_is(tmp_path, monkeypatch):
    def fails(self, shape):
        self.broken = "an operation is not permitted when stream is capturing"

    monkeypatch.setattr(graphs.Replays, "_capture", fails)
    for how in ("off", "on"):
        train(make_model(), Tensors(), config(graphs=how, accumulate=2), tmp_path / how)
    assert_same(tmp_path / "off", tmp_path / "on")


def test_steps_that_may_leave_weights_that_are_not_finite_are_looked_at_by_the_host(tmp_path):
    edits = {"learning_rate": 1e36, "warmup": 0, "max_skipped": 100, "checkpoint_every": 0}
    for how in ("off", "on"):
        done = train(make_model(), Tensors(), config(graphs=how, **edits), tmp_path / how)
        assert done.skipped
    assert rows(tmp_path / "off") == rows(tmp_path / "on")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eager_steps_between_replayed_ones_change_nothing(tmp_path, monkeypatch, accumulate):
    plain, asked = step.Replayed.possible, []

    def possible(self, rate):
        asked.append(rate)
        return plain(self, rate) and len(asked) % 4 > 1

    monkeypatch.setattr(step.Replayed, "possible", possible)
    for how in ("off", "on"):
        train(make_model(), Tensors({9: math.nan}), config(graphs=how, accumulate=accumulate), tmp_path / how)
    assert_same(tmp_path / "off", tmp_path / "on")


def test_replayed_steps_that_are_not_finite_end_a_run_where_eager_ones_do(tmp_path):
    with pytest.raises(TrainingStoppedError, match=r"stopped at step 7: .* 3 steps in a row"):
        train(make_model(), Tensors(dict.fromkeys(range(4, 20), math.nan)), config(graphs="on", max_skipped=3), tmp_path)


class Hungry(Tensors):
    """Its third evaluation does not fit beside captured steps."""

    def __init__(self, failures):
        super().__init__()
        self.failures, self.evaluations = failures, 0

    def evaluate(self, model, share=WHOLE):
        self.evaluations += 1
        if 3 <= self.evaluations < 3 + self.failures:
            raise torch.OutOfMemoryError("no room")
        return super().evaluate(model, share)


def test_captured_steps_give_up_their_memory_for_an_evaluation(tmp_path, monkeypatch):
    captures = []
    plain = graphs.Replays._capture
    monkeypatch.setattr(graphs.Replays, "_capture", lambda self, shape: captures.append(1) or plain(self, shape))
    fields = {"graphs": "on", "evaluate_every": 5}
    train(make_model(), Tensors(), config(**fields), tmp_path / "roomy")
    once = len(captures)
    train(make_model(), Hungry(1), config(**fields), tmp_path / "once")
    assert len(captures) == 3 * once
    assert rows(tmp_path / "roomy") == rows(tmp_path / "once")
    with pytest.raises(torch.OutOfMemoryError):
        train(make_model(), Hungry(2), config(**fields), tmp_path / "never")
    with pytest.raises(torch.OutOfMemoryError):
        train(make_model(), Hungry(1), config(graphs="off", evaluate_every=5), tmp_path / "off")


def test_nothing_is_read_behind_the_last_step(tmp_path):
    train(make_model(), Tensors(raises=20), config(graphs="on"), tmp_path)


def test_a_batch_is_what_a_graph_depends_on():
    x = torch.zeros(2, 3)
    same = graphs.shape_of({"x": x, "y": x, "n": 3})
    assert same == graphs.shape_of({"x": (y := torch.ones(2, 3)), "y": y, "n": 3})
    others = [{"x": x, "y": x.clone(), "n": 3}, {"x": x, "y": x, "n": 4}, {"x": x.T.contiguous().T, "y": x, "n": 3},
              {"x": x.double(), "y": x, "n": 3}, {"x": x, "z": x, "n": 3}, {"x": x, "y": x, "n": 3.0}]  # fmt: skip
    assert all(graphs.shape_of(other) != same for other in others)
    assert graphs.shape_of({"x": x, "kept": {1}}) is None


def test_buffers_stay_where_they_are_and_are_shared_as_a_batch_shares_them():
    seen = []
    replays = graphs.Replays(
        lambda batch: seen.append((batch["x"].data_ptr(), batch["y"].data_ptr(), float(batch["x"]))), CPU
    )
    for i in range(5):
        x = torch.tensor(float(i))
        replays({"x": x, "y": x})
    assert len({pair[:2] for pair in seen}) == 1
    assert all(x == y for x, y, _ in seen)
    assert [number for *_, number in seen] == [0, 1, 2, 3, 4]
    assert replays.captured == 1


def test_what_a_cache_holds_is_found_alive_by_its_device():
    cached = functools.lru_cache(lambda n: torch.zeros(n))
    made = cached(3)
    assert any(x is made for x in graphs.alive(CPU))
    assert not graphs.alive(torch.device("meta"))


def test_an_average_moves_without_counting_and_counts_when_it_is_updated():
    model = make_model()
    average = Average(model, 0.5)
    average.move(model)
    assert average.updates == 0
    average.update(model)
    assert average.updates == 1


@pytest.mark.parametrize(("given", "how"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on")])
def test_graphs_are_read_from_yaml_as_they_are_written(tmp_path, given, how):
    (tmp_path / "a.yaml").write_text(f"graphs: {given}\n")
    assert read_config(TrainConfig, {}, str(tmp_path / "a.yaml")).graphs == how
    assert read_config(TrainConfig, {}, str(tmp_path / "a.yaml"), [f"graphs={given}"]).graphs == how


@dataclass
class Run:
    train: TrainConfig


def test_graphs_are_no_part_of_what_a_run_is():
    (matters,) = {str(what_matters(Run(TrainConfig(graphs=how)))) for how in ("on", "off", "auto")}
    assert "graphs" not in matters
    with pytest.raises(ValueError, match=r"train\.graphs must be one of .* got 'sometimes'"):
        TrainConfig(graphs="sometimes")


def test_without_a_gpu_steps_are_eager_unless_asked_for():
    assert not replays_wanted(config(), CPU)
    assert replays_wanted(config(graphs="on"), CPU)
    assert not replays_wanted(config(graphs="on", activation_checkpointing="offload"), CPU)


def plain_losses(model, batches, rates, clip):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    found = []
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = batch["factor"] * model(batch["x"]).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if loss.isfinite() and norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_a_graphed_step_is_a_plain_loops():
    one, other = make_model(), make_model()
    task = Tensors({5: math.nan}).batches(None)
    batches = [next(task)[0] for _ in range(12)]
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    take = GraphedStep(other, optimizer, lambda model, batch: batch["factor"] * model(batch["x"]).square().mean(), clip=0.1)
    torch.manual_seed(1)
    found, rates = [], []
    for batch in batches:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        found.append(take(batch).item())
        schedule.step()
    assert take.captured == 1
    torch.manual_seed(1)
    expected = plain_losses(one, batches, rates, 0.1)
    assert len(set(rates)) == 12
    assert found[:5] == pytest.approx(expected[:5], rel=1e-6)
    assert math.isnan(found[5])
    assert found[6:] == pytest.approx(expected[6:], rel=1e-5)


def test_a_graphed_step_needs_a_fused_optimizer():
    model = make_model()
    with pytest.raises(TypeError, match="optimizer must be a fused one"):
        GraphedStep(model, torch.optim.AdamW(model.parameters(), foreach=True), lambda model, x: model(x).mean())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")


@gpu
@pytest.mark.parametrize("edits", [{}, {"accumulate": 2}, {"ema": 0.9}, {"activation_checkpointing": "block"}])
def test_captured_steps_are_the_eager_ones(tmp_path, edits):
    for how in ("off", "on"):
        done = train(
            normed(), Tensors({7: math.nan}), config(graphs=how, device="cuda", evaluate_every=6, **edits), tmp_path / how
        )
        assert done.skipped == 1
    one, other = ([row["loss"] for row in rows(tmp_path / how) if "loss" in row] for how in ("off", "on"))
    assert [x is None for x in one] == [x is None for x in other]
    assert [x for x in other if x is not None] == pytest.approx([x for x in one if x is not None], rel=1e-4)


@gpu
def test_steps_go_on_where_a_capture_fails(tmp_path, caplog):
    class Reads(Tensors):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            loss.item()
            return loss

    for how, task in (("off", Tensors()), ("on", Reads())):
        train(make_model(), task, config(graphs=how, device="cuda"), tmp_path / how)
    one, other = ([row["loss"] for row in rows(tmp_path / how) if "loss" in row] for how in ("off", "on"))
    assert other == pytest.approx(one, rel=1e-4)
    assert sum("CUDA graphs" in x.getMessage() for x in caplog.records) == 1


@gpu
def test_a_captured_step_of_ones_own_loop_learns():
    model = make_model().cuda()
    take = GraphedStep(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        lambda model, batch: (model(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean(),
        autocast=torch.bfloat16,
    )
    task = Tensors().batches(None)
    found = [take(next(task)[0]) for _ in range(100)]
    assert take.captured == 1
    assert sum(found[-10:]) < sum(found[:10])
