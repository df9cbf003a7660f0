"""The LaCT layer alone: its parameters, its inner loop, its shapes and its state."""

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvbind
from kvbind import GLU, MLP, DepthwiseConv, InnerLoop, Linear, SwiGLU
from kvbind.layers.fast_matrices import LowRankMatrix
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.layout import Layout
from kvbind.layers.plain_modules import is_a_product
from kvbind.layers.rotary import rotary_tables

FULL = kvbind.systems.lact_llm(chunk=8)
LADDER = kvbind.systems.ladder(FULL)


def layer(inner=FULL, **options):
    torch.manual_seed(0)
    return LactLayer(32, 4, 2, inner, 10, **{"low_rank": 4, "base_lr": 0.1, **options})


def names(module):
    return {name for name, _ in module.named_parameters()}


def test_the_full_system_has_the_released_parameters():
    built = layer(qkv_bias=True, qk_norm=True)
    assert {name: tuple(x.shape) for name, x in built.named_parameters()} == {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "q_norm.weight": (32,),
        "k_norm.weight": (32,),
        "o_proj.weight": (32, 32),
        "qk_scale": (32, 2),
        "qk_offset": (32, 2),
        "ttt_norm.weight": (16,),
        "ttt_scale_proj.weight": (2, 32),
        "ttt_scale_proj.bias": (2,),
        "w0.w_left": (2, 16, 4),
        "w0.w_right": (2, 4, 16),
        "w1": (2, 16, 16),
        "w2.w_left": (2, 16, 4),
        "w2.w_right": (2, 4, 16),
        "lr_proj.weight": (6, 32),
        "lr_proj.bias": (6,),
        "momentum_proj.0.weight": (2, 32),
        "momentum_proj.0.bias": (2,),
    }


@pytest.mark.parametrize(
    ("inner", "fast", "absent", "rates"),
    [
        (LADDER["rung2"], {"w0.w_left", "w1", "w2.w_right"}, {"retention_proj.0.weight"}, 1),
        (LADDER["rung3"], {"w1"}, {"w0.w_left", "w2.w_left"}, 1),
        (LADDER["rung4"], {"w1", "momentum_proj.0.weight"}, {"lr_proj.weight"}, 0),
        (LADDER["rung6"], {"w1"}, {"lr_proj.weight", "momentum_proj.0.weight"}, 0),
        (InnerLoop(network=GLU(), chunk=4), {"w0.w_left", "w1"}, {"w2.w_left"}, 2),
        (InnerLoop(network=MLP(), chunk=4), {"w_in", "w1"}, {"w0.w_left"}, 2),
        (InnerLoop(network=MLP(depth=2), chunk=4), {"w_in_0", "w_in_1", "w1"}, {"w_in"}, 3),
        (kvbind.systems.titans(chunk=4), {"retention_proj.0.weight", "momentum_proj.0.bias"}, set(), 2),
    ],
)
def test_only_what_the_inner_loop_asks_for_is_built(inner, fast, absent, rates):
    built = layer(inner)
    assert fast <= names(built)
    assert not absent & names(built)
    if rates:
        assert built.lr_proj.weight.shape == (2 * rates, 32)
    y, _ = built(torch.randn(2, 21, 32))
    y.square().sum().backward()
    unused = {name for name, p in built.named_parameters() if p.grad is None}
    assert unused == set()


def test_fast_matrices_are_stored_out_by_in():
    built = layer(hidden_multiplier=2, low_rank=None)
    assert built.w0.shape == (2, 32, 16)
    assert built.w1.shape == (2, 16, 32)
    weights = built.start_weights()
    assert {name: tuple(x.shape) for name, x in weights.items()} == {
        "gate": (2, 16, 32),
        "up": (2, 16, 32),
        "out": (2, 32, 16),
    }
    assert torch.equal(weights["up"], built.w2.mT)


def test_low_rank_matrices_are_a_product_and_half_the_identity():
    matrix = LowRankMatrix(3, 6, 4, 2, gain=0.5)
    matrix.reset_parameters()
    expected = matrix.w_left @ matrix.w_right
    for i in range(4):
        expected[:, i, i] += 0.5
    torch.testing.assert_close(matrix(), expected)


