import pytest
import torch

from kvbind import MLP, DepthwiseConv, InnerLoop, Linear, NewtonSchulz, SwiGLU, systems
from kvbind.layers.vittt import VitttLayer, narrow, rotary_angles, rotate_pairs
from kvbind.models.vittt import INNER_LOOPS

GLU_LOOP, CONV_LOOP = systems.vittt(), systems.vittt("conv")


def layer_and_input(grid=(3, 5), dim=16, heads=2, **fields):
    torch.manual_seed(0)
    layer = VitttLayer(dim, heads, **fields)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return layer, torch.randn(2, grid[0] * grid[1], dim)


def test_parameters_have_the_released_names_and_shapes():
    layer = VitttLayer(48, 3)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "qkv.weight": (192, 48),
        "qkv.bias": (192,),
        "w1": (1, 3, 16, 16),
        "w2": (1, 3, 16, 16),
        "w3": (16, 1, 3, 3),
        "proj.weight": (48, 64),
        "proj.bias": (48,),
    }
    assert VitttLayer(48, 3, qkv_bias=False).qkv.bias is None


def test_the_rate_of_one_third_of_the_mean_scales_the_values_of_the_dot_product():
    layer, x = layer_and_input()
    heads, conv = layer.calls(x, (3, 5))
    for call in (heads, conv):
        expected, _ = call.run()
        scaled = type(call)(call.inner, call.weights, call.q, call.k, call.v / (3 * 15), 1.0)
        torch.testing.assert_close(scaled.run()[0], expected, rtol=1e-6, atol=1e-6)
        unscaled = type(call)(call.inner, call.weights, call.q, call.k, call.v, 1.0)
        assert (unscaled.run()[0] - expected).abs().max() > 0.05


def test_the_branches_are_the_linear_attention_that_linearize_says():
    layer, x = layer_and_input()
    layer = layer.double()
    for call in layer.calls(x.double(), (3, 5)):
        # a convolution's channels are heads of their own
        torch.testing.assert_close(call.linearize().output().flatten(2), call.run()[0].flatten(2), rtol=0, atol=1e-10)


def test_an_image_is_mixed_without_the_others_of_its_batch():
    layer, x = layer_and_input()
    both = layer(x, (3, 5))
    torch.testing.assert_close(layer(x[1:], (3, 5)), both[1:], rtol=0, atol=1e-6)


def test_rows_of_the_grid_matter():
    layer, x = layer_and_input()
    assert (layer(x, (3, 5)) - layer(x, (5, 3))).abs().max() > 0.05


def test_assigned_inner_loops_run_and_keep_the_parameters():
    layer, x = layer_and_input()
    before, names = layer(x, (3, 5)), list(layer.state_dict())
    layer.inner = GLU_LOOP.replace(network=Linear(), update="last")
    without_gate = layer(x, (3, 5))
    layer.inner_conv = CONV_LOOP.replace(query="key")
    with_key = layer(x, (3, 5))
    assert (before - without_gate).abs().max() > 0.05
    assert (without_gate - with_key).abs().max() > 0.05
    assert list(layer.state_dict()) == names
    layer.inner, layer.inner_conv = GLU_LOOP, CONV_LOOP
    torch.testing.assert_close(layer(x, (3, 5)), before)


@pytest.mark.parametrize("network", [SwiGLU(), MLP(), Linear()])
def test_the_heads_may_be_any_network_that_reads_single_tokens(network):
    layer, x = layer_and_input(inner=GLU_LOOP.replace(network=network))
    layer(x, (3, 5)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in layer.parameters())


