"""Token-causal linear attention, as kernels, against the recurrence in float64."""

import os
import random
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hypothesis import given
from hypothesis import strategies as st

import kvbind
from kvbind.kernels.causal import operator as causal
from kvbind.kernels.causal import segment_pass
from kvbind.kernels.causal.operator import causal_linear_attention
from kvbind.kernels.causal.segments import segment_table
from kvbind.kernels.launching.launcher import Launcher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "rates", "decay", "initial_state")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Several segments even for short sequences, and float32 products in float32."""
    monkeypatch.setattr(causal, "LEAST_SEGMENT", 64)
    monkeypatch.setattr(causal, "_cuts", {})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def recurrence(q, k, v, rates=None, decay=None, initial_state=None, *, chunk=1, mode="token", sign=1.0):
    """The definition: one state after another."""
    if mode == "token":
        chunk = 1
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    writes = sign * k[..., :, None] * v[..., None, :]
    if rates is not None:
        writes = rates[..., None, None] * writes
    outputs = []
    for start in range(0, q.shape[1], chunk):
        before = state if decay is None else decay[:, start, :, None, None] * state
        state = before + writes[:, start : start + chunk].sum(1)
        outputs.append(torch.einsum("bthd,bhde->bthe", q[:, start : start + chunk], before if mode == "past" else state))
    return torch.cat(outputs, 1), state


def draw(tokens, key=16, value=16, batch=1, heads=1, *, names=NAMES, dtype=torch.float32, sequences=None, seed=0):
    """Operands that `dtype` holds exactly, by name."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    made = {
        "q": normal(batch, tokens, heads, key, scale=key**-0.5).to(dtype),
        "k": normal(batch, tokens, heads, key).to(dtype),
        "v": normal(batch, tokens, heads, value).to(dtype),
        "rates": torch.rand(batch, tokens, heads, generator=g),
        "decay": 0.5 + 0.5 * torch.rand(batch, tokens, heads, generator=g),
        "initial_state": normal(sequences or batch, heads, key, value),
    }
    return {name: x.to(DEVICE) for name, x in made.items() if name in names}


def results(function, operands, options, dtype=None):
    """Outputs, end state and every gradient, by name, for cotangents that depend on shapes alone."""
    operands = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in operands.items()}
    found = function(**operands, **options)
    g = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(x.shape, generator=g).bfloat16().to(x) for x in found]
    gradients = torch.autograd.grad(found, list(operands.values()), cotangents)
    return dict(zip(("output", "state", *operands), (*found, *gradients), strict=True))


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def worst(found, exact):
    assert found.keys() == exact.keys()
    errors = {name: error(x, exact[name]) for name, x in found.items()}
    name = max(errors, key=errors.get)
    return errors[name], name