def test_rates_come_in_the_released_order_heads_outermost():
    built = layer()
    with torch.no_grad():
        built.lr_proj.weight.zero_()
        built.lr_proj.bias.copy_(torch.arange(6.0))
    rates = built.learning_rates(torch.randn(1, 5, 32))
    logits = {"gate": (0, 3), "out": (1, 4), "up": (2, 5)}
    offset = torch.log(torch.expm1(torch.tensor(0.1)))
    assert list(rates) == list(FULL.updated)
    for name, places in logits.items():
        expected = torch.nn.functional.softplus(torch.tensor(places, dtype=torch.float32) + offset)
        torch.testing.assert_close(rates[name], expected.expand(1, 5, 2))
    assert layer(LADDER["rung4"]).learning_rates(torch.randn(1, 5, 32)) == 1.0


def test_an_inner_loop_that_needs_less_can_be_assigned():
    built = layer()
    x = torch.randn(1, 21, 32)
    before, _ = built(x)
    for inner in (*LADDER.values(), FULL.replace(direction="ascent"), FULL.replace(query="key", steps=2, chunk=5)):
        built.inner = inner
        assert built.inner == inner
        y, _ = built(x)
        assert y.isfinite().all()
    built.inner = FULL
    assert torch.equal(built(x)[0], before)
    built.inner = LADDER["rung2"]
    rates = built.learning_rates(x)
    assert list(rates) == ["out"]
    with torch.no_grad():
        built.lr_proj.bias.copy_(torch.tensor([9.0, 0, 9, 9, 0, 9]))
        built.lr_proj.weight.zero_()
    torch.testing.assert_close(built.learning_rates(x)["out"], torch.full((1, 21, 2), 0.1))


@pytest.mark.parametrize(
    ("start", "inner", "kind", "words"),
    [
        ("rung0", FULL.replace(retention=True), ValueError, "retention=True"),
        ("rung6", LADDER["rung5"].replace(momentum=True), ValueError, "momentum=True"),
        ("rung6", LADDER["rung6"].replace(token_lr=True), ValueError, "token_lr=True and updates 'out'.*no matrix"),
        ("rung2", LADDER["rung2"].replace(update="all"), ValueError, "updates 'gate'.*learned rates for out"),
        ("rung6", LADDER["rung6"].replace(network=SwiGLU()), ValueError, "fast matrix 'gate'"),
        ("rung0", FULL.replace(network=MLP()), ValueError, "fast matrix 'in'"),
        ("rung0", kvbind.systems.lact_nvs(), ValueError, "visibility"),
        ("rung0", FULL.replace(visibility="chunk"), ValueError, "visibility"),
        ("rung0", InnerLoop(network=DepthwiseConv(), visibility="full"), ValueError, "DepthwiseConv"),
        ("rung0", "lact", TypeError, "inner must be a kvbind"),
    ],
)
def test_an_inner_loop_that_needs_what_was_not_built_is_refused(start, inner, kind, words):
    built = layer(LADDER[start])
    with pytest.raises(kind, match=words):
        built.inner = inner
    assert built.inner == LADDER[start]


def test_a_matrix_of_another_shape_is_refused():
    built = layer(hidden_multiplier=2)
    with pytest.raises(ValueError, match=r"'out' of shape \[16, 16\]; this layer has it as \[32, 16\]"):
        built.inner = FULL.replace(network=Linear())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_attn_heads": 5}, "num_attn_heads must divide hidden_size = 32; got 5"),
        ({"num_lact_heads": 3}, "num_lact_heads must divide hidden_size = 32; got 3"),
        ({"num_attn_heads": 32}, "even head width"),
        ({"window_size": 0}, "window_size"),
        ({"base_lr": 0.0}, "base_lr must be above 0"),
        ({"form": "fastest"}, "form"),
        ({"inner": kvbind.systems.lact_nvs()}, "visibility"),
    ],
)
def test_arguments_that_do_not_fit_raise(options, words):
    arguments = {"hidden_size": 32, "num_attn_heads": 4, "num_lact_heads": 2, "inner": FULL, "window_size": 8}
    with pytest.raises(ValueError, match=words):
        LactLayer(**{**arguments, **options})


