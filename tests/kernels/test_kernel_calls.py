"""Inner loops on kernels give what the recurrent form gives in float64: outputs, states and every gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import kvbind.kernels
from kvbind import GLU, MLP, InnerLoop, Linear, NewtonSchulz, SwiGLU, ttt
from kvbind.bench.harness.kernel_switch import operators_of
from kvbind.forms.on_kernels import dispatch, planned
from kvbind.inner.systems import vittt
from kvbind.kernels.common import operands as kernel_operands
from kvbind.kernels.common.devices import has_triton, interpreted

pytestmark = pytest.mark.skipif(
    not has_triton() or not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = NewtonSchulz(dtype=torch.float32)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("KVBIND_KERNELS", "force")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def draw(spec, batch, tokens, heads, key_width, value_width, hidden, dtype, seed=0, packed=None):
    """Operands whose values `dtype` holds exactly, with gradients."""
    make = torch.Generator().manual_seed(seed)

    def randn(*shape, kind=dtype):
        return torch.randn(*shape, generator=make).to(kind).to(DEVICE).requires_grad_()

    q, k, v = (randn(batch, tokens, heads, d) for d in (key_width, key_width, value_width))
    weights = spec.network.initial(heads, key_width, value_width, hidden, generator=make)
    operands = {"q": q, "k": k, "v": v}
    operands |= {f"weights.{name}": x.to(DEVICE).requires_grad_() for name, x in weights.items()}
    gate = (batch, tokens, heads)
    if spec.token_lr:
        operands["lr"] = (torch.rand(gate, generator=make) * 0.5 + 0.1).to(DEVICE).requires_grad_()
    for name in ("momentum", "retention"):
        if getattr(spec, name):
            operands[name] = (torch.rand(gate, generator=make) * 0.6 + 0.3).to(DEVICE).requires_grad_()
    return operands


def run(spec, operands, form, splits=None, **options):
    """Outputs and the last state of a call, or of several over `splits` of the tokens."""
    weights = {name.removeprefix("weights."): x for name, x in operands.items() if name.startswith("weights.")}
    named = {name: x for name, x in operands.items() if not name.startswith("weights.")}
    state, outputs, start = None, [], 0
    for stop in [*(splits or ()), operands["q"].shape[1]]:
        part = {name: x[:, start:stop] for name, x in named.items()}
        y, state = ttt(spec, weights if state is None else None, **part, state=state, form=form, **options)
        outputs.append(y)
        start = stop
    return torch.cat(outputs, 1), state


def compare(spec, operands, bound, form="parallel", splits=None, **options):
    """Hold a call on kernels to the recurrent form in float64, by relative norms."""
    exact = {name: x.detach().double().requires_grad_() for name, x in operands.items()}
    results = []
    for given, which in ((operands, form), (exact, "recurrent")):
        y, state = run(spec, given, which, splits if given is operands else None, **options)
        make = torch.Generator().manual_seed(7)
        loss = (y.double() * torch.randn(y.shape, generator=make).to(DEVICE)).sum()
        for x in (state.weights["out"], *state.momentum.values()):
            loss = loss + (x.double() * torch.randn(x.shape, generator=make).to(DEVICE)).sum()
        grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
        found = {"y": y, "state": state.weights["out"]} | dict(zip(given, grads, strict=True))
        results.append({name: x for name, x in found.items() if x is not None})
    ours, reference = results
    assert ours.keys() == reference.keys()
    assert ours["y"].dtype == operands["q"].dtype
    for name, want in reference.items():
        error = (ours[name].double() - want).norm() / want.norm().clamp(min=1e-30)
        assert error < bound, f"{name}: {error:.2e}"


RUNGS = {
    "rung2": InnerLoop(network=SwiGLU(), update="last", momentum=True, orthogonalize=FULL, chunk=64),
    "rung3": InnerLoop(network=Linear(), momentum=True, orthogonalize=FULL, chunk=64),
    "rung4": InnerLoop(network=Linear(), momentum=True, orthogonalize=FULL, chunk=64, token_lr=False),
    "rung5": InnerLoop(network=Linear(), orthogonalize=FULL, chunk=64, token_lr=False),
    "rung6": InnerLoop(network=Linear(), chunk=64, token_lr=False),
    "mlp": InnerLoop(network=MLP(), update="last", retention=True, momentum=True, chunk=64, visibility="chunk"),
    "glu": InnerLoop(network=GLU(), update="last", retention=True, chunk=64, direction="ascent", query="key"),
}


@pytest.mark.parametrize("name", RUNGS)
def test_parallel_form_of_every_rung_equals_the_recurrent_form(name):
    spec = RUNGS[name]
    # Newton-Schulz is slow when interpreted; with several heads it is held to bfloat16's bound below
    heads = 1 if spec.orthogonalize else 2
    operands = draw(spec, 2, 150, heads, 24, 40, 24 if name == "mlp" else 48, torch.float32)
    # Newton-Schulz magnifies the rounding of its input
    compare(spec, operands, 2e-5 if spec.orthogonalize else 1e-5)


@pytest.mark.parametrize("name", ["rung2", "rung3", "rung6"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_narrow_operands_keep_their_precision(name, dtype, bound):
    spec = RUNGS[name]
    compare(spec, draw(spec, 1, 200, 2, 32, 32, 32, dtype), bound)


@pytest.mark.parametrize("name", ["rung2", "mlp"])
def test_packed_sequences_stay_apart(name):
    spec = RUNGS[name]
    operands = draw(spec, 1, 300, 1, 16, 32, 16, torch.float32)
    weights = {k: v for k, v in operands.items() if k.startswith("weights.")}
    assert weights
    compare(spec, operands, 1e-5, cu_seqlens=[0, 0, 130, 131, 259, 300])


def test_packed_sequences_that_are_shorter_than_a_chunk_together_stay_apart():
    spec = RUNGS["rung6"]
    compare(spec, draw(spec, 1, 50, 1, 16, 16, 16, torch.float32), 1e-5, form="auto", cu_seqlens=[0, 43, 50])


def test_any_split_into_calls_gives_the_same():
    spec = RUNGS["rung2"]
    compare(spec, draw(spec, 2, 200, 1, 16, 16, 16, torch.float32), 1e-5, splits=[70, 71, 130])


@pytest.mark.parametrize(
    "spec",
    [
        InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True),
        InnerLoop(network=Linear(), chunk=8, visibility="token", direction="ascent"),
        InnerLoop(network=GLU(), update="last", chunk=16, visibility="past"),
        InnerLoop(network=Linear(), chunk=16, visibility="chunk", token_lr=False),
    ],
    ids=["gated", "token", "past", "chunk"],
)
def test_token_visibility_and_short_chunks_equal_the_recurrent_form(spec):
    compare(spec, draw(spec, 2, 85, 2, 16, 24, 16, torch.float32), 1e-5)


def test_packed_sequences_stay_apart_under_token_visibility():
    spec = InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True)
    compare(spec, draw(spec, 1, 120, 1, 16, 16, 16, torch.float32), 1e-5, cu_seqlens=[0, 40, 41, 41, 120])


@pytest.mark.parametrize("update_tokens", [None, slice(0, 90), "mask"])
def test_one_update_from_all_tokens_equals_the_recurrent_form(update_tokens):
    spec = InnerLoop(network=SwiGLU(), update="last", orthogonalize=FULL, visibility="full")
    operands = draw(spec, 2, 130, 1, 16, 16, 32, torch.float32)
    if update_tokens == "mask":
        update_tokens = torch.rand(2, 130, generator=torch.Generator().manual_seed(3)).to(DEVICE) < 0.5
    compare(spec, operands, 1e-5, form="auto", update_tokens=update_tokens)


LACT = InnerLoop(network=SwiGLU(), momentum=True, orthogonalize=FULL, normalize=True, chunk=64)


@pytest.mark.parametrize(
    "spec", [LACT, LACT.replace(update="last", visibility="chunk", retention=True)], ids=["rung0", "rung1"]
)
def test_recurrent_form_on_kernels_equals_that_in_float64(spec):
    compare(spec, draw(spec, 2, 150, 1, 16, 16, 32, torch.float32), 2e-5, form="auto")


def test_recurrent_form_goes_on_where_an_earlier_call_stopped():
    spec = LACT.replace(orthogonalize=None)
    compare(spec, draw(spec, 1, 200, 1, 16, 16, 16, torch.float32), 2e-5, form="auto", splits=[70, 71, 130])


@pytest.mark.parametrize("update_tokens", [None, slice(0, 66)])
def test_full_update_of_every_matrix_equals_the_recurrent_form(update_tokens):
    spec = LACT.replace(visibility="full", chunk=None, momentum=False)
    compare(spec, draw(spec, 2, 100, 1, 16, 16, 32, torch.float32), 2e-5, form="auto", update_tokens=update_tokens)


@pytest.mark.parametrize("name", ["token", "chunks", "recurrent", "vittt", "conv"])
def test_float16_runs_on_every_kernel_and_keeps_its_precision(name):
    spec = {
        "token": InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True),
        "chunks": InnerLoop(network=GLU(), update="last", chunk=16, visibility="past"),
        "recurrent": LACT.replace(orthogonalize=None),
        "vittt": vittt(),
        "conv": vittt("conv"),
    }[name]
    operands = draw(spec, 1, 81, 1, 16, 16, 16, torch.float16)
    assert operators_of(lambda: run(spec, operands, "auto"))
    compare(spec, operands, 5e-3, form="auto")


VITTT = {
    "heads": vittt(),
    "ascent": vittt().replace(direction="ascent", update="last", query="key"),
    "squared": vittt().replace(loss="squared"),
    "linear": vittt().replace(network=Linear(), update="last"),
    "conv": vittt("conv"),
}


@pytest.mark.parametrize("name", VITTT)
def test_vittt_branches_equal_the_recurrent_form(name):
    spec = VITTT[name]
    operands = draw(spec, 2, 49, 2, 16, 16, 16, torch.float32)
    compare(spec, operands, 1e-5, form="auto", lr=0.1)


@pytest.mark.parametrize("packed", [None, [0, 64, 128]], ids=["one", "packed"])
def test_room_for_pending_tokens_is_zeros_until_there_are_any(packed, tmp_path):
    spec = RUNGS["rung6"]
    operands = draw(spec, 1, 128, 1, 16, 16, 16, torch.float32)
    _, whole = run(spec, operands, "parallel", cu_seqlens=packed)
    _, part = run(spec, {name: x[:, :100] if x.dim() == 4 else x for name, x in operands.items()}, "parallel")
    room = whole.group("pending.")
    assert {name: x.shape for name, x in room.items()} == {
        name: (whole.batch, *x.shape[1:]) for name, x in part.group("pending.").items()
    }
    assert not any(x.any() for x in room.values())
    both = type(whole).cat([part, whole])
    both.save(tmp_path / "state.safetensors")
    loaded = type(whole).load(tmp_path / "state.safetensors", DEVICE)
    assert loaded.pending_lengths == (36,) + (0,) * whole.batch
    for name, x in loaded.tensors.items():
        assert torch.equal(x, torch.cat((part.tensors[name], whole.tensors[name]))), name


@pytest.mark.parametrize("name", ["rung2", "glu"])
def test_training_follows_inference_of_the_same_lengths(name):
    """What a first call keeps for later ones, the tables of its chunks, has to serve gradients too."""
    spec = RUNGS[name]
    operands = draw(spec, 1, 77, 1, 16, 16, 16, torch.float32)
    with torch.inference_mode():
        y, _ = run(spec, {key: x.detach() for key, x in operands.items()}, "parallel")
    again, _ = run(spec, operands, "parallel")
    again.sum().backward()
    assert torch.equal(again, y)
    assert operands["v"].grad.isfinite().all()


def test_compiles_into_one_graph_with_the_tables_as_constants():
    """One length is whole chunks, the other is not; the compiled call makes no tables of its own."""
    spec = RUNGS["rung2"].replace(orthogonalize=None)
    operations = []

    def backend(graph, inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda o: run(spec, o, "parallel")[0], fullgraph=True, backend=backend)
    for tokens in (128, 70):
        operands = draw(spec, 1, tokens, 1, 16, 16, 16, torch.float32)
        y, z = (function(operands) for function in (lambda o: run(spec, o, "parallel")[0], compiled))
        assert torch.allclose(y, z, atol=1e-6)
        ours, theirs = (torch.autograd.grad(x.square().sum(), operands["k"]) for x in (y, z))
        assert torch.allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert any("kvbind.chunked" in x for x in operations)
    assert not any("torch.tensor" in x for x in operations)


def test_sums_of_outputs_and_of_tokens_have_gradients_without_memory_of_their_own():
    """The gradients that come back are expanded: all of their strides, or some, are 0."""
    for spec, form in ((RUNGS["rung6"], "parallel"), (LACT.replace(orthogonalize=None), "auto"), (VITTT["heads"], "auto")):
        operands = draw(spec, 1, 70, 1, 16, 16, 16, torch.float32)
        for reduced in (lambda y: y.sum(), lambda y: y.sum((0, 1, 2)) @ torch.arange(16.0).to(y)):
            found = []
            for given in (operands, {name: x.detach().double().requires_grad_() for name, x in operands.items()}):
                loss = reduced(run(spec, given, form if given is operands else "recurrent")[0])
                found.append(torch.autograd.grad(loss, given["v"])[0].double())
            assert (found[0] - found[1]).norm() < 2e-5 * found[1].norm()


def test_kernels_are_really_taken(monkeypatch):
    """What the tests above compare with the recurrent form is the kernels' work."""
    taken = []

    def noted(row):
        return replace(row, run=lambda spec, call: taken.append(row.folder) or row.run(spec, call))

    monkeypatch.setattr(dispatch, "KERNELS", tuple(map(noted, dispatch.KERNELS)))
    # calls like earlier ones do not come to the table
    monkeypatch.setattr(planned, "learn", lambda key, spec, *_: planned.Kind(spec, None))
    monkeypatch.setattr(planned, "_kinds", {})
    token = InnerLoop(network=Linear(), chunk=1, visibility="token")
    for spec, tokens in ((RUNGS["rung6"], 70), (token, 40), (vittt(), 16), (vittt("conv"), 16), (LACT, 64)):
        operands = draw(spec, 1, tokens, 1, 16, 16, 16, torch.float32)
        run(spec, operands, "auto")
        monkeypatch.setenv("KVBIND_KERNELS", "0")
        run(spec, operands, "auto")
        monkeypatch.setenv("KVBIND_KERNELS", "force")
    assert taken == ["chunked", "causal", "full_glu", "full_conv", "recurrent"]


