import io
import re
from types import SimpleNamespace

from kvbind.screen import Screen
from kvbind.train import bars
from kvbind.train.bars import BEFORE, RESUMED, progress_bars


def written(seconds, calls, terminal=False, width=80, **options):
    screen = Screen(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with progress_bars(screen, seconds, **options) as add:
        watch = add("a run", 1000)
        for step, note in calls:
            watch(step, note)
    return screen.file.getvalue()


def test_without_a_terminal_there_is_a_line_at_the_first_step_at_intervals_and_at_the_last():
    steps = [(step, f"loss {step}") for step in (1, 2, 3, 1000)]
    every = written(0, steps).splitlines()
    assert [line.split("  ")[0] for line in every] == [f"a run: step {step} of 1,000" for step in ("1", "2", "3", "1,000")]
    assert [line.split("  ")[1] for line in every] == ["loss 1", "loss 2", "loss 3", "loss 1000"]
    assert "left" in every[1]
    assert "left" not in every[-1]
    assert [line.split("  ")[1] for line in written(3600, steps).splitlines()] == ["loss 1", "loss 1000"]


def test_a_run_that_goes_on_says_from_where():
    for terminal in (False, True):
        assert "a run: goes on from the checkpoint at step 400 of 1,000" in written(
            0, [(400, RESUMED), (401, "x")], terminal
        )


def test_what_is_done_before_the_first_step_is_said_at_intervals_and_counts_for_no_step(monkeypatch):
    calls = [(0, f"{BEFORE}making it, {done} done") for done in (1, 2)] + [(1, "loss 1"), (2, "loss 2"), (1000, "x")]
    every = written(0, calls).splitlines()
    assert every[:2] == [f"a run, before training: making it, {done} done" for done in (1, 2)]
    assert every[2] == "a run: step 1 of 1,000  loss 1"
    seldom = written(3600, calls).splitlines()
    assert [line.split(" of ")[0] for line in seldom] == [
        "a run, before training: making it, 1 done", "a run: step 1", "a run: step 1,000"
    ]  # fmt: skip
    assert "making it, 2 done" in written(0, calls[:2], terminal=True)

    # of a run that goes on: 2 s for a step, whatever came before
    clock = iter([0.0, 500.0, 502.0])
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = written(0, [(900, RESUMED), (900, f"{BEFORE}making it"), (901, "x")]).splitlines()
    assert found[-1] == "a run: step 901 of 1,000  x  3.3 min left"  # 99 of 2 s


def test_bars_fit_a_narrow_terminal():
    note = "loss 5.123  12,345 tokens/s"
    out = written(0, [(1, note), (2, note)], terminal=True, width=60)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out).replace("\r", "\n").splitlines()
    assert any("2/1000" in line and "tokens/s" in line for line in lines)
    assert max(map(len, lines)) <= 60


def test_lines_count_what_they_are_told_to():
    assert written(0, [(1000, "")], unit="row") == "a run: row 1,000 of 1,000\n"


def test_nothing_is_drawn_nowhere():
    with progress_bars(None) as add:
        add("a run", 2)(1, "x")