@pytest.mark.parametrize("heads", [(4, 2), (2, 4), (4, 1), (1, 4)])
def test_a_state_continues_the_layer(heads):
    built = LactLayer(32, *heads, LADDER["rung6"], 10, low_rank=4).double()
    x = torch.randn(2, 33, 32, dtype=torch.float64)
    expected, none = built(x)
    assert none is None
    state, outputs = None, []
    for part in x.split([13, 1, 19], dim=1):
        y, state = built(part, state=state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-11)
    assert state.seen == (33, 33)


def test_a_packed_row_has_no_state():
    built = layer()
    x = torch.randn(1, 20, 32)
    layout = Layout.packed([0, 7, 20], 1, 20, x.device)
    assert layout.positions.tolist() == [[*range(7), *range(13)]]
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        built(x, layout, return_state=True)
    with pytest.raises(ValueError, match="state must be of 1 sequences"):
        built(x, state=built(torch.randn(2, 5, 32), return_state=True)[1])


def test_forms_agree_and_the_parallel_one_can_be_demanded():
    built = layer(LADDER["rung5"].replace(orthogonalize=None)).double()
    x = torch.randn(2, 33, 32, dtype=torch.float64)
    outputs = []
    for form in ("recurrent", "parallel", "auto"):
        built.form = form
        outputs.append(built(x)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-11)
    full = layer(form="parallel")
    with pytest.raises(kvbind.NoParallelFormError):
        full(torch.randn(1, 20, 32))


@pytest.mark.parametrize("inner", [FULL, LADDER["rung6"], kvbind.systems.titans(chunk=4)])
def test_the_call_of_a_layer_is_what_its_output_comes_from(inner):
    built, x = layer(inner, rotary=False).double(), torch.randn(2, 21, 32).double()
    call = built.call(x)
    output, state = call.run()
    scale = torch.nn.functional.silu(built.ttt_scale_proj(x)).unsqueeze(-1)
    with_fast, own = built(x, return_state=True)
    built.ttt_norm.weight.data.zero_()
    without, _ = built(x)
    built.ttt_norm.weight.data.fill_(1.0)
    expected = built.o_proj((built.ttt_norm(output) * scale).flatten(2))
    torch.testing.assert_close(with_fast - without, expected)
    for name, weight in own.fast.weights.items():
        torch.testing.assert_close(weight, state.weights[name])
    torch.testing.assert_close(call.linearize().output(), output)


def test_the_call_of_packed_sequences_has_their_boundaries():
    built, x = layer(), torch.randn(1, 21, 32)
    call = built.call(x, Layout.packed([0, 9, 21], 1, 21, x.device))
    assert call.cu_seqlens == (0, 9, 21)
    torch.testing.assert_close(call.run()[0][:, 9:], built.call(x[:, 9:]).run()[0])
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        call.linearize()


def test_a_slice_of_a_row_is_no_call_of_its_own():
    layout = Layout.rows(8, torch.device("cpu"))
    with pytest.raises(ValueError, match="layout must be of whole rows"):
        layer().call(torch.randn(1, 8, 32), dataclasses.replace(layout, sequence=object()))


def test_narrow_projections_in_one_product_are_those_of_their_own_and_heed_what_is_put_on_them():
    built, x = layer().double(), torch.randn(2, 21, 32, dtype=torch.float64)
    expected = {"lr": built.lr_proj(x), "momentum": built.momentum_proj[0](x), "scale": built.ttt_scale_proj(x)}
    for name, logits in built._logits(x).items():
        torch.testing.assert_close(logits, expected[name])
    before = built(x)[0]

    class Shifted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    def derived(projection):
        projection.__class__ = Shifted

    def replaced(projection):
        forward = projection.forward
        projection.forward = lambda x: forward(x) + 1

    for change in (lambda p: p.register_forward_hook(lambda _, args, y: y + 1), derived, replaced):
        changed = copy.deepcopy(built)
        change(changed.lr_proj)
        torch.testing.assert_close(changed._logits(x)["lr"], expected["lr"] + 1)
        assert not torch.allclose(changed(x)[0], before)


