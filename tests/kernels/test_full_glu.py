"""One update from all tokens and a read, as kernels, against the definition in `forms.recurrent`."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)


from kvbind.forms.recurrent import full_update
from kvbind.forms.tokens import Tokens
from kvbind.inner.networks import GLU, Linear
from kvbind.inner.rule import FastWeights
from kvbind.inner.spec import InnerLoop
from kvbind.kernels.full_glu import launch
from kvbind.kernels.full_glu.operator import covers, full_glu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GLU_FULL = {"gated": True, "update_gate": True, "clip": True, "sign": 1.0, "squared": False}
CASES = {
    "vittt": {},
    "ascent": {"sign": -1.0},
    "last": {"update_gate": False},
    "last unclipped": {"update_gate": False, "clip": False},
    "squared": {"squared": True},
    "squared last": {"squared": True, "update_gate": False, "clip": False, "sign": -1.0},
    "linear": {"gated": False, "update_gate": False},
    "linear unclipped": {"gated": False, "update_gate": False, "clip": False},
    "linear squared": {"gated": False, "update_gate": False, "squared": True},
}


def settings(case):
    return {**GLU_FULL, **CASES[case]}


def by_pytorch(q, k, v, weight, gate, rate_out, rate_gate, *, update_gate, clip, sign, squared=False):
    """The definition, in the operands' dtype."""
    spec = InnerLoop(
        network=Linear() if gate is None else GLU(),
        loss="squared" if squared else "dot",
        update="all" if update_gate else "last",
        clip=clip,
        direction="descent" if sign > 0 else "ascent",
        visibility="full",
    )
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    weights = {"out": weight.expand(shape)} if gate is None else {"gate": gate.expand(shape), "out": weight.expand(shape)}
    rates = {"out": rate_out, "gate": rate_gate}
    rates = {name: rate.transpose(1, 2) if isinstance(rate, torch.Tensor) else rate for name, rate in rates.items()}
    tokens = Tokens(k.transpose(1, 2), v.transpose(1, 2), rates)
    fast = full_update(spec, FastWeights.start(spec, weights), tokens)
    o = spec.network.apply(fast.weights, q.transpose(1, 2))
    return o.transpose(1, 2), fast.weights["out"], fast.weights.get("gate")


