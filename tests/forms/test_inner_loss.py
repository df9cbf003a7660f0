import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from kvbind import InnerLoop, Linear, systems
from reference import losses, run
from strategies import operands, specs


@settings(max_examples=60)
@given(specs(), st.integers(1, 9), st.sampled_from(["before", "after"]), st.integers(0, 2**20))
def test_inner_loss_is_the_mean_over_each_chunk_along_the_trajectory(spec, tokens, at, seed):
    o = operands(spec, batch=1, tokens=tokens, heads=1, seed=seed)
    found = kvbind.inner_loss(spec, o.weights, o.k, o.v, at=at, **o.options)
    size = spec.chunk or tokens
    assert found.shape == (1, 1, -(-tokens // size))
    w = {name: x[0] for name, x in o.weights.items()}

    def weights_after(stop):
        """The fast weights after the tokens before `stop`, its last chunk shorter if need be."""
        if stop == 0:
            return w
        if spec.chunk is None or stop % size == 0:
            part = o.span(0, stop)
            return run(spec, o.weights, part.k, part.k, part.v, **part.options)[1][0][0]
        return None

    for c, start in enumerate(range(0, tokens, size)):
        stop = min(start + size, tokens)
        own = weights_after(stop if at == "after" else start)
        if own is None:
            continue
        expected = losses(spec, own, o.k[0, start:stop, 0], o.v[0, start:stop, 0]).mean()
        assert torch.allclose(found[0, 0, c], expected, rtol=1e-9, atol=1e-11)


def test_more_inner_steps_lower_the_loss_they_minimize():
    base = InnerLoop(network=Linear(), loss="squared", visibility="full")
    o = operands(base, tokens=16, rate=0.02)
    losses = [kvbind.inner_loss(base.replace(steps=s), o.weights, o.k, o.v, lr=0.02).mean() for s in (1, 2, 4, 8)]
    before = kvbind.inner_loss(base, o.weights, o.k, o.v, lr=0.02, at="before").mean()
    assert before > losses[0] > losses[1] > losses[2] > losses[3]


def test_only_update_tokens_count():
    spec = systems.vittt()
    o = operands(spec, tokens=6)
    a = kvbind.inner_loss(spec, o.weights, o.k, o.v, update_tokens=slice(0, 4))
    b = kvbind.inner_loss(spec, o.weights, o.k[:, :4], o.v[:, :4])
    c = kvbind.inner_loss(spec, o.weights, o.k, o.v, update_tokens=torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool))
    assert torch.allclose(a, b)
    assert torch.allclose(c, b)


def test_bad_arguments_are_refused_by_name():
    spec = systems.lact_llm(chunk=4)
    o = operands(spec)
    with pytest.raises(ValueError, match="momentum must be a number or a tensor"):
        kvbind.inner_loss(spec, o.weights, o.k, o.v)
    with pytest.raises(ValueError, match="at must be one of 'before', 'after'; got 'during'"):
        kvbind.inner_loss(spec, o.weights, o.k, o.v, at="during", **o.options)
