import os
import signal
import threading

import pytest
import torch
from toy import Toy, config, make_model

from kvbind.train import latest_checkpoint, train
from kvbind.train.bars import RESUMED
from kvbind.train.interrupt import noted_interrupts
from kvbind.train.loop import EndedEarlyError
from kvbind.train.metrics import read_metrics


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def asked_behind(step):
    """A watch, and a `stop` that says yes once the watch has seen a step."""
    seen = [0]
    return (lambda now, note: seen.__setitem__(0, now)), (lambda: seen[0] >= step)


@pytest.mark.parametrize("step", [1, 6])
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_and_goes_on_bit_for_bit(tmp_path, step, graphs):
    how = config(checkpoint_every=0, graphs=graphs)
    whole, rest = make_model(), make_model()
    train(whole, Toy(), how, tmp_path / "whole")
    watch, stop = asked_behind(step)
    with pytest.raises(EndedEarlyError, match=rf"stopped after step {step} of 20"):
        train(make_model(), Toy(), how, tmp_path / "parts", watch, stop=stop)
    assert latest_checkpoint(tmp_path / "parts")["done"]["step"] == step
    seen = []
    train(rest, Toy(), how, tmp_path / "parts", lambda now, note: seen.append((now, note)))
    assert seen[0] == (step, RESUMED)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_a_run_that_is_asked_to_end_behind_its_last_step_is_finished(tmp_path):
    watch, stop = asked_behind(20)
    done = train(make_model(), Toy(), config(), tmp_path, watch, stop=stop)
    assert done.step == 20


def test_a_longer_run_goes_on_where_the_shorter_one_ended_and_says_so(tmp_path):
    first = train(make_model(), Toy(), config(steps=8), tmp_path)
    before = losses(tmp_path)
    done = train(make_model(), Toy(), config(steps=12), tmp_path)
    assert first.lengths == [[0, 8]]
    assert (done.step, done.lengths) == (12, [[0, 8], [8, 12]])
    assert losses(tmp_path)[:8] == before
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_next_does_what_it_always_does(number, capfd):
    usual = signal.getsignal(number)
    with noted_interrupts() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
        assert signal.getsignal(number) == usual
    assert signal.getsignal(number) == usual
    assert "a second signal ends at once" in capfd.readouterr().err


def test_a_signal_is_noted_where_nobody_listens(monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    with noted_interrupts() as interrupted, monkeypatch.context() as patch:
        interrupted()
        patch.setattr(os, "write", closed)
        signal.raise_signal(signal.SIGINT)
        assert interrupted()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)])
def test_a_run_that_nobody_hears_of_leaves_a_checkpoint_and_ends(error, tmp_path):
    def watch(step, note):
        if step == 3:
            raise error

    with pytest.raises(type(error)):
        train(make_model(), Toy(), config(checkpoint_every=0), tmp_path, watch)
    assert latest_checkpoint(tmp_path)["done"]["step"] == 3
    assert train(make_model(), Toy(), config(checkpoint_every=0), tmp_path).step == 20


def test_ctrl_c_before_anybody_asks_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once():
    with noted_interrupts() as interrupted:
        interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_of_others_are_left_to_them():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with noted_interrupts() as interrupted:
            interrupted()
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_of_the_main_thread_nothing_is_noted():
    answers = []

    def work():
        with noted_interrupts() as interrupted:
            answers.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