def test_every_row_names_a_folder_of_kernels_with_an_operator():
    folders = Path(kvbind.kernels.__file__).parent
    assert all((folders / row.folder / "operator.py").exists() for row in dispatch.KERNELS)


class Squared(SwiGLU):
    """A network of one's own, derived from one that has kernels."""

    def features(self, weights, x):
        return super().features(weights, x).square()


class Doubled(GLU):
    """Another, whose gate is its own."""

    def gate(self, weights, x):
        return 2 * super().gate(weights, x)


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
@pytest.mark.parametrize("network", [Squared(), Doubled()])
@pytest.mark.parametrize(("visibility", "chunk"), [("past", 64), ("token", 1), ("full", None)])
def test_networks_of_ones_own_do_not_run_as_those_they_derive_from(network, visibility, chunk, form, monkeypatch):
    if visibility == "full" and form == "parallel":
        pytest.skip("there is one form")
    spec = InnerLoop(network=network, update="last", visibility=visibility, chunk=chunk)
    operands = draw(spec, 1, 70, 2, 16, 16, None, torch.float32)
    found, _ = run(spec, operands, form)
    monkeypatch.setenv("KVBIND_KERNELS", "0")
    torch.testing.assert_close(found, run(spec, operands, form)[0], rtol=0, atol=0)


