import pytest
import torch
from torch import nn
from toy import Toy, config, make_model

from kvbind.train import TrainConfig, latest_checkpoint, train
from kvbind.train.average import Average
from kvbind.train.metrics import read_metrics

DECAY = 0.8


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained_weights(folder, steps):
    """The weights after each step of the same run without an average."""
    after = []
    for step in range(1, steps + 1):
        model = make_model()
        # the rate's schedule is that of the whole run: stop by an exception, and look at the last checkpoint
        with pytest.raises(KeyboardInterrupt):
            train(model, Toy({step: KeyboardInterrupt()}), config(steps=steps + 1, checkpoint_every=1), folder / str(step))
        after.append(weights(model))
    return after


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step(tmp_path):
    steps = 5
    expected, *later = trained_weights(tmp_path / "plain", steps + 1)[:steps]
    for after in later:
        expected = DECAY * expected + (1 - DECAY) * after
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        train(model, Toy({5: KeyboardInterrupt()}), config(steps=7, ema=DECAY, checkpoint_every=1), tmp_path / "ema")
    saved = latest_checkpoint(tmp_path / "ema")
    named = dict(make_model().named_parameters())
    torch.testing.assert_close(torch.cat([saved["model"][name].flatten() for name in named]), expected)
    torch.testing.assert_close(torch.cat([saved["trained"][name].flatten() for name in named]), later[-1])


def test_the_average_is_evaluated_and_left_in_the_model(tmp_path):
    task = Toy()
    model = make_model()
    done = train(model, task, config(ema=DECAY), tmp_path / "ema")
    plain = make_model()
    train(plain, Toy(), config(), tmp_path / "plain")
    assert not torch.equal(weights(model), weights(plain))
    model.eval()
    with torch.no_grad():
        assert done.held_out == task.evaluate(model)
    # what is trained does not depend on it
    rows = [[row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("ema", "plain")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("stop", [1, 7, 13, 19])
def test_an_interrupted_run_with_an_average_goes_on_bit_for_bit(tmp_path, stop):
    settings = config(ema=DECAY, evaluate_every=5)
    whole = make_model()
    train(whole, Toy(), settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), Toy({stop: KeyboardInterrupt()}), settings, tmp_path / "parts")
    torch.manual_seed(99)  # whatever another process starts with
    rest = make_model()
    train(rest, Toy(), settings, tmp_path / "parts")
    drop = {"seconds", "rows_per_second", "data_wait"}
    lines = [
        [{name: x for name, x in row.items() if name not in drop} for row in read_metrics(tmp_path / part)]
        for part in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert torch.equal(weights(rest), weights(whole))


def test_a_finished_run_gives_the_average_again(tmp_path):
    model, again = make_model(), make_model()
    train(model, Toy(), config(ema=DECAY), tmp_path)
    train(again, Toy(), config(ema=DECAY), tmp_path)
    assert torch.equal(weights(again), weights(model))


def test_skipped_steps_do_not_enter_the_average(tmp_path):
    faults = {2: float("nan"), 3: float("nan")}
    train(make_model(), Toy(faults), config(steps=6, ema=DECAY), tmp_path)
    saved = latest_checkpoint(tmp_path)
    assert saved["averaged"] == 4
    assert all(x.isfinite().all() for x in saved["model"].values())


def test_buffers_are_averaged_with_the_weights():
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.5)
    means = []
    for mean in (1.0, 3.0, 7.0):
        model.running_mean.fill_(mean)
        average.update(model)
        means.append(average.module.running_mean[0].item())
    assert means == [1.0, 2.0, 4.5]


@pytest.mark.parametrize("ema", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(ema):
    with pytest.raises(ValueError, match=r"train\.ema must be at least 0 and below 1"):
        TrainConfig(ema=ema)


def test_without_an_average_the_checkpoint_holds_the_weights_once(tmp_path):
    train(make_model(), Toy(), config(), tmp_path)
    assert latest_checkpoint(tmp_path).keys() == {"model", "optimizer", "random", "done"}
