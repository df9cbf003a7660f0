"""Kernels bound to all but their tensors: the first launch is Triton's, later ones pass it by, warm-ups compile."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from kvbind.kernels.launching import bound_kernel
from kvbind.kernels.launching.bound_kernel import Block, BoundKernel, View


class Kernel:
    """What `BoundKernel` uses of a kernel, written down."""

    arg_names = ("x", "y", "length", "WIDTH")

    def __init__(self):
        self.seen = []
        run = lambda *args: self.seen.append(("again", args))  # noqa: E731
        self.compiled = SimpleNamespace(run=run, function="function", packed_metadata="packed")

    def __getitem__(self, grid):
        return lambda *args, **constants: self.seen.append(("first", grid, args, constants)) or self.compiled

    def warmup(self, *args, grid, **constants):
        self.seen.append(("warmup", grid, args, constants))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(bound_kernel, "interpreted", lambda: False)
    return Kernel()


def test_the_first_launch_is_tritons_and_later_ones_go_past_it(kernel):
    x, y = torch.zeros(4, 8), torch.zeros(3)
    launch = BoundKernel(kernel, [View((4, 8), (8, 1), (2, 8)), None], (5,), (4,), WIDTH=8, num_warps=4, num_stages=2)
    launch(7, x, y)
    (how, grid, (described, plain, length), constants) = kernel.seen[0]
    assert (how, grid, length) == ("first", (5, 1, 1), 4)
    assert constants == {"WIDTH": 8, "num_warps": 4, "num_stages": 2}
    assert described.base is x
    assert (described.shape, described.strides, described.block_shape) == ([4, 8], [8, 1], [2, 8])
    assert plain is y
    other = torch.ones(4, 8)
    launch(9, other, y)
    how, args = kernel.seen[1]
    assert how == "again"
    block = args[9]
    assert isinstance(block, Block)
    assert block.base is other
    assert args[:9] == (5, 1, 1, 9, "function", "packed", None, None, None)
    assert args[10:] == (y.data_ptr(), 4, 8)


def test_all_but_tensors_is_as_in_the_first_launch(kernel):
    launch = BoundKernel(kernel, [None] * 3, (5,), (4,), WIDTH=8)
    x, y = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match="zip"):
        launch(7, x)
    for _ in range(2):
        launch(7, x, None, y)
    assert kernel.seen[1][1][9:] == (x.data_ptr(), None, y.data_ptr(), 4, 8)
    plain = BoundKernel(kernel, [None] * 2, (5, 6, 7), (4,), WIDTH=8)
    for stream in (7, 9):
        plain(stream, x, y)
    assert kernel.seen[-1][1] == (5, 6, 7, 9, "function", "packed", None, None, None, x.data_ptr(), y.data_ptr(), 4, 8)


def test_in_a_warm_up_a_launch_compiles_and_the_next_is_still_the_first(kernel, monkeypatch):
    launch = BoundKernel(kernel, [None, None], (1, 2), (4,), WIDTH=8)
    with monkeypatch.context() as warm_up:
        warm_up.setattr(bound_kernel, "warming_up", lambda: True)
        launch(0, torch.zeros(3), torch.zeros(3))
    launch(0, torch.zeros(3), torch.zeros(3))
    launch(0, torch.zeros(3), torch.zeros(3))
    assert [call[0] for call in kernel.seen] == ["warmup", "first", "again"]
    assert kernel.seen[0][1] == kernel.seen[1][1] == (1, 2, 1)


def test_what_compiles_for_another_device_launches_nothing_again(kernel):
    kernel.compiled = None
    launch = BoundKernel(kernel, [None, None], (1,), (4,), WIDTH=8)
    launch(0, torch.zeros(3), torch.zeros(3))
    launch(0, torch.zeros(3), torch.zeros(3))
    assert [call[0] for call in kernel.seen] == ["first", "first"]


class Made:
    """Stands for a function that Triton made in C."""

    __module__ = "__triton_launcher"

    def __init__(self):
        self.seen = []

    def __call__(self, *args):
        self.seen.append(args)


def wrapped(launcher, tensordesc_meta):
    """As Triton wraps it for kernels that take descriptors."""
    return lambda *args: launcher(*args, tensordesc_meta)


META = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [2, 8], "fp4_padded": False}


def straight(monkeypatch, run=None, metas=(META,)):
    """A kernel whose launcher is as in Triton 3.6, what that made in C, and the addresses of which descriptors were made."""
    made, encoded = Made(), []
    monkeypatch.setattr(bound_kernel, "BuiltinFunctionType", Made)
    encode = lambda address, *about: encoded.append((address, about)) or f"map of {address}"  # noqa: E731
    monkeypatch.setattr(bound_kernel, "_descriptors", lambda: (encode, {7: 70}))
    kernel = Kernel()
    around = {"launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0}
    compiled = kernel.compiled
    usual = compiled.run
    compiled.run = type("Launcher", (), {"__call__": lambda self, *args: usual(*args)})()
    for name, value in (around | {"launch": wrapped(made, metas)} | (run or {})).items():
        setattr(compiled.run, name, value)
    return kernel, made, encoded


@pytest.mark.usefixtures("kernel")
def test_what_triton_made_in_c_is_called_itself_with_descriptors_by_address(monkeypatch):
    kernel, made, encoded = straight(monkeypatch)
    x, y, other = torch.zeros(4, 8), torch.zeros(3), torch.ones(4, 8)
    launch = BoundKernel(kernel, [View((4, 8), (8, 1), (2, 8)), None], (5,), (4,), WIDTH=8, num_warps=4)
    launch(7, x, y)
    assert made.seen == []
    for given in (x, other, x):
        launch(9, given, y)
    address = x.data_ptr()
    before = (5, 1, 1, 9, "function", False, False, None, None, "packed", None, None, None)
    assert made.seen[0] == (*before, f"map of {address}", 4, 8, 8, 1, y.data_ptr(), 4, 8)
    assert made.seen[2] == made.seen[0]
    assert encoded == [(x.data_ptr(), (3, 4, 70, [2, 8], [4, 8], [8, 1], 0)) for x in (x, other)]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("run", "metas"),
    [
        ({"launch": lambda *_: None}, (META,)),
        ({"global_scratch_size": 16}, (META,)),
        ({}, ()),
        ({}, (None,)),
    ],
    ids=["another function", "scratch memory", "no descriptors", "descriptors taken apart"],
)
def test_launchers_that_are_not_as_known_are_left_alone(run, metas, monkeypatch):
    kernel, made, _ = straight(monkeypatch, run, metas)
    launch = BoundKernel(kernel, [View((4, 8), (8, 1), (2, 8)), None], (5,), (4,), WIDTH=8)
    for _ in range(2):
        launch(7, torch.zeros(4, 8), torch.zeros(3))
    assert made.seen == []
    assert [call[0] for call in kernel.seen] == ["first", "again"]


@pytest.mark.usefixtures("kernel")
def test_descriptors_remembered_have_a_limit(monkeypatch):
    monkeypatch.setattr(bound_kernel._Encoder, "MOST", 2)
    kernel, _, encoded = straight(monkeypatch)
    launch = BoundKernel(kernel, [View((4, 8), (8, 1), (2, 8)), None], (5,), (4,), WIDTH=8)
    kept, y = [torch.zeros(4, 8) for _ in range(3)], torch.zeros(3)
    launch(7, kept[0], y)
    for x in (*kept, kept[0]):
        launch(7, x, y)
    assert [address for address, _ in encoded] == [x.data_ptr() for x in (*kept, kept[0])]


def test_the_hosts_time_is_measured_with_launches_left_out():
    script = Path(__file__).with_name("host_time.py")
    done = subprocess.run([sys.executable, str(script), "rung6"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    case, forward, *_ = done.stdout.replace("forward", "").split()
    assert case == "rung6"
    assert 0 < float(forward) < 1e5
