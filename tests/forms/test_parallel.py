import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvbind
from strategies import error, operands, parallel_specs

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "tokens": st.integers(1, 30),
        "heads": st.integers(1, 2),
        "key_width": st.integers(1, 4),
        "value_width": st.integers(1, 4),
        "hidden": st.integers(1, 5),
        "seed": st.integers(0, 2**20),
    }
)


def pair(spec, o, cut=0):
    """Outputs and end states of both forms, after a first call over `cut` tokens."""
    results = []
    for form in ("recurrent", "parallel"):
        state = None
        if cut:
            head = o.span(0, cut)
            _, state = kvbind.ttt(spec, head.weights, head.q, head.k, head.v, form="recurrent", **head.options)
        tail = o.span(cut, o.q.shape[1])
        results.append(kvbind.ttt(spec, o.weights, tail.q, tail.k, tail.v, form=form, state=state, **tail.options))
    return results


@settings(max_examples=200)
@given(parallel_specs(visibilities=("past", "chunk", "token")), sizes, st.integers(0, 29))
def test_parallel_equals_recurrent(spec, size, cut):
    o = operands(spec, **size)
    (y, state), (z, after) = pair(spec, o, min(cut, size["tokens"] - 1))
    assert error(z, y) < 1e-10
    assert after.pending_lengths == state.pending_lengths
    for name, x in state.tensors.items():
        assert torch.allclose(after.tensors[name], x, rtol=1e-9, atol=1e-11), name
