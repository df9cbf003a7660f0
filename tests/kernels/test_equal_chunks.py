"""Plans of equal chunks give what a loop over chunks gives in float64, with either kind of write, and share what they can.

Memory that nothing has written holds NaN in these tests, so that what reads it is seen.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kvbind.kernels.common import operands
from kvbind.kernels.common.devices import has_triton, interpreted
from kvbind.kernels.common.operands import laid_out, zeros
from kvbind.kernels.launching.warm_up import warming_up

pytestmark = pytest.mark.skipif(
    not has_triton() or not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
if has_triton():
    from kvbind.kernels.equal_chunks import library_products
    from kvbind.kernels.equal_chunks import operator as equal_chunks
    from kvbind.kernels.equal_chunks.call_shapes import CallShapes
    from kvbind.kernels.equal_chunks.library_products import LibraryWrite
    from kvbind.kernels.equal_chunks.operator import LaunchPlan
    from kvbind.kernels.equal_chunks.tma_products import Theta, TokenRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHUNK = 64


@pytest.fixture(autouse=True)
def _unwritten_memory_is_not_a_number():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def by_library(monkeypatch):
    """Writes by the vendor's library; off GPUs by PyTorch's product in its place."""
    monkeypatch.setattr(library_products, "LEAST", 0)
    if DEVICE == "cuda":
        return
    fits = library_products.fits
    monkeypatch.setattr(library_products, "fits", lambda _, *x: fits(SimpleNamespace(is_cuda=True), *x))

    def product(self, _, x, g, y):
        torch.bmm(self.left(x).mT.float(), self.right(g).float(), out=y)

    monkeypatch.setattr(LibraryWrite, "__call__", product)


def orthogonal(x, coefficients):
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def plain(given, own, coefficients):
    """Outputs, the state and the momentum buffer after the last complete chunk, chunk by chunk."""
    q, k, v = given["q"], given["k"], given["v"]
    if "gate" in given:
        q, k = (F.silu(x.transpose(1, 2) @ given["gate"]).transpose(1, 2) for x in (q, k))
    if "rates" in given:
        k = k * given["rates"][..., None]
    state = given["start"].expand(len(q), -1, -1, -1)
    moved, outputs = torch.zeros_like(state), []
    for at in range(0, q.shape[1], CHUNK):
        here = slice(at, at + CHUNK)
        read = state
        if at + CHUNK <= q.shape[1]:
            write = torch.einsum("bthf,bthv->bhfv", k[:, here], v[:, here])
            if "momentum" in given:
                write = moved = write + given["momentum"][:, here].mean(1)[..., None, None] * moved
            if coefficients:
                write = orthogonal(write, coefficients)
            if "retention" in given:
                state = state * given["retention"][:, here].mean(1)[..., None, None]
            state = state + write
        outputs.append(torch.einsum("bthf,bhfv->bthv", q[:, here], state if own else read))
    return torch.cat(outputs, 1), state, moved


def draw(*, length, by_head, gates, theta, batch=2, heads=1, width=16):
    make = torch.Generator().manual_seed(0)

    def tokens():
        x = torch.randn(batch, heads, length, width, generator=make).half()
        return (x if by_head else x.transpose(1, 2).contiguous().transpose(1, 2)).transpose(1, 2)

    given = {"q": tokens(), "k": tokens(), "v": tokens()}
    given |= {name: torch.rand(batch, length, heads, generator=make) * 0.5 + 0.3 for name in gates}
    given["start"] = torch.randn(heads, 64 if theta else width, width, generator=make) * 0.1
    if theta:
        given["gate"] = torch.randn(heads, width, 64, generator=make) * 0.3
    return {name: x.to(DEVICE).detach().requires_grad_() for name, x in given.items()}


def plan_of(given, *, own=False, coefficients=()):
    rows = [TokenRows.of(given[name]) for name in ("q", "k", "v")]
    theta = Theta(1, 1, 64, "silu") if "gate" in given else None
    rates = given["rates"].stride() if "rates" in given else None
    start = given["start"].stride(0)
    shapes = CallShapes(
        *rows,
        CHUNK,
        own,
        1.0,
        theta,
        (0, start),
        rates,
        "momentum" in given,
        "retention" in given,
        coefficients,
        torch.float32,
    )
    return LaunchPlan(shapes, given["q"])


def run(plan, given):
    gates = [given.get(name) for name in ("rates", "momentum", "retention")]
    theta = [given["gate"]] if "gate" in given else []
    return plan.run(given["q"], given["k"], given["v"], *gates, given["start"], theta)


def compare(given, bound=3e-3, *, own=False, coefficients=()):
    plan = plan_of(given, own=own, coefficients=coefficients)
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    found = []
    for results, leaves in ((run(plan, given), given), (plain(exact, own, coefficients), exact)):
        results = [x for x, of in zip(results, (True, True, "momentum" in given), strict=True) if of]
        slopes = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) for x in results]
        loss = sum((x.double() * slope).sum() for x, slope in zip(results, slopes, strict=True))
        found.append([*results, *torch.autograd.grad(loss, list(leaves.values()))])
    for ours, want in zip(*found, strict=True):
        assert ours.shape == want.shape
        error = (ours.double() - want).norm() / want.norm()
        assert error < bound, f"{error:.1e}"
    return plan


SOME = ((3.4445, -4.775, 2.0315),)


@pytest.mark.parametrize(
    ("gates", "theta", "coefficients", "own"),
    [
        ((), False, (), False),
        ((), False, SOME, False),
        (("rates", "momentum"), False, SOME, False),
        (("momentum", "retention"), False, (), True),
        (("momentum", "retention"), False, (), False),
        (("rates", "momentum", "retention"), True, (), False),
        (("rates",), True, SOME, True),
    ],
)
@pytest.mark.usefixtures("by_library")
def test_products_by_the_vendors_library_lie_head_by_head(gates, theta, coefficients, own):
    given = draw(length=192, by_head=True, gates=gates, theta=theta, heads=2)
    assert compare(given, 8e-3 if coefficients else 3e-3, own=own, coefficients=coefficients).by_head
    # without gradients too, where less is kept
    plan = plan_of(given, own=own, coefficients=coefficients)
    with torch.no_grad():
        found = run(plan, given)
    assert all(x is y or torch.equal(x, y) for x, y in zip(found, run(plan, given), strict=True))


@pytest.mark.usefixtures("by_library")
def test_products_are_our_own_where_the_library_would_copy_or_cost_more(monkeypatch):
    whole = {"length": 128, "by_head": True, "theta": False, "heads": 2}
    assert plan_of(draw(gates=(), **whole)).by_head
    assert not plan_of(draw(gates=(), **whole | {"length": 130})).by_head
    assert not plan_of(draw(gates=(), **whole | {"by_head": False})).by_head
    # a small product takes the device less time than the library takes the host
    monkeypatch.setattr(library_products, "LEAST", 2 * 2 * 128 * 2 * 16 * 16 + 1)
    assert not plan_of(draw(gates=(), **whole)).by_head


def test_the_library_is_asked_on_gpus_alone():
    rows = TokenRows.of(torch.empty(2, 3, 70, 16).transpose(1, 2))
    assert library_products.fits(SimpleNamespace(is_cuda=True), rows)
    assert not library_products.fits(SimpleNamespace(is_cuda=False), rows)
    assert not library_products.fits(SimpleNamespace(is_cuda=True), rows, TokenRows.of(torch.empty(2, 70, 3, 16)))


@pytest.mark.parametrize("own", [False, True])
def test_chunks_in_a_loop_give_the_same(own):
    compare(draw(length=128 if own else 150, by_head=False, gates=("rates", "momentum", "retention"), theta=False), own=own)


def test_a_plan_serves_tensors_of_its_shapes_whatever_their_numbers():
    given = draw(length=70, by_head=False, gates=("rates",), theta=False)
    plan = compare(given)
    with torch.no_grad():
        doubled = {name: x * (2 if name == "v" else 1) for name, x in given.items()}
        first, start = run(plan, given)[1], given["start"]
        assert torch.allclose(run(plan, doubled)[1] - start, 2 * (first - start), rtol=1e-3, atol=1e-3)


def test_plans_share_zeros_and_hold_nothing_that_grows_with_a_model():
    given = draw(length=128, by_head=False, gates=("momentum",), theta=False)
    plans = [plan_of(given), plan_of(given)]
    assert plans[0].no_velocity is plans[1].no_velocity
    for plan in plans:
        run(plan, given)[0].float().sum().backward()
        for part in (plan, plan.backward_launches):
            tensors = [x for x in vars(part).values() if isinstance(x, torch.Tensor) and x is not plan.no_velocity]
            assert sum(x.numel() for x in tensors) < 64
    assert not plans[0].no_velocity.any()
    assert not zeros(given["q"].device, 2 * 16 * 16).any()


@pytest.mark.parametrize("capturing", [False, True])
def test_zeros_that_are_shared_are_there_for_every_stream(monkeypatch, capturing):
    waited = []
    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: capturing,
        current_stream=lambda device: SimpleNamespace(synchronize=lambda: waited.append(device)),
    )
    stand_in = SimpleNamespace(
        cuda=cuda,
        float32=torch.float32,
        inference_mode=torch.inference_mode,
        full=lambda shape, value, dtype, device: torch.full(shape, value, dtype=dtype),
    )
    monkeypatch.setattr(operands, "torch", stand_in)
    monkeypatch.setattr(operands, "_shared", {})
    device = torch.device("cuda", 0)
    first = zeros(device, 3)
    # a graph fills its memory when it is replayed, which may be never
    assert (zeros(device, 3) is first) is not capturing
    assert waited == ([] if capturing else [device])
    assert zeros(device, 4) is not first


def test_saved_tensors_of_other_strides_are_brought_back_to_theirs():
    given = draw(length=128, by_head=True, gates=("rates",), theta=False, heads=2)
    plan = plan_of(given)
    saved = [given[name] for name in ("q", "k", "v", "rates")]
    assert all(x is y for x, y in zip(plan.like_saved(saved), saved, strict=True))
    (moved, *others) = plan.like_saved([saved[0].contiguous(), *saved[1:]])
    assert moved.stride() == saved[0].stride()
    assert torch.equal(moved, saved[0])
    assert all(x is y for x, y in zip(others, saved[1:], strict=True))


def test_numbers_that_stand_for_many_stay_so():
    one = torch.full((2, 3, 4), 0.5)
    found = laid_out(one, (0, 0, 0))
    assert found.stride() == (0, 0, 0)
    assert torch.equal(found, one)


def test_a_kind_of_calls_is_warmed_up_once_whatever_the_number_of_tokens_and_sequences(monkeypatch):
    monkeypatch.setattr(equal_chunks, "_met", set())
    monkeypatch.setattr(equal_chunks, "can_warm_up", lambda _: True)
    seen = []

    def warm_up(part, length, batch, gates=("rates",)):
        plan = plan_of(draw(length=length, by_head=False, gates=gates, theta=True, batch=batch))
        plan.warm_up(part, lambda x: seen.append((x, warming_up())), (part,))
        assert plan.met == {part}

    warm_up("forward", 70, 1)
    assert seen == [("forward", True)]
    warm_up("forward", 200, 2)
    assert len(seen) == 1
    warm_up("backward", 70, 1)
    warm_up("forward", 70, 1, gates=())
    assert seen[1:] == [("backward", True), ("forward", True)]
