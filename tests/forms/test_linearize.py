import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind import DepthwiseConv
from strategies import NETWORKS, error, operands, small_sizes, specs

sizes = small_sizes(13)
convolutions = specs(visibilities=("full",), networks=[DepthwiseConv(), DepthwiseConv(grid=(3, 4))])


def both(spec, o, **more):
    y, _ = kvbind.ttt(spec, o.weights, o.q, o.k, o.v, form="recurrent", **o.options, **more)
    return y, kvbind.linearize(spec, o.weights, o.q, o.k, o.v, **o.options, **more)


@settings(max_examples=200)
@given(specs(networks=NETWORKS), sizes)
def test_every_inner_loop_is_the_linear_attention_that_linearize_reads_off(spec, size):
    y, attention = both(spec, operands(spec, **size))
    assert error(attention.output(), y) < 1e-9


@settings(max_examples=30)
@given(convolutions, st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**20))
def test_depthwise_convolution_is_linear_attention_with_a_head_per_channel(spec, heads, width, seed):
    tokens = 12 if spec.network.grid else 16
    o = operands(spec, tokens=tokens, heads=heads, value_width=width, seed=seed)
    y, attention = both(spec, o, update_tokens=slice(2, 11))
    assert error(attention.output().reshape(y.shape), y) < 1e-9
    assert attention.q.shape == (2, tokens, heads * width, 9)


@settings(max_examples=150)
@given(specs(networks=NETWORKS), sizes)
def test_weights_times_values_plus_initial_output_is_the_output(spec, size):
    y, attention = both(spec, operands(spec, **size))
    for channel in range(y.shape[-1]):
        mixed = torch.einsum("bhtw,bwh->bth", attention.weights(channel), attention.v[..., channel])
        assert error(mixed + attention.initial_output()[..., channel], y[..., channel]) < 1e-8


@settings(max_examples=60)
@given(specs(networks=NETWORKS), sizes)
def test_matrix_is_the_mean_over_channels_with_the_writes_of_a_token_summed(spec, size):
    _, attention = both(spec, operands(spec, **size))
    weights = torch.stack([attention.weights(d) for d in range(size["value_width"])]).mean(0)
    expected = torch.zeros(*weights.shape[:3], size["tokens"], dtype=weights.dtype)
    for w, token in enumerate(attention.write_tokens.tolist()):
        expected[..., token] += weights[..., w]
    assert torch.allclose(attention.matrix(), expected, rtol=1e-8, atol=1e-10)


@settings(max_examples=60)
@given(specs(networks=NETWORKS, orthogonalize=None), sizes)
def test_decays_are_what_multiplies_the_scores_where_nothing_is_orthogonalized(spec, size):
    _, attention = both(spec, operands(spec, **size))
    scores = torch.einsum("bthf,bwhf->bhtw", attention.q, attention.k)
    assert torch.allclose(attention.weights(), scores * attention.decays(), rtol=1e-10, atol=1e-12)


@settings(max_examples=40)
@given(specs(visibilities=("past", "token"), networks=NETWORKS), sizes)
def test_causal_visibilities_put_no_weight_on_later_tokens(spec, size):
    _, attention = both(spec, operands(spec, **size))
    assert torch.equal(attention.matrix(), attention.matrix().tril())