PLAIN = ("q", "k", "v")
CASES = {
    "plain": (PLAIN, {"tokens": 70}, {}),
    "rates, a state and two segments": ((*PLAIN, "rates", "initial_state"), {"tokens": 100, "key": 48, "heads": 2}, {}),
    "ascent": ((*PLAIN, "initial_state"), {"tokens": 70, "value": 48}, {"sign": -1.0}),
    "gates": ((*PLAIN, "decay"), {"tokens": 130, "key": 32, "value": 16}, {}),
    "gates, one segment, no state": ((*PLAIN, "decay"), {"tokens": 64}, {}),
    "everything": (NAMES, {"tokens": 150, "key": 16, "value": 40}, {"sign": -1.0}),
    "values wider than a block": (NAMES, {"tokens": 66, "key": 24, "value": 96}, {}),
    "more segments than a scan takes at once": ((*PLAIN, "decay", "initial_state"), {"tokens": 390}, {}),
    "two sequences": (NAMES, {"tokens": 20, "batch": 2}, {}),
    "past": ((*PLAIN, "rates", "initial_state"), {"tokens": 100}, {"mode": "past", "chunk": 5}),
    "past, odd": (PLAIN, {"tokens": 100}, {"mode": "past", "chunk": 37}),
    "chunk": ((*PLAIN, "rates"), {"tokens": 100, "value": 32}, {"mode": "chunk", "chunk": 48, "sign": -1.0}),
    "strictly past tokens": (PLAIN, {"tokens": 70}, {"mode": "past"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    names, sizes, options = CASES[case]
    operands = draw(**sizes, names=names)
    exact = results(recurrence, operands, options, torch.float64)
    size, name = worst(results(causal_linear_attention, operands, options), exact)
    assert size < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_lose_no_more_than_the_recurrence_in_their_dtype(dtype):
    operands = draw(80, 32, 16, dtype=dtype)
    exact = results(recurrence, operands, {}, torch.float64)
    found = results(causal_linear_attention, operands, {})
    by_pytorch = results(recurrence, operands, {}, dtype)
    assert found["output"].dtype == found["q"].dtype == dtype
    assert found["state"].dtype == found["rates"].dtype == torch.float32
    for name, x in found.items():
        assert error(x, exact[name]) < min(1e-2, 2 * error(by_pytorch[name], exact[name])), name


def test_operands_may_be_views():
    """Queries, keys and values side by side in one projection; heads before tokens; widths apart."""
    sizes = {"tokens": 70, "heads": 2}
    operands = draw(**sizes)
    exact = results(recurrence, operands, {}, torch.float64)
    joined = torch.stack([operands[name] for name in PLAIN], 2)
    views = dict(zip(PLAIN, joined.unbind(2), strict=True)) | {"rates": operands["rates"].transpose(1, 2).contiguous().mT}
    views["v"] = operands["v"].transpose(1, 2).contiguous().transpose(1, 2)
    views["k"] = operands["k"].mT.contiguous().mT
    assert not any(x.is_contiguous() for x in views.values())
    size, name = worst(results(causal_linear_attention, operands | views, {}), exact)
    assert size < 1e-5, name


@pytest.mark.parametrize("names", [PLAIN, NAMES], ids=["plain", "everything"])
def test_packed_sequences_are_apart(names):
    bounds = [0, 1, 1, 90, 100]
    operands = draw(100, names=names, sequences=4)
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def apart(**o):
        each = []
        for n, (start, stop) in enumerate(pairwise(bounds)):
            part = {name: x[n : n + 1] if name == "initial_state" else x[:, start:stop] for name, x in o.items()}
            if stop > start:
                each.append(recurrence(**part))
            else:
                empty = part["q"].new_zeros(1, 1, 16, 16) if "initial_state" not in part else part["initial_state"]
                each.append((part["v"], empty))
        return torch.cat([y for y, _ in each], 1), torch.cat([state for _, state in each])

    exact = results(apart, operands, {}, torch.float64)
    size, name = worst(results(causal_linear_attention, operands, {"cu_seqlens": cu}), exact)
    assert size < 1e-5, name


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.sampled_from([60, 64, 128]))
def test_segments_cover_every_packed_sequence_once(lengths, size):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    table, offsets = segment_table(bounds, int(bounds[-1]), size)
    assert len(table) >= offsets[-1]
    assert (table[offsets[-1] :, 0] == -1).all()
    for n in range(len(lengths)):
        rows = table[offsets[n] : offsets[n + 1]]
        assert len(rows) >= 1
        assert (rows[:, 0] == n).all()
        assert rows[0, 1] == bounds[n]
        assert rows[-1, 2] == bounds[n + 1]
        assert (rows[1:, 1] == rows[:-1, 2]).all()
        assert (rows[:-1, 2] - rows[:-1, 1] == size).all()
        assert rows[-1, 2] - rows[-1, 1] <= size
        assert rows[:, 3].tolist() == [(i == 0) + 2 * (i == len(rows) - 1) for i in range(len(rows))]


def test_gates_that_are_shut_cut_the_sequence():
    operands = draw(140, heads=2, names=(*PLAIN, "decay", "initial_state"))
    operands["decay"][:, [3, 4, 40, 64, 100, 139]] = 0.0
    operands["decay"][:, 50] = 1e-30
    exact = results(recurrence, operands, {}, torch.float64)
    size, name = worst(results(causal_linear_attention, operands, {}), exact)
    assert size < 1e-5, name


GATES = {
    "1": lambda g: torch.ones(140, 2),
    "of all sizes": lambda g: 10 ** (-30 * torch.rand(140, 2, generator=g).square()),
    "1, some of 1e-30 among them": lambda g: torch.where(torch.rand(140, 2, generator=g) < 0.1, 1e-30, 1.0),
    "one of 1e-20": lambda g: torch.ones(140, 2).index_fill_(0, torch.tensor([70]), 1e-20),
} | {f"{x:.0e}": lambda g, x=x: torch.full((140, 2), x) for x in (1e-1, 1e-6, 1e-18, 1e-30, 0.0)}


@pytest.mark.parametrize("gates", GATES)
def test_gradients_of_gates_are_exact_at_any_gate(gates):
    """Every gate's, not only those that make up the norm: divided by its gate, a gradient would be lost below 1e-7."""
    operands = draw(140, heads=2)
    operands["decay"] = GATES[gates](torch.Generator().manual_seed(1))[None].to(DEVICE)
    exact = results(recurrence, operands, {}, torch.float64)
    found = results(causal_linear_attention, operands, {})
    size, name = worst(found, exact)
    assert size < 1e-5, name
    typical = exact["decay"].square().mean().sqrt()
    assert (found["decay"] - exact["decay"]).abs().max() < 1e-5 * typical


def test_goes_on_from_a_state():
    operands = draw(90, names=(*PLAIN, "rates", "decay"))
    exact, end = recurrence(**{name: x.double() for name, x in operands.items()})
    head, state = causal_linear_attention(**{name: x[:, :50] for name, x in operands.items()})
    tail, state = causal_linear_attention(**{name: x[:, 50:] for name, x in operands.items()}, initial_state=state)
    assert error(torch.cat((head, tail), 1), exact) < 1e-5
    assert error(state, end) < 1e-5


def test_gradients_of_outputs_alone_and_of_the_state_alone():
    operands = draw(70, names=PLAIN)
    for part in (0, 1):
        low = [x.clone().requires_grad_() for x in operands.values()]
        high = [x.double().requires_grad_() for x in operands.values()]
        outputs = causal_linear_attention(*low)[part], recurrence(*high)[part]
        cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        found = torch.autograd.grad(outputs[0], low, cotangent)
        exact = torch.autograd.grad(outputs[1], high, cotangent.double(), allow_unused=True, materialize_grads=True)
        for x, y in zip(found, exact, strict=True):
            assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("system", ["linear_attention", "gated"])
def test_equals_the_inner_loop(system):
    spec = kvbind.InnerLoop(network=kvbind.Linear(), chunk=1, visibility="token", retention=system == "gated")
    names = NAMES if spec.retention else ("q", "k", "v", "rates", "initial_state")
    o = draw(70, 16, 32, names=names)
    y, state = causal_linear_attention(**o)
    high = {name: x.double().cpu() for name, x in o.items()}
    gates = {"retention": high["decay"]} if spec.retention else {}
    weights = {"out": high["initial_state"]}
    z, after = kvbind.ttt(spec, weights, high["q"], high["k"], high["v"], lr=high["rates"], form="recurrent", **gates)
    assert error(y.cpu(), z) < 1e-5
    assert error(state.cpu(), after.weights["out"]) < 1e-5


def test_no_tokens_leave_the_state():
    o = draw(0)
    y, state = causal_linear_attention(**o)
    assert y.shape == (1, 0, 1, 16)
    assert torch.equal(state, o["initial_state"])
    assert causal_linear_attention(**o, return_state=False)[1] is None


def test_operators_keep_their_contract():
    operands = draw(20)
    low = [operands[name].requires_grad_() for name in NAMES]
    plan = 1, False, 1
    torch.library.opcheck(causal._forward, (*low, None, *plan, True))
    packed = [*low[:5], None, torch.tensor([0, 6, 20], device=DEVICE)]
    with torch.no_grad():
        _, _, starts = causal._forward(*packed, *plan, False)
        cotangent = torch.ones_like(low[2])
        torch.library.opcheck(causal._backward, (cotangent, None, *packed[:6], starts, packed[6], *plan, True, False))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_into_one_graph_for_any_length(packed):
    compiled = torch.compile(causal_linear_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 30):
        o = {name: x.requires_grad_() for name, x in draw(tokens, names=(*PLAIN, "rates")).items()}
        options = {"cu_seqlens": torch.tensor([0, 9, tokens], device=DEVICE)} if packed else {}
        found, exact = (function(**o, **options) for function in (compiled, causal_linear_attention))
        for x, y in zip(found, exact, strict=True):
            assert torch.equal(x, y)
        again = [torch.autograd.grad([y.sum() for y in ys], list(o.values())) for ys in (found, exact)]
        for x, y in zip(*again, strict=True):
            assert torch.equal(x, y)


BAD = {
    "q must be float32": (TypeError, lambda o: {"q": o["q"].double()}),
    "k must have q's shape": (ValueError, lambda o: {"k": o["k"][:, 1:]}),
    "v must be": (ValueError, lambda o: {"v": o["v"][:, 1:]}),
    "q must have a width": (ValueError, lambda o: {"q": o["q"][..., :8], "k": o["k"][..., :8]}),
    "rates must be": (ValueError, lambda o: {"rates": o["rates"][..., None]}),
    "initial_state must be": (ValueError, lambda o: {"initial_state": o["initial_state"][0]}),
    "mode must be one of": (ValueError, lambda o: {"mode": "tokens"}),
    "chunk must be at most 64": (ValueError, lambda o: {"mode": "past", "chunk": 65, "decay": None}),
    "decay must be None": (ValueError, lambda o: {"mode": "past", "chunk": 4}),
    "sign must be": (ValueError, lambda o: {"sign": 0.5}),
    "cu_seqlens must be int32": (TypeError, lambda o: {"cu_seqlens": torch.tensor([0.0, 20.0])}),
    "cu_seqlens must be .n": (ValueError, lambda o: {"cu_seqlens": torch.tensor([0])}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    kind, change = BAD[message]
    operands = draw(20)
    with pytest.raises(kind, match=message):
        causal_linear_attention(**(operands | change(operands)))


def spoil(operands, token, where, value):
    """Operands with one number of a token replaced."""
    x = operands[where].clone()
    x.select(1, token).flatten()[-1:].fill_(value)
    return operands | {where: x}


FUTURES = {
    "gates, values": (NAMES, {"tokens": 150}, {}, "v", 130),
    "gates, a tile's first": (NAMES, {"tokens": 150}, {}, "k", 64),
    "gates": (NAMES, {"tokens": 100}, {"sign": -1.0}, "decay", 70),
    "rates": ((*PLAIN, "rates"), {"tokens": 100}, {}, "rates", 50),
    "queries": (NAMES, {"tokens": 150}, {}, "q", 100),
    "wide": ((*PLAIN, "rates"), {"tokens": 70, "key": 24, "value": 80}, {}, "v", 66),
    "past": (PLAIN, {"tokens": 100}, {"mode": "past", "chunk": 5}, "v", 42),
    "chunk": ((*PLAIN, "rates"), {"tokens": 100}, {"mode": "chunk", "chunk": 16}, "k", 42),
    "packed": (NAMES, {"tokens": 150, "sequences": 3}, {"cu_seqlens": [0, 30, 100, 150]}, "v", 60),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("case", FUTURES)
def test_the_future_does_not_leak_into_the_past(case, value):
    """Outputs before a spoilt token and the gradients of a loss on them are those without it; later outputs are NaN."""
    names, sizes, options, where, token = FUTURES[case]
    options = dict(options)
    bounds = options.pop("cu_seqlens", None)
    if bounds:
        options["cu_seqlens"] = torch.tensor(bounds, device=DEVICE)
    operands = draw(**sizes, names=names)
    chunk = options.get("chunk", 1)
    first = token // chunk * chunk + (chunk if options.get("mode") == "past" else 0)
    sees = slice(first, 100 if bounds else None)
    unseen = torch.ones(sizes["tokens"], dtype=torch.bool, device=DEVICE)
    unseen[sees] = False

    def run(o):
        o = {name: x.detach().requires_grad_() for name, x in o.items()}
        y, state = causal_linear_attention(**o, **options)
        kept = y[:, unseen]
        grads = torch.autograd.grad(kept.square().sum(), list(o.values()))
        return y, state, dict(zip(o, grads, strict=True))

    y, state, grads = run(operands)
    z, after, found = run(spoil(operands, token, where, value))
    assert torch.equal(z[:, unseen], y[:, unseen])
    for name, x in grads.items():
        assert error(found[name], x) < 1e-6, name
        if name != "initial_state":
            assert (found[name][:, sees] == 0).all()
    if value != 1e30 and where != "q":
        assert not z[:, sees].isfinite().all(-1).any()
        assert not after[1 if bounds else 0].isfinite().all()
        if bounds:
            assert torch.equal(after[[0, 2]], state[[0, 2]])


@pytest.mark.parametrize(
    ("dtype", "width", "warpgroups", "most"),
    [
        (torch.float32, 512, True, 255),
        (torch.float32, 128, True, None),
        (torch.bfloat16, 512, True, None),
        (torch.bfloat16, 512, False, 255),
        (torch.bfloat16, 64, False, None),
    ],
)
def test_wide_passes_without_warp_groups_say_how_many_registers_they_take(monkeypatch, dtype, width, warpgroups, most):
    found = []

    class Noted:
        def repeat(self, known, name, tensors, describe):
            found.append(describe()[2].get("maxnreg"))

    monkeypatch.setattr(segment_pass, "_pass_kernel", Noted())
    monkeypatch.setattr(segment_pass, "by_warpgroups", lambda x: warpgroups)
    with torch.no_grad():
        causal_linear_attention(*(torch.zeros(1, 64, 1, width, dtype=dtype, device=DEVICE) for _ in range(3)))
    assert found == [most, most]


def test_calls_that_share_launches_agree_in_all_that_those_depend_on(monkeypatch):
    """Whatever a call is like, a launch that is looked up is the one that would have been described."""
    found, held = {}, []

    def repeat(self, known, name, tensors, describe):
        held.append(known)
        kinds = tuple(None if x is None else (x.dtype, x.device) for x in tensors)
        found.setdefault((id(known), self, name), set()).add(str((describe(), kinds)))

    monkeypatch.setattr(Launcher, "repeat", repeat)
    layouts = {
        "plain": lambda x: x,
        "heads outermost": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    }
    make = random.Random(0)
    for _ in range(1000):
        dtype = make.choice([torch.float32, torch.bfloat16])
        options = {"sign": make.choice([1.0, -1.0]), "return_state": make.random() < 0.8}
        names = ["q", "k", "v", *(name for name in NAMES[3:] if make.random() < 0.6)]
        if make.random() < 0.2:
            options |= {"mode": make.choice(["past", "chunk"]), "chunk": make.choice([16, 64])}
            names = [name for name in names if name != "decay"]
        tokens, batch = make.choice([(70, 1), (200, 2)])
        operands = draw(tokens, value=make.choice([16, 32]), batch=batch, heads=2, names=names, dtype=dtype)
        lie = layouts[make.choice(list(layouts))]
        operands = {name: lie(x) if name in "qkv" else x for name, x in operands.items()}
        wanted = [name for name in operands if make.random() < 0.8]
        if "chunk" not in options and make.random() < 0.1:
            operands = {name: x if name == "initial_state" else x[:1] for name, x in operands.items()}
            options["cu_seqlens"] = torch.tensor([0, *([3] if batch == 2 else []), tokens], device=DEVICE)
        torch.set_float32_matmul_precision(make.choice(["highest", "high"]))
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in operands.items()}
        results = [x for x in causal_linear_attention(**leaves, **options) if x is not None and x.requires_grad]
        if results:
            lie = layouts[make.choice(list(layouts))]
            results = results[make.randrange(len(results)) :]
            slopes = [lie(torch.ones_like(x)) for x in results]
            torch.autograd.grad(results, [leaves[n] for n in wanted], slopes, allow_unused=True)
    assert [list(descriptions) for descriptions in found.values() if len(descriptions) > 1] == []
    assert len(causal._cuts) > 100
