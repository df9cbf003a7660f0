"""Packed documents whose boundaries the device reads, on kernels: what float64 gives, and captured for all boundaries."""

import itertools

import pytest
import torch

from kvbind import GLU, InnerLoop, Linear, NewtonSchulz, SwiGLU, ttt
from kvbind.forms import packed as form
from kvbind.forms.packed import packed
from kvbind.kernels.common.devices import has_triton, interpreted
from kvbind.sequence.boundaries import Boundaries, with_room
from kvbind.train.graphs import Replays
from strategies import error, leaves, operands

pytestmark = pytest.mark.skipif(
    not has_triton() or not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = NewtonSchulz(dtype=torch.float32)
SPECS = {
    "rung0": InnerLoop(network=SwiGLU(), momentum=True, orthogonalize=FULL, normalize=True, chunk=64),
    "rung2": InnerLoop(network=SwiGLU(), update="last", momentum=True, orthogonalize=FULL, chunk=64),
    "rung6": InnerLoop(network=Linear(), update="last", chunk=64),
    "retention": InnerLoop(network=GLU(), update="last", momentum=True, retention=True, chunk=64),
}
LENGTHS = [70, 64, 5, 0, 133]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def bounds_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)


def drawn(spec, tokens, dtype=torch.float32, heads=1):
    o = operands(spec, batch=1, tokens=tokens, heads=heads, key_width=16, value_width=16, hidden=16, dtype=torch.float32)
    for owner in (o.weights, o.options, o.options["lr"]):
        owner.update({name: x.to(DEVICE) for name, x in owner.items() if isinstance(x, torch.Tensor)})
    o.q, o.k, o.v = (x.to(dtype).to(DEVICE) for x in (o.q, o.k, o.v))
    for x in leaves(o).values():
        x.requires_grad_()
    return o


def output_of(spec, o, boundaries):
    gates = {name: x for name, x in o.options.items() if name != "lr"}
    return packed(spec, o.weights, o.q, o.k, o.v, boundaries, lr=o.options["lr"], **gates)


def doubled(spec, o):
    exact = operands(spec, batch=1, tokens=o.q.shape[1], heads=o.q.shape[2], key_width=16, value_width=16, hidden=16)
    for name, x in leaves(exact).items():
        x.copy_(leaves(o)[name].detach().double().cpu()).requires_grad_()
    return exact


@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_are_those_of_float64(name, monkeypatch):
    spec, ran = SPECS[name], []
    for kind in ("chunked_documents", "recurrent_chunks"):
        plain = getattr(form, kind)
        monkeypatch.setattr(form, kind, lambda *args, kind=kind, plain=plain: (ran.append(kind), plain(*args))[1])
    o = drawn(spec, sum(LENGTHS))
    found = output_of(spec, o, Boundaries(with_room(bounds_of(LENGTHS)), sum(LENGTHS)))
    assert set(ran) == {"recurrent_chunks" if name == "rung0" else "chunked_documents"}
    exact = doubled(spec, o)
    expected, _ = ttt(spec, exact.weights, exact.q, exact.k, exact.v, **exact.options, cu_seqlens=bounds_of(LENGTHS).cpu())
    assert error(found.cpu(), expected) < 1e-5
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((found * slope.to(DEVICE)).sum(), list(leaves(o).values()))
    theirs = torch.autograd.grad((expected * slope).sum(), list(leaves(exact).values()))
    for what, x, y in zip(leaves(o), ours, theirs, strict=True):
        assert (x.double().cpu() - y).norm() <= 2e-4 * y.norm(), what


@gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_does_for_all_boundaries_of_a_capacity(name, dtype):
    spec, tokens = SPECS[name], 512
    o = drawn(spec, tokens, dtype, heads=2)
    # leaves of its own: what has summed a leaf's gradients on another stream cannot be captured
    plain = drawn(spec, tokens, dtype, heads=2)
    names, slope = list(leaves(o)), torch.randn(o.v.shape, device=DEVICE)
    results = {}

    def work(batch):
        output = output_of(spec, o, Boundaries(batch["bounds"], tokens))
        grads = torch.autograd.grad((output.float() * slope).sum(), list(leaves(o).values()))
        for what, x in zip(("output", *names), (output, *grads), strict=True):
            results.setdefault(what, torch.empty_like(x)).copy_(x.detach())

    replays = Replays(work, DEVICE)
    for lengths in ([512], [70, 442], [64] * 8, [1] * 7 + [505], [0, 129, 0, 383], [100, 200, 212]):
        bounds = bounds_of(lengths)
        replays({"bounds": with_room(bounds)})
        assert replays.broken is None
        expected, _ = ttt(spec, plain.weights, plain.q, plain.k, plain.v, **plain.options, cu_seqlens=bounds)
        # nothing reads what the last chunk of a document writes: zeros, where no document has another
        grads = torch.autograd.grad((expected.float() * slope).sum(), list(leaves(plain).values()), materialize_grads=True)
        bound = 2e-4 if dtype == torch.float32 else 6e-2
        for what, y in zip(("output", *names), (expected, *grads), strict=True):
            assert (results[what].float() - y.float()).norm() <= bound * y.float().norm(), (lengths, what)
    assert replays.captured == 1