@pytest.fixture
def default_dtype(monkeypatch):
    """Another default dtype of PyTorch, as loaders of models set it."""
    monkeypatch.setattr(kernel_operands, "_shared", {})
    monkeypatch.setattr(planned, "_kinds", {})
    monkeypatch.setattr(planned, "_plans", {})
    monkeypatch.setattr(planned, "_last", {})
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


DEFAULT = {
    "planned": (RUNGS["rung6"].replace(token_lr=True, momentum=True), 0.3, torch.float16, 8e-3),
    "chunked": (RUNGS["glu"], 0.003, torch.float32, 2e-5),
    "recurrent": (InnerLoop(network=SwiGLU(), momentum=True, retention=True, chunk=16), 0.003, torch.float32, 2e-5),
    "causal": (InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True), 0.3, torch.float32, 2e-5),
    "affine": (InnerLoop(network=Linear(), loss="squared", chunk=1, visibility="token"), 0.02, torch.float32, 2e-5),
}


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", DEFAULT)
def test_kernels_compute_alike_whatever_dtype_tensors_have_by_default(name, other, default_dtype):
    spec, rate, dtype, bound = DEFAULT[name]
    operands = draw(spec, 1, 130, 1, 16, 16, 16, dtype)
    del operands["lr"]
    results = []
    for default in (other, torch.float32):
        default_dtype(default)
        y, state = run(spec, operands, "auto", lr=rate)
        loss = (y.float() * y.detach().float().sign()).sum() + state.weights["out"].abs().sum()
        grads = torch.autograd.grad(loss, list(operands.values()), allow_unused=True)
        results.append([y, *state.tensors.values(), *(x for x in grads if x is not None)])
    for ours, usual in zip(*results, strict=True):
        assert ours.dtype == usual.dtype
        assert (ours.double() - usual.double()).norm() <= bound * usual.double().norm()
