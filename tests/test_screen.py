import errno
import io
import itertools
import re
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbind import screen
from kvbind.screen import GAP, Screen, at_rest, break_silence, column_groups, duration, heard_of, progress_screen

words = st.text("ab", min_size=1, max_size=12)
tables = st.integers(1, 8).flatmap(
    lambda columns: st.tuples(
        st.lists(words, min_size=columns, max_size=columns),
        st.lists(st.lists(words, min_size=columns, max_size=columns), max_size=4),
        st.integers(0, columns),
    )
)


@given(tables, st.integers(10, 100))
def test_columns_are_divided_into_groups_that_fit(table, width):
    header, rows, left = table
    groups = column_groups(header, rows, width, left)
    assert [column for group in groups for column in group[left:]] == list(range(left, len(header)))
    needed = [max(map(len, (name, *(row[i] for row in rows)))) + GAP for i, name in enumerate(header)]
    for group in groups:
        assert group[:left] == list(range(left))
        assert len(group) <= left + 1 or sum(needed[i] for i in group) <= width
    for group, following in itertools.pairwise(groups):  # no group is divided without need
        assert sum(needed[i] for i in (*group, following[left])) > width


def test_a_heading_of_several_lines_needs_its_longest():
    assert column_groups(["", "one two\nthree", "x"], [["a", "1", "2"]], 12) == [[0, 1], [0, 2]]
    assert column_groups(["", "one two three", "x"], [["a", "1", "2"]], 16) == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_cannot_be_written_to_is_named(name, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, name, Full())
    with pytest.raises(OSError, match=f"No space left on device: '{name}'"):
        Screen(stderr=name == "stderr").print("a line")


def test_times_of_any_size_are_for_people():
    seconds = (0, 4.68e-5, 3.12e-3, 0.52, 4.4, 9.97, 40, 150, 7200, 400_000)
    said = ["0 s", "47 µs", "3.1 ms", "520 ms", "4.4 s", "10 s", "40 s", "2.5 min", "2.0 h", "4.6 days"]
    assert [duration(x) for x in seconds] == said


class Heard(io.StringIO):
    """A stream that tells when something is written to it."""

    def __init__(self):
        super().__init__()
        self.said = threading.Event()

    def write(self, text):
        self.said.set()
        return super().write(text)


def test_a_silent_command_says_that_it_is_at_work(monkeypatch):
    stream = Heard()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(screen, "SILENCE", 0.03)
    with heard_of("kvbind eval"):
        assert stream.said.wait(60)
    assert re.fullmatch(r"(kvbind eval: [\d.]+ (ms|s) so far\n)+", stream.getvalue())


def test_a_command_that_speaks_or_waits_for_its_user_is_not_interrupted(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(screen, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Screen, "spoke", 0.0)

    def said(now):
        clock[0] = now
        break_silence("it", 0.0)
        return capsys.readouterr().err

    assert not said(14)
    Screen(file=io.StringIO()).print("something")
    assert not said(28)
    assert said(30) == "it: 30 s so far\n"
    assert not said(44)
    with at_rest():
        assert not said(1000)
    assert not said(1014)
    assert said(1020) == "it: 17 min so far\n"


def test_progress_is_said_on_stderr_where_results_go_to_a_file(capsys):
    progress_screen(Screen(file=io.StringIO())).print("row 1")
    assert capsys.readouterr() == ("", "row 1\n")
    terminal = Screen(file=io.StringIO(), force_terminal=True)
    assert progress_screen(terminal) is terminal
