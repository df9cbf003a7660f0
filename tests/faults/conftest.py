import pytest

from faults import small


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    small.run(folder)
    return small.left(folder)