REFUSED = {
    "causal": (GLU_LOOP.replace(visibility="past", chunk=4), ValueError, "inner's visibility must be 'full'"),
    "momentum": (GLU_LOOP.replace(momentum=True), ValueError, "momentum=False"),
    "retention": (GLU_LOOP.replace(retention=True), ValueError, "retention=False"),
    "learned rates": (GLU_LOOP.replace(token_lr=True), ValueError, "token_lr=False"),
    "another network": (GLU_LOOP.replace(network=MLP()), ValueError, "'in'.*has none of that name"),
    "a convolution": (CONV_LOOP, ValueError, "a DepthwiseConv is for inner_conv"),
    "a name": ("rung3", TypeError, "inner must be a kvbind.InnerLoop; got str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inner_loops_that_do_not_fit_are_refused_and_change_nothing(case):
    inner, error, message = REFUSED[case]
    layer = VitttLayer(16, 2)
    with pytest.raises(error, match=message):
        layer.inner = inner
    assert layer.inner == GLU_LOOP


@pytest.mark.parametrize(
    ("inner", "error", "message"),
    [
        (GLU_LOOP, ValueError, "inner_conv's network must be a DepthwiseConv"),
        (CONV_LOOP.replace(token_lr=True), ValueError, "inner_conv must have token_lr=False"),
        (CONV_LOOP.replace(momentum=True), ValueError, "inner_conv must have momentum=False"),
        (None, TypeError, "inner_conv must be a kvbind.InnerLoop; got NoneType"),
    ],
)
def test_inner_loops_that_do_not_fit_the_convolution_are_refused(inner, error, message):
    layer = VitttLayer(16, 2)
    with pytest.raises(error, match=message):
        layer.inner_conv = inner
    assert layer.inner_conv == CONV_LOOP


def test_grids_that_do_not_fit_are_refused():
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match=r"as many places as x has tokens, 15; got 4 x 4"):
        layer(x, (4, 4))
    layer.inner_conv = CONV_LOOP.replace(network=DepthwiseConv((3, 5)))
    layer(x, (3, 5))
    with pytest.raises(ValueError, match="grid must be 3 x 5, which inner_conv's network is made for; got 5 x 3"):
        layer(x, (5, 3))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide dim = 16; got 3"):
        VitttLayer(16, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_updates_from_large_activations_in_half_precision_are_finite_and_right(dtype, orthogonalize):
    inner = GLU_LOOP.replace(clip=False, orthogonalize=NewtonSchulz(dtype=torch.float32)) if orthogonalize else GLU_LOOP
    layer, x = layer_and_input(grid=(8, 8), inner=inner)
    with torch.no_grad():
        # keys and values in the thousands, queries as they were
        for start, width in ((16, 32), (56, 16)):
            layer.qkv.weight[start : start + width] *= 2000
    calls = layer.calls(x, (8, 8))
    for call in calls:
        half = type(call)(
            call.inner, call.weights, call.q, call.k.detach().to(dtype).requires_grad_(), call.v.detach().to(dtype), call.lr
        )
        # what half precision would have to hold
        assert not (half.k.float().mT @ half.v.float()).to(torch.float16).isfinite().all()
        output, state = half.run()
        same, _ = type(call)(call.inner, call.weights, call.q, half.k.float(), half.v.float(), call.lr).run()
        assert state.weights["out"].dtype == torch.float32
        assert all(weight.isfinite().all() for weight in state.weights.values())
        torch.testing.assert_close(output, same, rtol=1e-5, atol=1e-5)
        output.square().sum().backward(retain_graph=True)
        assert half.k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["autocast", "cast"])
def test_half_precision_at_large_activations_gives_finite_outputs_and_gradients(dtype, mode):
    layer, x = layer_and_input(grid=(8, 8))
    x = x * 20
    with torch.no_grad():
        exact = layer(x, (8, 8))
    if mode == "cast":
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        output = layer(x, (8, 8))
    assert output.dtype == dtype
    assert exact.abs().max() > 1000
    assert ((output.float() - exact).norm() / exact.norm()) < (0.02 if dtype == torch.float16 else 0.1)
    output.float().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("row", [row for row in INNER_LOOPS if row != "rung6"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipped_updates_do_not_overflow_in_any_row(row, dtype):
    inner, inner_conv = INNER_LOOPS[row]
    layer, x = layer_and_input(grid=(8, 8), inner=inner, inner_conv=inner_conv)
    with torch.no_grad():
        for start, width in ((16, 32), (56, 16)):  # keys and values in the thousands, queries as they were
            layer.qkv.weight[start : start + width] *= 1000
    if row == "key":  # which is read too
        layer.qkv.weight.data[[*range(16, 32), *range(56, 64)]] /= 1000
    with torch.autocast("cpu", dtype=dtype):
        calls = layer.calls(x, (8, 8))
        assert max(float(call.v.detach().abs().max()) for call in calls) > 1000
        output = layer(x, (8, 8))
    for call in calls:
        for name, weight in call.run()[1].weights.items():
            # what clipping promises of every output channel, to rounding
            moved = torch.linalg.vector_norm(weight - call.weights[name], dim=call.inner.network.input_axes)
            assert float(moved.detach().max()) < 1 + 1e-5, name
    assert output.isfinite().all()
    output.float().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


def test_outputs_beyond_float16_saturate():
    x = torch.tensor([1e9, -1e9, 5.0])
    assert narrow(x, torch.float16).tolist() == [65504.0, -65504.0, 5.0]
    assert narrow(x, torch.bfloat16).float().tolist() == pytest.approx([1e9, -1e9, 5.0], rel=0.01)


def test_the_layer_compiles_as_one_graph():
    layer, x = layer_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, output = layer(x, (3, 5)), compiled(x, (3, 5))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    expected.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    output.square().sum().backward()
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


def test_rotary_scores_depend_on_the_distance_between_places_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 12), torch.randn(1, 1, 12)
    angles = rotary_angles((6, 9), 12)
    turned_q, turned_k = rotate_pairs(q.expand(1, 54, 12), angles)[0], rotate_pairs(k.expand(1, 54, 12), angles)[0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0].norm(dim=-1).expand(54))
    scores = (turned_q @ turned_k.T).reshape(6, 9, 6, 9)
    torch.testing.assert_close(scores[1, 2, 3, 7], scores[3, 3, 5, 8])
    assert abs(scores[1, 2, 3, 7] - scores[1, 2, 4, 7]) > 1e-3
    assert abs(scores[1, 2, 3, 7] - scores[1, 2, 3, 8]) > 1e-3
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_angles((2, 2), 6)


def test_an_inner_loop_from_plain_data_runs():
    inner = InnerLoop.from_dict({"network": "GLU", "clip": True, "visibility": "full", "token_lr": False, "steps": 3})
    layer, x = layer_and_input(inner=inner)
    one = layer(x, (3, 5))
    layer.inner = inner.replace(steps=1)
    assert (one - layer(x, (3, 5))).abs().max() > 0.01
