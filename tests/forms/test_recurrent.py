import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind import DepthwiseConv
from reference import run
from strategies import error, operands, small_sizes, specs

sizes = small_sizes(13)


@settings(max_examples=150)
@given(specs(), sizes)
def test_recurrent_is_the_inner_loop_that_torch_func_grad_gives(spec, size):
    o = operands(spec, **size)
    y, state = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="recurrent", **o.options)
    expected, finals = run(spec, o.weights, o.q, o.k, o.v, **o.options)
    assert error(y, expected) < 1e-10
    for b, heads in enumerate(finals):
        for h, final in enumerate(heads):
            for name, matrix in final.items():
                assert error(state.weights[name][b, h], matrix) < 1e-10


@settings(max_examples=40)
@given(
    specs(visibilities=("full",), networks=[DepthwiseConv(), DepthwiseConv(grid=(2, 8))]),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_depthwise_convolution_is_the_inner_loop_of_conv2d(spec, heads, width, seed, masked):
    o = operands(spec, tokens=16, heads=heads, value_width=width, seed=seed)
    mask = torch.arange(16) % 3 != 1 if masked else None
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, update_tokens=mask, **o.options)
    assert error(y, run(spec, o.weights, o.q, o.k, o.v, **o.options, update_tokens=mask)[0]) < 1e-10


@settings(max_examples=40)
@given(specs(visibilities=("full",)), st.integers(0, 2**20), st.sampled_from(["slice", "mask", "rows"]))
def test_update_tokens_alone_write_and_all_are_read(spec, seed, kind):
    o = operands(spec, tokens=9, seed=seed)
    chosen = {
        "slice": slice(2, 7),
        "mask": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1], dtype=torch.bool),
        "rows": torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) < 0.6,
    }[kind]
    if kind == "rows":
        chosen[:, 0] = True
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, update_tokens=chosen, **o.options)
    expected, _ = run(spec, o.weights, o.q, o.k, o.v, **o.options, update_tokens=chosen)
    assert error(y, expected) < 1e-10
