"""Block inputs in host memory: the same gradients, and nothing held on the device that is not in use."""

import gc
import weakref

import pytest
import torch
from torch import nn

from kvbind.train import train
from kvbind.train.offload import HostMemory, OffloadedTensor
from kvbind.train.recompute import recompute
from train.toy import Toy, config, make_model


class Block(nn.Module):
    """A block with dropout, a second output and an argument that is no tensor, as models have them."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.3)

    def forward(self, x, shift, scale):
        return x + self.dropout(self.outer(torch.tanh(self.inner(x * scale)))) + shift[0], None


def blocks(count=4, width=6):
    torch.manual_seed(0)
    return nn.ModuleList([Block(width) for _ in range(count)])


def through(model, x, shift):
    for i, block in enumerate(model):
        x, _ = block(x, (shift,), 1.0 + i)
    return x


def gradients(what, passes=1, count=4):
    """Of parameters and inputs, over some passes that add up."""
    model = blocks(count)
    recompute(model, what)
    x, shift = torch.randn(3, 5, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    for _ in range(passes):
        through(model, x, shift).square().sum().backward()
    return [p.grad for p in (*model.parameters(), x, shift)]


@pytest.mark.parametrize(("passes", "count"), [(1, 4), (3, 4), (2, 1)])
def test_gradients_are_those_of_blocks_that_keep_everything(passes, count):
    found, kept = gradients("offload", passes, count), gradients("none", passes, count)
    assert all(torch.equal(x, y) for x, y in zip(found, kept, strict=True))


def test_a_graph_that_is_kept_gives_its_gradients_again():
    model = blocks()
    recompute(model, "offload")
    x = torch.randn(2, 6, requires_grad=True)
    loss = through(model, x, torch.zeros(6)).square().sum()
    first, again = (torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_passes_that_wait_for_each_other_do_not_mix():
    def run(what):
        model = blocks()
        recompute(model, what)
        xs = [torch.full((2, 6), float(i + 1), requires_grad=True) for i in range(2)]
        losses = [through(model, x, torch.zeros(6)).square().sum() for x in xs]
        # the first one's backward pass comes first, not last
        return [torch.autograd.grad(loss, [x, *model.parameters()]) for loss, x in zip(losses, xs, strict=True)]

    for found, kept in zip(run("offload"), run("none"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_a_training_run_is_the_same_to_the_last_bit(tmp_path):
    models = {}
    for what in ("none", "block", "offload"):
        models[what] = make_model()
        train(models[what], Toy(), config(steps=6, activation_checkpointing=what, accumulate=2), tmp_path / what)
    for what in ("block", "offload"):
        for x, y in zip(models[what].parameters(), models["none"].parameters(), strict=True):
            assert torch.equal(x, y)


def test_at_most_two_tensors_are_on_the_device_at_a_time(monkeypatch):
    """Counted at every moment that one is kept or fetched, forward and backward."""
    alive: list[weakref.ref[OffloadedTensor]] = []
    most = {"kept": 0, "fetched": 0}

    class Counted(HostMemory):
        def keep(self, x):
            kept = super().keep(x)
            if isinstance(kept, OffloadedTensor):
                alive.append(weakref.ref(kept))
            self.count("kept")
            return kept

        def fetch(self, kept):
            x = super().fetch(kept)
            # the one that is handed out is in use, and no longer counted as kept
            self.count("fetched", isinstance(kept, OffloadedTensor))
            return x

        def count(self, when, more=0):
            here = sum(kept is not None and kept.here is not None for kept in (one() for one in alive))
            most[when] = max(most[when], here + more)

    monkeypatch.setattr("kvbind.train.recompute.HostMemory", Counted)
    model = blocks(8)
    recompute(model, "offload")
    through(model, torch.randn(2, 6, requires_grad=True), torch.zeros(6)).sum().backward()
    assert len(alive) == 8
    assert most == {"kept": 1, "fetched": 2}
    gc.collect()
    assert not any(one() for one in alive)


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 24])
def test_tensors_come_back_whole_whatever_pieces_they_are_cut_into(elements, monkeypatch):
    monkeypatch.setattr("kvbind.train.offload.PIECE_BYTES", 32)
    memory = HostMemory()
    given = [torch.randn(elements, dtype=torch.float32), torch.randn(3, elements).mT, torch.randint(9, (elements,))]
    kept = [memory.keep(x) for x in given]
    for one, x in reversed(list(zip(kept, given, strict=True))):
        back = memory.fetch(one)
        assert torch.equal(back, x)
        assert back.dtype == x.dtype
    if elements == 9:
        assert [len(piece) for piece in kept[0].pieces] == [8, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_equal_and_inputs_leave_its_memory():
    held, found = {}, {}
    for what in ("block", "offload"):
        model = blocks(12, 64).cuda()
        recompute(model, what)
        x = torch.randn(1 << 14, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1), requires_grad=True)
        shift = torch.zeros(64, device="cuda")
        torch.manual_seed(2)
        before = torch.cuda.memory_allocated()
        loss = through(model, x, shift).square().sum()
        torch.cuda.synchronize()
        held[what] = torch.cuda.memory_allocated() - before
        found[what] = torch.autograd.grad(loss, [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found["block"], found["offload"], strict=True))
    assert held["offload"] < held["block"] / 3
