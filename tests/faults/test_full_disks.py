"""Disks that are full, at every write of a run and on a real small file system."""

import contextlib
import errno
import os
import re
import shutil
import subprocess

import pytest

from faults import small
from kvbind.train import files, metrics, storage


class Full:
    """The system's `fsync`, for a disk that is full from some call on."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, handle, real=os.fsync):
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        real(handle)


@pytest.mark.parametrize("first", range(8))
def test_a_disk_that_is_full_at_any_write_ends_the_run_in_a_line_and_harms_nothing(tmp_path, monkeypatch, whole, first):
    run, calls, said = tmp_path / "run", first, []
    while True:
        full = Full(calls)
        for module in (files, metrics, storage):
            monkeypatch.setattr(module.os, "fsync", full)
        try:
            small.run(run)
            break
        except OSError as error:
            said.append(str(error))
        assert not list(run.rglob("*.partial"))
        calls += 8
    monkeypatch.undo()
    assert len(said) > 3
    lines = [line for line in said if "could not be written" in line]
    assert lines
    assert all(re.search(r"the run goes on from (step-\d{8}|its start, as there is none before)$", line) for line in lines)
    assert all("No space left on device" in line and str(run) in line and "\n" not in line for line in said)
    assert small.left(run) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if not shutil.which("mount") or os.name != "posix" or os.geteuid():
        pytest.skip("no file system may be mounted here")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room_again(small_disk, whole):
    run = small.stopped(small_disk / "run", 5)
    filling = small_disk / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device") as caught:
            small.run(run)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    filling.unlink()
    small.run(run)
    assert small.left(run) == whole
