"""Launches past Triton's own way run what Triton would have run."""

from types import SimpleNamespace

import pytest
import torch

from kvbind.kernels.launching import launcher as launching
from kvbind.kernels.launching.launcher import Launcher


class Kernel:
    """Stands for a `triton.jit` kernel of two tensors, two integers and two constants."""

    arg_names = ("x", "y", "length", "stride", "WIDTH", "TILE")
    params = tuple(SimpleNamespace(do_not_specialize=name == "length") for name in arg_names)

    def __init__(self):
        self.made, self.ran = [], []

    def __getitem__(self, grid):
        def make(*args, **constants):
            number = len(self.made)
            self.made.append((grid, args, constants))
            return Compiled(self.ran, number)

        return make


class Compiled:
    run = function = packed_metadata = None

    def __init__(self, ran, number):
        self.ran, self.number = ran, number

    def __getitem__(self, grid):
        return lambda *args: self.ran.append((self.number, grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return Kernel()


def test_a_launch_like_an_earlier_one_runs_what_that_compiled_on_its_own_arguments(kernel):
    launcher, x, y = Launcher(kernel), torch.zeros(8), torch.ones(8)
    launcher[(4,)](x, y, 100, 8, WIDTH=8, TILE=16, num_warps=4)
    # another length is none that Triton specializes on; constants may come in any order, as may what the grid is made from
    launcher[lambda constants: (constants["TILE"], 2)](y, x, 57, 8, WIDTH=8, TILE=16, num_warps=4)
    assert len(kernel.made) == 1
    ((number, grid, args),) = kernel.ran
    assert (number, grid) == (0, (16, 2, 1))
    assert args[0] == y.data_ptr()
    assert args[2:] == (57, 8, 8, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": None},
        {"stride": 1},
        {"WIDTH": 4},
        {"num_warps": 8},
        {"x": torch.zeros(9)[1:]},
        {"length": 2**31},
    ],
    ids=["dtype", "no tensor", "stride", "constant", "warps", "not aligned", "beyond 32 bits"],
)
def test_what_triton_would_compile_anew_goes_through_triton(kernel, change):
    launcher = Launcher(kernel)
    given = {"x": torch.zeros(8), "y": torch.zeros(8), "length": 5, "stride": 8, "WIDTH": 8, "TILE": 16, "num_warps": 4}
    for fields in (given, given | change):
        constants = {name: fields[name] for name in ("WIDTH", "TILE", "num_warps")}
        launcher[(1,)](torch.zeros(8), *(fields[name] for name in ("x", "length", "stride")), **constants)
    assert len(kernel.made) == 2
    assert kernel.ran == []


def test_kernels_remembered_have_a_limit(kernel, monkeypatch):
    monkeypatch.setattr(Launcher, "MOST", 3)
    launcher, x = Launcher(kernel), torch.zeros(8)
    for stride in range(2, 9):
        launcher[(1,)](x, x, 5, stride, WIDTH=8, TILE=16)
    assert len(kernel.made) == 7
    assert len(launcher.compiled) <= 3


def test_what_triton_made_in_c_is_called_itself_where_no_descriptors_are(kernel, monkeypatch):
    called = []
    monkeypatch.setattr(launching, "caller_of", lambda _: (lambda *args: called.append(args), ("function",), ()))
    monkeypatch.setattr(launching, "stream_of", lambda device: 70)
    launcher, x = Launcher(kernel), torch.zeros(8)
    for length in (5, 6):
        launcher[(2,)](x, None, length, 8, WIDTH=8, TILE=16)
    assert called == [(2, 1, 1, 70, "function", x.data_ptr(), None, 6, 8, 8, 16)]
    assert kernel.ran == []


@pytest.fixture
def straight(monkeypatch):
    """What launches passed Triton by with, in order."""
    called = []
    monkeypatch.setattr(launching, "caller_of", lambda _: (lambda *args: called.append(args), ("function",), ()))
    monkeypatch.setattr(launching, "stream_of", lambda device: 70)
    return called


def test_a_launch_that_comes_again_is_described_until_it_went_past_triton_and_no_more(kernel, straight):
    launcher, known, asked = Launcher(kernel), {}, []

    def describe():
        asked.append(len(kernel.made))
        return (2, 3), (5, 8), {"WIDTH": 8, "TILE": 16}

    x, y = torch.zeros(8), torch.zeros(8)
    for first, second in ((x, None), (x, None), (y, None), (x, None)):
        launcher.repeat(known, "one", (first, second), describe)
    assert len(kernel.made) == 1
    assert len(asked) == 2
    assert straight == [(2, 3, 1, 70, "function", z.data_ptr(), None, 5, 8, 8, 16) for z in (x, y, x)]
    # what it is known by is its name among launches of the same calls
    launcher.repeat(known, "another", (x, None), lambda: ((4,), (6, 8), {"WIDTH": 8, "TILE": 16}))
    launcher.repeat({}, "one", (x, None), lambda: ((4,), (7, 8), {"WIDTH": 8, "TILE": 16}))
    assert [args[:3] + args[7:9] for args in straight[3:]] == [(4, 1, 1, 6, 8), (4, 1, 1, 7, 8)]


def test_addresses_that_are_not_aligned_go_tritons_way_though_the_launch_is_known(kernel, straight):
    launcher, known = Launcher(kernel), {}
    describe = lambda: ((2,), (5, 8), {"WIDTH": 8, "TILE": 16})  # noqa: E731
    x, odd = torch.zeros(8), torch.zeros(9)[1:]
    for given in (x, x, odd, x):
        launcher.repeat(known, "one", (x, given), describe)
    assert [args[1] is odd for _, args, _ in kernel.made] == [False, True]
    assert len(straight) == 2


def test_in_a_warm_up_a_known_launch_compiles_and_does_not_run(kernel, straight, monkeypatch):
    launcher, known, warmed = Launcher(kernel), {}, []
    describe = lambda: ((2,), (5, 8), {"WIDTH": 8, "TILE": 16})  # noqa: E731
    x = torch.zeros(8)
    for _ in range(3):
        launcher.repeat(known, "one", (x, x), describe)
    kernel.warmup = lambda *args, **constants: warmed.append(args)
    with monkeypatch.context() as warm_up:
        warm_up.setattr(launching, "warming_up", lambda: True)
        warm_up.setattr(launching, "is_new", lambda key: True)
        launcher.repeat(known, "one", (x, x), describe)
    assert len(warmed) == 1
    assert len(straight) == 2


def test_what_triton_launches_itself_is_described_each_time(kernel):
    launcher, known, x = Launcher(kernel), {}, torch.zeros(8)
    for _ in range(3):
        launcher.repeat(known, "one", (x, x), lambda: ((2,), (5, 8), {"WIDTH": 8, "TILE": 16}))
    assert known == {}
    assert len(kernel.ran) == 2
