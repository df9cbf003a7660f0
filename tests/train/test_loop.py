import contextlib
import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy import Toy, config, make_model

from kvbind.train import TrainingStoppedError, latest_checkpoint, optimizer, step, train
from kvbind.train.loop import evaluate
from kvbind.train.metrics import read_metrics
from kvbind.train.optimizer import learning_rate, make_optimizer
from kvbind.train.ranks import WHOLE
from kvbind.train.step import TrainingStep


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def held_out(folder):
    return [(row["step"], row["held_out/error"]) for row in read_metrics(folder) if "held_out/error" in row]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_lowers_the_held_out_error(tmp_path):
    done = train(make_model(), Toy(), config(steps=200), tmp_path)
    (_, first), (step, last) = held_out(tmp_path)
    assert step == 200
    assert last < 0.5 * first
    assert done.held_out == {"error": last}
    assert done.units == 200 * 8


@pytest.mark.parametrize("stop", [1, 7, 13, 19])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, stop):
    whole = make_model()
    train(whole, Toy(), config(evaluate_every=5), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), Toy({stop: KeyboardInterrupt()}), config(evaluate_every=5), tmp_path / "parts")
    torch.manual_seed(99)  # whatever another process starts with
    rest = make_model()
    train(rest, Toy(), config(evaluate_every=5), tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert held_out(tmp_path / "parts") == held_out(tmp_path / "whole")
    assert torch.equal(weights(rest), weights(whole))


def test_a_finished_run_is_not_trained_again(tmp_path):
    done = train(make_model(), Toy(), config(), tmp_path)
    again = train(make_model(), Toy({20: AssertionError("no further batch may be asked for")}), config(), tmp_path)
    assert again == done


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, factor):
    model = make_model()
    done = train(model, Toy({2: factor, 3: factor, 9: factor}), config(max_skipped=3), tmp_path)
    assert (done.step, done.skipped, done.skipped_in_a_row, done.units) == (20, 3, 0, 17 * 8)
    assert [step for step, loss in losses(tmp_path) if loss is None] == [3, 4, 10]
    assert weights(model).isfinite().all()


def test_weights_stay_as_they_are_through_skipped_steps(tmp_path):
    model, before = make_model(), weights(make_model())
    train(model, Toy(dict.fromkeys(range(4), math.nan)), config(steps=4), tmp_path)
    assert torch.equal(weights(model), before)


def test_running_statistics_stay_as_they_are_through_skipped_steps(tmp_path):
    class Spoilt(Toy):
        def loss(self, model, batch):
            return super().loss(model, batch | {"x": batch["x"] * self.faults.get(batch["number"], 1.0)})

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    done = train(model, Spoilt({2: math.nan}), config(steps=4, ema=0.5), tmp_path)
    assert done.skipped == 1
    assert math.isfinite(done.held_out["error"])
    assert latest_checkpoint(tmp_path)["trained"]["1.num_batches_tracked"] == 3


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(TrainingStoppedError, match=r"stopped at step 7: .* 3 steps in a row"):
        train(make_model(), Toy(dict.fromkeys(range(4, 20), math.nan)), config(max_skipped=3), tmp_path)


def test_accumulated_batches_make_the_step_of_their_mean(tmp_path):
    class Eval(Toy):
        def loss(self, model, batch):
            model.eval()  # dropout would draw differently
            return super().loss(model, batch)

    class Joined(Eval):
        def batches(self, position, share=WHOLE):
            for i in range(0, 10**6, 2):
                parts = [torch.randn(8, 4, generator=torch.Generator().manual_seed(j)) for j in (i, i + 1)]
                yield {"x": torch.cat(parts), "number": i}, {"next": i}

    apart, joined = make_model(), make_model()
    train(apart, Eval(), config(accumulate=2, steps=5), tmp_path / "a")
    train(joined, Joined(), config(steps=5), tmp_path / "b")
    torch.testing.assert_close(weights(apart), weights(joined))


def test_gradients_are_clipped_to_the_norm(tmp_path):
    seen = []

    def look(optimizer, *_):
        seen.append(float(torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm()))

    model = make_model()
    hook = register_optimizer_step_pre_hook(look)
    try:
        train(model, Toy(dict.fromkeys(range(20), 1000.0)), config(clip=0.5), tmp_path)
    finally:
        hook.remove()
    assert len(seen) == 20
    assert max(seen) < 0.5001
    assert min(row["gradient_norm"] for row in read_metrics(tmp_path) if "loss" in row) > 0.5