def operands(*, dtype, writers=21, readers=21, heads=2, batch=1, widths=(16, 16), batched=False, rated=False, gated=True):
    """q, k, v, weight, gate and rates; q, k and v are views of one projection where their widths agree."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    dk, dv = widths
    if dk == dv and writers == readers:
        q, k, v = normal(batch, writers, 3 * heads * dk).to(dtype).split(heads * dk, dim=-1)
        q, k, v = (x.unflatten(-1, (heads, dk)) for x in (q, k, v))
    else:
        q, k, v = (normal(batch, t, heads, d).to(dtype) for t, d in ((readers, dk), (writers, dk), (writers, dv)))
    lead = (batch, heads) if batched else (heads,)
    weight, gate = normal(*lead, dk, dv) * dk**-0.5, normal(*lead, dk, dv) * dk**-0.5
    rates = [0.4 / writers**0.5] * 2
    if rated:
        # some tokens do not write; one rate lies with its heads first
        rates = [normal(batch, writers, heads).abs() * 0.1, normal(batch, heads, writers).abs().transpose(1, 2) * 0.1]
        rates[0][:, ::5] = 0
    return [q, k, v, weight, gate if gated else None, *rates]


def evaluate(function, inputs, dtypes, flags, used=("read", "new")):
    """Outputs, and gradients of a fixed random combination of those that are used, in float64."""
    leaves = [
        x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) else x
        for x, dtype in zip(inputs, dtypes, strict=True)
    ]
    outputs = [y for y in function(*leaves, **flags) if y is not None]
    generator = torch.Generator().manual_seed(1)
    parts = [(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs]
    total = sum(part for i, part in enumerate(parts) if ("new" if i else "read") in used)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)
    return [y.detach().double().cpu() for y in (*outputs, *grads)]


def errors(found, exact):
    return [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(found, exact, strict=True)]


def compare(inputs, flags, least=1e-5, used=("read", "new")):
    own = [x.dtype if isinstance(x, torch.Tensor) else None for x in inputs]
    exact = evaluate(by_pytorch, inputs, [torch.float64] * len(inputs), flags, used)
    found = evaluate(full_glu, inputs, own, flags, used)
    assert max(errors(found, exact)) < least
    return found, exact


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_with_the_definition(case):
    flags = settings(case)
    gated = flags.pop("gated")
    compare(operands(dtype=torch.float32, gated=gated), flags)


@pytest.mark.parametrize("case", ["vittt", "last", "squared", "linear"])
def test_rates_by_token_agree_and_have_gradients(case):
    flags = settings(case)
    gated = flags.pop("gated")
    compare(operands(dtype=torch.float32, gated=gated, rated=True, batched=True, widths=(24, 16), batch=2), flags)


@pytest.mark.parametrize("case", ["vittt", "linear squared"])
def test_parts_of_a_long_sequence_add_up(monkeypatch, case):
    # 21 tokens in 3 parts of 7
    monkeypatch.setattr(launch, "PART", 7)
    flags = settings(case)
    gated = flags.pop("gated")
    compare(operands(dtype=torch.float32, gated=gated, rated=True), flags)


@pytest.mark.parametrize(("writers", "readers", "widths"), [(70, 5, (24, 40)), (1, 33, (5, 16)), (0, 3, (16, 16))])
def test_writers_and_readers_of_any_number_and_widths(writers, readers, widths):
    flags = settings("vittt")
    gated = flags.pop("gated")
    inputs = operands(dtype=torch.float32, gated=gated, writers=max(writers, 1), readers=readers, widths=widths)
    inputs[1], inputs[2] = inputs[1][:, :writers], inputs[2][:, :writers]
    compare(inputs, flags)


@pytest.mark.parametrize("used", ["read", "new"])
def test_gradients_of_either_kind_of_output_alone_agree(used):
    flags = settings("vittt")
    flags.pop("gated")
    compare(operands(dtype=torch.float32), flags, used=(used,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["vittt", "squared", "linear"])
def test_narrow_operands_lose_no_more_than_plain_arithmetic_in_them(dtype, case):
    flags = settings(case)
    gated = flags.pop("gated")
    inputs = operands(dtype=dtype, gated=gated, rated=True)
    found, exact = compare(inputs, flags, least=1.5e-2)
    plain = evaluate(by_pytorch, inputs, [dtype] * len(inputs), flags)
    ours, theirs = errors(found, exact), errors(plain, exact)
    assert sum(ours) < 2 * sum(theirs)


def test_operands_have_dtypes_of_their_own():
    flags = settings("vittt")
    flags.pop("gated")
    q, k, v, *rest = operands(dtype=torch.float32)
    found, _ = compare([q, k.bfloat16(), v.half(), *rest], flags, least=2e-2)
    o = full_glu(q, k.bfloat16(), v.half(), *rest, **flags)[0]
    assert o.dtype == torch.float32
    assert torch.equal(o.double().cpu(), found[0])


@pytest.mark.parametrize("case", ["vittt", "last unclipped", "squared", "linear unclipped"])
def test_large_float16_activations_do_not_overflow(case):
    """Products of three activations leave float16's range long before float32's."""
    flags = settings(case)
    gated = flags.pop("gated")
    q, k, v, weight, gate, *_ = operands(dtype=torch.float16, gated=gated)
    # a gate that is not saturated
    gate = gate if gate is None else gate * 1e-3
    inputs = [q.float(), k * 1e3, v * 1e3, weight, gate, 1e-6, 1e-6]
    own = [x.dtype if isinstance(x, torch.Tensor) else None for x in inputs]
    exact = evaluate(by_pytorch, inputs, [torch.float64] * len(inputs), flags)
    found = evaluate(full_glu, inputs, own, flags)
    assert all(x.isfinite().all() for x in found)
    # gradients of k and v are too small for float16 itself
    count = len(found) - (5 if gated else 4)
    wide = [i for i in range(len(found)) if i not in (count + 1, count + 2)]
    assert max(errors([found[i] for i in wide], [exact[i] for i in wide])) < 1e-2


def test_small_float16_updates_do_not_vanish():
    """A rate of 1e-6 on activations of 1e-3 lies below float16's range."""
    flags = settings("vittt")
    flags.pop("gated")
    q, k, v, weight, gate, *_ = operands(dtype=torch.float16)
    rate = torch.full(k.shape[:3], 1e-6, device=DEVICE)
    update = full_glu(q, k, v * 1e-3, weight * 0, gate, rate, rate, **flags)[1]
    exact = by_pytorch(*(x.double() for x in (q, k, v * 1e-3, weight * 0, gate)), 1e-6, 1e-6, **flags)[1]
    assert errors([update.double().cpu()], [exact.cpu()])[0] < 2e-3


def test_keys_of_zero_have_finite_gradients():
    flags = settings("vittt")
    flags.pop("gated")
    q, k, *rest = operands(dtype=torch.float32)
    compare([q, torch.zeros_like(k), *rest], flags)


@pytest.mark.parametrize("case", ["vittt", "last", "linear squared"])
def test_operators_pass_pytorchs_own_checks(case):
    flags = settings(case)
    gated = flags.pop("gated")
    inputs = operands(dtype=torch.float32, gated=gated, writers=9, readers=9, heads=1, batched=True, rated=case == "vittt")
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    rates = leaves[5:] if case == "vittt" else [None, None]
    rest = (0.1, 0.1, flags["update_gate"], flags["clip"], flags["sign"], flags["squared"])
    torch.library.opcheck(torch.ops.kvbind.full_glu, (*leaves[:5], *rates, *rest))


def test_a_gate_that_stays_is_returned_and_a_missing_one_is_none():
    flags = settings("last")
    flags.pop("gated")
    inputs = operands(dtype=torch.float32, batch=2)
    gate = full_glu(*inputs, **flags)[2]
    assert torch.equal(gate, inputs[4].expand(2, -1, -1, -1))
    inputs[4] = None
    assert full_glu(*inputs, **flags)[2] is None


def test_what_is_covered():
    assert covers(48, 64, torch.bfloat16, torch.float32)
    assert not covers(64, 65, torch.bfloat16)
    assert not covers(64, 64, torch.float64)


def test_what_does_not_fit_is_refused():
    flags = settings("vittt")
    flags.pop("gated")
    q, k, v, weight, gate, *rates = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match="float64"):
        full_glu(q.double(), k, v, weight, gate, *rates, **flags)
    with pytest.raises(ValueError, match="update_gate must be False where gate is None"):
        full_glu(q, k, v, weight, None, *rates, **flags)
