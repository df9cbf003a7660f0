import io
import re

from kvbind.screen import Screen
from kvbind.train.bars import RESUMED, duration, progress_bars


def written(seconds, calls, terminal=False, width=80):
    screen = Screen(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with progress_bars(screen, seconds) as add:
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


def test_bars_fit_a_narrow_terminal():
    note = "loss 5.123  12,345 tokens/s"
    out = written(0, [(1, note), (2, note)], terminal=True, width=60)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out).replace("\r", "\n").splitlines()
    assert any("2/1000" in line and "tokens/s" in line for line in lines)
    assert max(map(len, lines)) <= 60


def test_nothing_is_drawn_nowhere():
    with progress_bars(None) as add:
        add("a run", 2)(1, "x")


def test_times_are_for_people():
    assert [duration(x) for x in (4.4, 99, 150, 7200, 400_000)] == ["4 s", "99 s", "2 min", "2.0 h", "4.6 days"]