def test_only_matrices_decay():
    model = make_model()
    groups = make_optimizer(model, config(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0.3} == {"0.weight", "4.weight"}


def test_the_rate_warms_up_linearly_and_falls_by_a_cosine():
    schedule = config(steps=110, warmup=10, learning_rate=2.0, final=0.1)
    rates = [learning_rate(schedule, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_matrix_products_run_in_the_configured_precision(tmp_path, precision, dtype):
    seen = set()

    class Watching(Toy):
        def loss(self, model, batch):
            seen.add(model[0](batch["x"]).dtype)
            return super().loss(model, batch)

    model = make_model()
    train(model, Watching(), config(precision=precision, steps=2), tmp_path)
    assert seen == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_evaluation_leaves_random_numbers_and_training_mode_alone():
    model, device = make_model().train(), torch.device("cpu")
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    evaluate(model, Toy(), config(), device)
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert isinstance(model[3], nn.Dropout)


def test_checkpoints_by_time_come_without_checkpoints_by_steps(tmp_path):
    train(make_model(), Toy(pause=0.01), config(steps=6, checkpoint_every=0, checkpoint_minutes=1e-6, keep=10), tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [f"step-{i:08d}" for i in range(1, 7)]


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_model(), Toy(), config(steps=3, tensorboard=True), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]


def test_an_unknown_device_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\.device must be .* got 'gpuu'"):
        train(make_model(), Toy(), config(device="gpuu"), tmp_path)


class Straight(Toy):
    """A loss whose gradient is one everywhere, so that steps say nothing but their rate."""

    def loss(self, model, batch):
        return self.faults.get(batch["number"], 1.0) * sum(p.sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("edits", "skipped"),
    [
        ({"learning_rate": 1e20, "weight_decay": 0.0}, 0),
        ({"learning_rate": 1e20}, 17),
        ({"learning_rate": 3e38}, 20),
    ],
)
def test_a_step_that_would_leave_weights_that_are_not_finite_changes_nothing_and_is_counted(tmp_path, edits, skipped):
    model = make_model()
    done = train(model, Straight(), config(warmup=0, final=1.0, max_skipped=100, **edits), tmp_path)
    assert done.step == 20
    assert weights(model).isfinite().all()
    assert done.skipped >= skipped
    assert (done.skipped > 0) == (skipped > 0)
    assert sum(loss is None for _, loss in losses(tmp_path)) == done.skipped
    saved = latest_checkpoint(tmp_path)
    assert all(x.isfinite().all() for part in ("model", "optimizer") for x in saved.get(part, {}).values())


def test_averages_of_squared_gradients_that_are_not_finite_are_not_kept(tmp_path):
    model, before = make_model(), weights(make_model())
    done = train(model, Straight({1: 1e25, 2: 1e25}), config(clip=1e30, steps=3), tmp_path)
    assert done.skipped == 2
    assert not torch.equal(weights(model), before)
    assert all(x.isfinite().all() for x in latest_checkpoint(tmp_path)["optimizer"].values())


def test_a_skipped_first_step_leaves_an_optimizer_without_state(tmp_path):
    skipped, plain = make_model(), make_model()
    train(skipped, Straight({0: 1e25}), config(clip=1e30, steps=2, warmup=0, final=1.0), tmp_path / "a")
    train(plain, Straight(), config(clip=1e30, steps=1, warmup=0), tmp_path / "b")
    assert torch.equal(weights(skipped), weights(plain))


def test_steps_that_are_looked_at_are_those_that_are_not(tmp_path, monkeypatch):
    plain = make_model()
    train(plain, Toy(), config(), tmp_path / "plain")
    monkeypatch.setattr(optimizer, "MARGIN", 1e39)
    looked = make_model()
    train(looked, Toy(), config(), tmp_path / "looked")
    assert torch.equal(weights(looked), weights(plain))


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.3), (0.0, 0.9), (0.95, 0.96)])
def test_no_step_of_adam_is_longer_than_its_bound(betas):
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        p = nn.Parameter(torch.zeros(1, 1))
        how = config(betas=betas, weight_decay=0.0)
        adam = make_optimizer(nn.ParameterDict({"p": p}), how)
        guarded = optimizer.GuardedStep(adam, how)
        for _ in range(60):
            p.grad = torch.randn(1, 1, generator=generator) * 10 ** (4 * torch.rand(1, generator=generator))
            p.grad = p.grad.abs() if trial % 2 else p.grad
            before = p.item()
            assert guarded(1e-2, 1.0)
            assert abs(p.item() - before) <= 1e-2 * guarded.ratio * 1.001
            assert abs(p.item()) <= guarded.bound * 1.001


def test_weights_that_are_not_finite_from_the_start_end_a_run_in_a_line(tmp_path):
    model = make_model()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(TrainingStoppedError, match="new weights not finite in 3 steps in a row"):
        train(model, Toy(), config(max_skipped=3), tmp_path)


class Watched(nn.Sequential):
    """A model that notes in each backward pass whether autograd may hand it to threads of its own."""

    def __init__(self):
        super().__init__(*make_model())
        self.threads = []
        self[0].weight.register_hook(lambda _: self.threads.append(torch._C._is_multithreading_enabled()))


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({}, {False}),
        ({"accumulate": 2, "ema": 0.9}, {False}),
        ({"activation_checkpointing": "block"}, {False}),
        ({"activation_checkpointing": "offload"}, {True}),
        ({"graphs": "on"}, {True}),
    ],
)
def test_eager_gradients_of_one_process_are_found_in_its_own_thread_and_are_the_same(tmp_path, monkeypatch, edits, expected):
    edits = {"graphs": "off", "evaluate_every": 5} | edits
    model = Watched()
    train(model, Toy(), config(**edits), tmp_path / "one")
    # until an optimizer has its state, no step is replayed
    assert set(model.threads[2 if "on" in edits.values() else 0 :]) == expected
    assert torch._C._is_multithreading_enabled()
    monkeypatch.setattr(TrainingStep, "_in_one_thread", lambda self: contextlib.nullcontext())
    other = Watched()
    train(other, Toy(), config(**edits), tmp_path / "many")
    assert set(other.threads) == {True}
    assert losses(tmp_path / "one") == losses(tmp_path / "many")
    assert held_out(tmp_path / "one") == held_out(tmp_path / "many")
    assert torch.equal(weights(model), weights(other))


def test_several_processes_keep_autograds_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "ranks", lambda: 2)
    model = Watched()
    train(model, Toy(), config(steps=3), tmp_path)
    assert set(model.threads) == {True}


def test_a_backward_pass_that_fails_leaves_autograds_threads_as_they_were(tmp_path):
    def fail(_):
        raise RuntimeError("no gradient")

    model = make_model()
    model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="no gradient"):
        train(model, Toy(), config(), tmp_path)
    assert torch._C._is_multithreading_enabled()
