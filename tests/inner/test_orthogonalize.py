import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind import NewtonSchulz
from kvbind.forms.attention.linear_attention import polynomial
from kvbind.inner import LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS
from reference import newton_schulz
from strategies import error


@settings(max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS]), st.integers(0, 2**20)
)
def test_it_is_the_iteration_of_the_specification_and_a_polynomial_from_the_left(rows, columns, coefficients, seed):
    x = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    iteration = NewtonSchulz(coefficients, torch.float64)
    y = iteration(x)
    for i in range(2):
        for j in range(3):
            assert error(y[i, j], newton_schulz(x[i, j], coefficients)) < 1e-11
    assert error(polynomial(iteration, x) @ x, y) < 1e-9


def test_singular_values_come_near_one():
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for coefficients in (LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS):
        s = torch.linalg.svdvals(NewtonSchulz(coefficients, torch.float64)(x))
        assert s.min() > 0.6
        assert s.max() < 1.3


def test_dtype_is_literal_below_float32_and_full_precision_from_there():
    x = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(x, LANGUAGE_COEFFICIENTS)
    assert error(NewtonSchulz(dtype=torch.float32)(x), exact) < 1e-12
    assert error(NewtonSchulz(dtype=torch.float32)(x.float()), exact) < 1e-4
    assert 1e-4 < error(NewtonSchulz()(x), exact) < 0.2
    assert NewtonSchulz()(x).dtype == torch.float64


def test_a_zero_matrix_stays_zero_with_a_finite_gradient():
    x = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    NewtonSchulz(dtype=torch.float64)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficients": ()}, "coefficients must be"),
        ({"coefficients": ((1.0, 2.0),)}, "coefficients must be"),
        ({"coefficients": (("a", 1.0, 2.0),)}, "coefficients must be"),
        ({"dtype": torch.int32}, "dtype must be"),
        ({"dtype": "bfloat17"}, "dtype must be"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NewtonSchulz(**arguments)
