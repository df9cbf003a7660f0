import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvbind.screen import GAP, column_groups

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