def test_projections_whose_weights_are_no_plain_tensors_are_left_to_themselves():
    class Packed(torch.Tensor):
        pass

    projection = layer().lr_proj
    assert is_a_product(projection)
    projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(Packed))
    assert not is_a_product(projection)


def test_one_more_token_of_a_state_takes_few_operators():
    class Launches(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            views = any(x.alias_info is not None for x in func._schema.returns) or "view" in func.name()
            if not views and "promote_types" not in func.name():
                self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    built = layer(kvbind.systems.lact_llm(chunk=32))
    with torch.no_grad():
        _, state = built(torch.randn(2, 40, 32), return_state=True)
        _, state = built(torch.randn(2, 1, 32), state=state, return_state=True)
        x, layout = torch.randn(2, 1, 32), Layout.rows(1, torch.device("cpu"), state.seen)
        tables = rotary_tables(layout.positions, built.head_width, built.rope_theta)
        with Launches() as seen:
            _, after = built(x, layout, tables, state, return_state=True)
    # most are those of queries, keys and outputs, for which kernels take two launches; a CPU looks whether three are finite
    assert len(seen.names) <= 67, sorted(seen.names)
    # the pending chunk is not copied, nor are its rates and gates computed, and one query needs no mask
    assert seen.names.count("aten::cat") <= 8
    assert not {"aten::softplus", "aten::sigmoid", "aten::arange", "aten::clone"} & set(seen.names)
    assert after.fast.pending_lengths == (10, 10)
    assert after.seen == (42, 42)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "apart"), [(8, True), (11, True), (7, False)])
def test_a_window_as_long_as_a_chunk_has_the_values_of_pending_tokens(window, apart, dtype, monkeypatch):
    one = LactLayer(32, 4, 2, kvbind.systems.lact_llm(chunk=8), window, low_rank=4).to(dtype)
    x, more = torch.randn(3, 21, 32, dtype=dtype), torch.randn(3, 30, 32, dtype=dtype)

    def run():
        """States behind a prompt whose rows have 21, 6 and 16 tokens, behind single tokens, and behind a piece."""
        with torch.no_grad():
            _, state = one(x, Layout(torch.arange(21)[None], lengths=(21, 6, 16)), return_state=True)
            states = [state]
            for part in more.split([1] * 13 + [17], 1):
                y, state = one(part, state=state, return_state=True)
                states.append(state)
        return y, [*states, state.select(torch.tensor([2, 0, 0]))]

    output, states = run()
    assert {state.values is not None for state in states} == {apart}
    assert {"pending.v" in state.held.tensors for state in states} == {not apart}
    monkeypatch.setattr(LactLayer, "pending_values", None)
    expected, others = run()
    assert torch.equal(output, expected)
    for found, other in zip(states, others, strict=True):
        found.fast.check()
        assert found.fast.pending_lengths == other.fast.pending_lengths
        assert list(found.fast.tensors) == list(other.fast.tensors)
        for name, y in found.fast.tensors.items():
            assert torch.equal(y, other.fast.tensors[name]), name
        values = other.fast.tensors["pending.v"]
        saved = sum(y.nbytes for y in other.tensors()) - sum(y.nbytes for y in found.tensors())
        assert saved == (values.nbytes if apart else 0)


def test_a_state_keeps_no_more_memory_than_it_has_numbers_for():
    one = LactLayer(32, 4, 2, kvbind.systems.ladder(kvbind.systems.lact_llm(chunk=8))["rung2"], 8, low_rank=4)
    with torch.no_grad():
        _, state = one(torch.randn(2, 45, 32), return_state=True)
    storages = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in state.tensors()}
    assert sum(storages.values()) <= sum(y.numel() * y.element_size() for y in state.tensors())
