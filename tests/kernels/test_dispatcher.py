"""Operators called past the dispatcher: when, and that nothing of it is missed."""

import contextlib
from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from kvbind.kernels.common import tracing
from kvbind.kernels.common.tracing import is_differentiated, is_unwatched
from kvbind.kernels.launching import dispatcher


@torch.library.custom_op("kvbind::test_doubled", mutates_args=())
def doubled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@doubled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _gradient(ctx, dy):
    return 2 * dy, None


doubled.register_autograd(_gradient)


@torch.library.custom_op("kvbind::test_plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("kvbind::test_summed", mutates_args=())
def summed(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(xs)).sum(0)


summed.register_autograd(lambda ctx, dy: [dy, dy])


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_a_plain_call_is_the_bodys(monkeypatch):
    called = []
    monkeypatch.setattr(doubled, "_init_fn", lambda x, factor: called.append(factor) or x * factor)
    x = torch.ones(3)
    assert torch.equal(dispatcher.call(doubled, x, 2.0), 2 * x)
    with torch.no_grad():
        dispatcher.call(doubled, x.requires_grad_(), 3.0)
        dispatcher.call(doubled, torch.nn.Parameter(x), 4.0)
    with torch.inference_mode():
        dispatcher.call(doubled, torch.ones(2), 5.0)
    assert called == [2.0, 3.0, 4.0, 5.0]


def test_gradients_are_those_of_the_dispatcher_without_it(monkeypatch):
    passed = []
    monkeypatch.setattr(type(doubled), "__call__", lambda self, *args: passed.append(args) or self._opoverload(*args))
    x = torch.ones(3, requires_grad=True)
    y = dispatcher.call(doubled, x, 2.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 2 * x)
    assert torch.equal(grad, 2 * torch.ones(3))
    assert passed == []
    # operators without a gradient say so themselves, and lists of tensors are the dispatcher's
    for operator, given in ((plain, (x,)), (summed, ([x, x],))):
        with pytest.raises(RuntimeError, match="no autograd formula") if operator is plain else contextlib.nullcontext():
            dispatcher.call(operator, *given).sum().backward()
    assert len(passed) == 2
    assert torch.equal(x.grad, 2 * torch.ones(3))


def test_traces_go_by_the_dispatcher():
    x = torch.ones(3, requires_grad=True)
    with Seen() as seen, torch.no_grad():
        dispatcher.call(doubled, x, 2.0)
    assert "kvbind.test_doubled.default" in seen.names
    with FakeTensorMode() as mode:
        fake = torch.empty(5)
    assert not is_unwatched((fake, 2.0))
    assert dispatcher.call(doubled, fake, 2.0).fake_mode is mode
    assert not is_unwatched((torch.ones(3).as_subclass(Subclass), 2.0))

    def run(x):
        return dispatcher.call(doubled, x, 2.0)

    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(3)), 2 * torch.ones(3))
    assert any("test_doubled" in str(node.target) for node in graphs[0].graph.nodes)


def test_transforms_and_forward_gradients_go_by_the_dispatcher_too():
    found = []

    def look(x):
        found.append(is_unwatched((x,)))
        return x

    x = torch.ones(2, 3)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    assert found == [False] * 3
    assert is_unwatched((x,))


@pytest.mark.parametrize("where", [0, 1])
def test_any_argument_may_ask_for_a_gradient(where):
    args = [torch.ones(3), torch.ones(3)]
    args[where].requires_grad_()
    assert is_differentiated(args)
    assert is_differentiated((1.0, None, args))
    with torch.no_grad():
        assert not is_differentiated(args)
    assert not is_differentiated((torch.ones(3), [torch.ones(3)], [1, 2]))


def test_traces_of_torchscript_hold_operators():
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: dispatcher.call(doubled, x, 2.0), torch.ones(3))
    assert "test_doubled" in str(traced.graph)


def test_profiles_name_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dispatcher.call(doubled, torch.ones(3), 2.0)
    assert "kvbind::test_doubled" in {event.name for event in profile.events()}


def test_without_what_it_asks_of_pytorch_all_calls_go_by_the_dispatcher(monkeypatch):
    assert tracing._KNOWN
    monkeypatch.setattr(tracing, "_KNOWN", False)
    assert not is_unwatched((torch.ones(3),))
    assert torch.equal(dispatcher.call(doubled, torch.ones(3), 2.0), 2 * torch.ones(3))
