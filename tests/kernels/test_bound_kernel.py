"""Kernels bound to all but their tensors: the first launch is Triton's, later ones pass it by, warm-ups compile."""

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
    with pytest.raises(ValueError, match="zip"):
        launch(9, other)


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
