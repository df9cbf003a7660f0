import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbind import NewtonSchulz
from kvbind.inner import LANGUAGE_COEFFICIENTS, VIEWS_COEFFICIENTS
from kvbind.kernels.common import devices
from kvbind.kernels.launching.bound_kernel import stream_of
from kvbind.kernels.newton_schulz import one_program
from kvbind.kernels.newton_schulz import tiled as products
from kvbind.kernels.newton_schulz.one_program import fits_one_program
from kvbind.kernels.newton_schulz.operator import (
    BoundNewtonSchulz,
    newton_schulz,
    newton_schulz_backward,
    newton_schulz_forward,
    saved_shapes,
)
from strategies import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO = LANGUAGE_COEFFICIENTS[:2]


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def value_and_gradient(function, x, cotangent):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent.to(y.dtype))[0]


def errors(x, cotangent, coefficients, dtype, **options):
    """Relative errors of the kernels' and of PyTorch's value and gradient, against PyTorch in float64."""
    exact = value_and_gradient(NewtonSchulz(coefficients, torch.float64), x.double(), cotangent)
    ours = value_and_gradient(lambda z: newton_schulz(z, coefficients, dtype, **options), x, cotangent)
    by_pytorch = value_and_gradient(NewtonSchulz(coefficients, dtype), x, cotangent)
    return [[error(a, b) for a, b in zip(values, exact, strict=True)] for values in (ours, by_pytorch)]


SHAPES = [(2, 32, 32), (3, 5, 20), (1, 2, 24, 9), (48, 33), (2, 16, 150), (150, 24)]
"""Matrices of one program and larger ones, wide, tall and square, aligned and not."""


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_that_of_pytorch(shape):
    x, cotangent = random(*shape, scale=1e-2), random(*shape, seed=1)
    ours, _ = errors(x, cotangent, LANGUAGE_COEFFICIENTS, torch.float32)
    assert max(ours) < 1e-5


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, torch.bfloat16) for s in SHAPES] + [(s, torch.float16) for s in SHAPES[1::3]]
)
def test_low_precision_errs_no_more_than_pytorch_does(shape, dtype):
    x, cotangent = random(*shape, scale=1e-2), random(*shape, seed=1)
    ours, by_pytorch = errors(x, cotangent, LANGUAGE_COEFFICIENTS, dtype)
    assert ours[0] < min(2e-2, 2 * by_pytorch[0])
    assert ours[1] < 2 * by_pytorch[1]


@settings(max_examples=8)
@given(st.integers(1, 33), st.integers(2, 33), st.integers(1, 3), st.integers(0, 2**20))
def test_any_size_and_number_of_iterations(rows, columns, iterations, seed):
    x, cotangent = random(1, rows, columns, seed=seed), random(1, rows, columns, seed=seed + 1)
    ours, _ = errors(x, cotangent, VIEWS_COEFFICIENTS[:iterations], torch.float32)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("shape", [(1, 136, 130), (2, 40, 192)])
def test_every_tile_gives_the_same_result(shape, tile, monkeypatch):
    """Several tiles down and across, on and off the diagonal."""
    monkeypatch.setattr(products, "plan", lambda *_: products.TilePlan(tile, 64, 4, 2))
    x, cotangent = random(*shape), random(*shape, seed=1)
    ours, by_pytorch = errors(x, cotangent, TWO, torch.bfloat16)
    assert ours[0] < min(1e-2, 2 * by_pytorch[0])
    assert ours[1] < min(3e-2, 2 * by_pytorch[1])


def test_large_tiles_are_taken_where_they_fill_the_card():
    assert products.plan(384, 384, torch.bfloat16, 132) == products.TilePlan(128, 64, 8, 3, products.REGISTERS)
    assert products.plan(144, 384, torch.bfloat16, 132) == products.TilePlan(128, 64, 8, 3, 255)
    assert products.plan(72, 384, torch.bfloat16, 132).tile == 64
    assert products.plan(576, 48, torch.bfloat16, 132).tile == 64


@pytest.mark.parametrize(("n", "size"), [(1, 1), (59, 59), (117, 117), (118, 59), (512, 64)])
def test_groups_of_matrices_are_small_but_fill_the_card(n, size):
    assert products.group_size(n, 6, 8, 132) == size


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(2, 70), st.integers(33, 70), st.integers(0, 2**20))
def test_large_matrices_of_any_size_and_number(n, rows, columns, seed):
    x, cotangent = random(n, rows, columns, seed=seed), random(n, rows, columns, seed=seed + 1)
    ours, _ = errors(x, cotangent, TWO, torch.float32)
    assert max(ours) < 1e-5


@triton.jit
def list_items(
    out, n, group, items, iterations: tl.constexpr, symmetric: tl.constexpr, general: tl.constexpr, ahead: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, block)
    item = products._item(tl.minimum(place, items - 1), n, group, iterations, symmetric, general, ahead)
    for i in tl.static_range(5):
        tl.store(out + place * 5 + i, item[i].to(tl.int32), mask=place < items)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_tickets_stand_for_every_tile_once_and_wait_for_lower_ones_only(n, group, iterations, symmetric, general, ahead):
    both = 2 * symmetric if ahead else symmetric
    items = n * iterations * (2 * both + general)
    out = torch.full((items, 5), -1, dtype=torch.int32, device=DEVICE)
    list_items[(1,)](out, n, group, items, iterations, symmetric, general, ahead, triton.next_power_of_2(items))
    expected = {}
    for step in range(-1 if ahead else 0, iterations):
        width = both if 0 <= step < iterations - 1 else symmetric
        expected |= {(step, 0): width, (step, 1): width}
        if step >= 0:
            expected[step, 2] = general
    tickets = out.tolist()
    assert sorted(tuple(x[:4]) for x in tickets) == sorted(
        (batch, *stage, t) for batch in range(n) for stage, tiles in expected.items() for t in range(tiles)
    )
    finished = np.zeros(n, dtype=int)
    before, total = {}, 0
    for stage, tiles in expected.items():
        before[stage], total = total, total + tiles
    for batch, step, stage, _, need in tickets:
        assert need == before[step, stage]
        # of its matrix: all lower tickets' tiles, so those of earlier stages among them
        assert need <= finished[batch] < need + expected[step, stage]
        finished[batch] += 1


def test_groups_change_the_order_and_not_the_result(monkeypatch):
    x, cotangent = random(3, 20, 132), random(3, 20, 132, seed=1)
    expected = value_and_gradient(lambda z: newton_schulz(z, TWO), x, cotangent)
    monkeypatch.setattr(products, "group_size", lambda *_: 2)
    found = value_and_gradient(lambda z: newton_schulz(z, TWO), x, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_counts_start_at_zero_whatever_was_in_memory_and_end_at_the_number_of_tiles(monkeypatch):
    x, cotangent = random(2, 70, 132), random(2, 70, 132, seed=1)
    expected = value_and_gradient(lambda z: newton_schulz(z, TWO), x, cotangent)
    met, new = [], products.new_counts

    def dirty(*arguments):
        met.append(new(*arguments).fill_(7))
        return met[-1]

    monkeypatch.setattr(products, "new_counts", dirty)
    found = value_and_gradient(lambda z: newton_schulz(z, TWO), x, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # of two matrices two steps of A, B (3 tiles each) and X' (6); and of E, F, A and B (3 each) and dL/dX (6)
    for counts, tiles in zip(met, (2 * 12, 2 * 18), strict=True):
        assert counts[:: products.LINE].tolist() == [tiles * 2, tiles, tiles]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 16, 24), (2, 132, 70), (2, 70, 132)])
@pytest.mark.parametrize("keep", [False, True])
def test_bound_launches_give_the_same(size, dtype, keep):
    x, grad = random(*size), random(*size, seed=1)
    bound = BoundNewtonSchulz(size, TWO, dtype, keep, 8)
    want, saved = newton_schulz_forward(x, TWO, dtype, keep)
    for _ in range(2):
        found, kept = bound.forward(stream_of(x.device.index if x.is_cuda else -1), x, torch.float32)
        assert error(found, want.double()) < 1e-6
        if keep:
            assert all(torch.equal(a, b) for a, b in zip(kept, saved, strict=True))
            back = bound.backward(stream_of(x.device.index if x.is_cuda else -1), kept, grad, torch.bfloat16)
            again = newton_schulz_backward(saved, grad, TWO, dtype, torch.bfloat16)
            assert error(back, again.double()) < 1e-6


@pytest.mark.parametrize("size", [20, 132])
def test_strides_are_read_in_place_and_cotangents_may_be_broadcast(size):
    base = random(size, 2, 24, seed=3)
    x = base.permute(1, 2, 0)[:, ::2]
    cotangent = random(1, 1, 1, seed=4).expand(x.shape)
    exact = value_and_gradient(NewtonSchulz(TWO, torch.float64), x.double(), cotangent)
    leaf = base.clone().requires_grad_()
    y = newton_schulz(leaf.permute(1, 2, 0)[:, ::2], TWO, torch.float32)
    y.backward(cotangent)
    assert y.is_contiguous()
    assert error(y, exact[0]) < 1e-5
    assert error(leaf.grad.permute(1, 2, 0)[:, ::2], exact[1]) < 1e-5
    assert leaf.grad.permute(1, 2, 0)[:, 1::2].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 40, 132)])
def test_dtypes_of_result_and_gradient(shape):
    x = random(*shape).bfloat16().requires_grad_()
    y = newton_schulz(x, LANGUAGE_COEFFICIENTS)
    assert y.dtype == torch.bfloat16
    y = newton_schulz(x, LANGUAGE_COEFFICIENTS, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    (grad,) = torch.autograd.grad(y, x, random(*shape, seed=1))
    assert grad.dtype == torch.bfloat16
    exact = value_and_gradient(NewtonSchulz(dtype=torch.float64), x.double(), random(*shape, seed=1))
    assert error(y, exact[0]) < 1e-2
    assert error(grad, exact[1]) < 4e-2


@pytest.mark.parametrize("shape", [(2, 8, 20), (2, 8, 132)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_matrix_stays_zero_with_the_gradient_of_pytorch(shape, dtype):
    x, cotangent = random(*shape), random(*shape, seed=1)
    x[0] = 0
    ours, _ = errors(x[:1], cotangent[:1], TWO, dtype)
    y, grad = value_and_gradient(lambda z: newton_schulz(z, TWO, dtype), x, cotangent)
    assert y[0].abs().max() == 0
    assert torch.isfinite(grad).all()
    assert ours[1] < 2e-2


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 12, 140)])
def test_norms_near_and_far_from_the_epsilon(shape, scale):
    ours, _ = errors(random(*shape, scale=scale), random(*shape, seed=1), TWO, torch.float32)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 12, 140)])
def test_small_inputs_do_not_overflow_float16(shape):
    """Gradients grow with the inverse norm, here about 200, and do so in float32."""
    ours, _ = errors(random(*shape, scale=3e-4), random(*shape, seed=1, scale=1e2), TWO, torch.float16)
    assert max(ours) < 5e-3


@pytest.mark.parametrize("shape", [(2, 24, 20), (2, 20, 140)])
def test_the_plain_functions_are_the_differentiable_one_and_keep_only_when_asked(shape):
    x, cotangent = random(*shape), random(*shape, seed=1)
    y, grad = value_and_gradient(lambda z: newton_schulz(z, TWO), x, cotangent)
    result, kept = newton_schulz_forward(x, TWO, torch.bfloat16, keep=True)
    assert torch.equal(result, y)
    assert torch.equal(newton_schulz_backward(kept, cotangent, TWO, torch.bfloat16), grad)
    result, kept = newton_schulz_forward(x, TWO, torch.bfloat16, keep=False)
    assert torch.equal(result, y)
    assert all(part.numel() == 0 for part in kept)


@pytest.mark.parametrize(("room", "major"), [(99 << 10, 8), (163 << 10, 8), (227 << 10, 9), (227 << 10, 10)])
def test_large_matrices_go_tile_by_tile_where_blocks_have_little_room(monkeypatch, room, major):
    monkeypatch.setattr(devices, "shared_memory", lambda index: room)
    monkeypatch.setattr(one_program, "capability", lambda index: (major, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, x = torch.device("cuda", 0), torch.empty(3, 2, 65, 70)
    for here, roomy in ((device, room > 128 << 10 and major < 10), (x.device, True)):
        assert one_program.has_room(here) is roomy
        _, squares = saved_shapes(x.shape, 5, torch.bfloat16, True, here)
        assert squares == (6, 1 if roomy else products.pieces(65, 70))
        assert fits_one_program(64, 64, torch.bfloat16, roomy)


def test_an_empty_batch():
    x = torch.empty(0, 20, 30, device=DEVICE, requires_grad=True)
    y = newton_schulz(x, LANGUAGE_COEFFICIENTS)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(2, 24, 20), (1, 4, 140)])
def test_the_operators_keep_the_rules_of_pytorch(shape):
    x = random(*shape).requires_grad_()
    values = [1.5, -0.5, 0.1]
    torch.library.opcheck(torch.ops.kvbind.newton_schulz.default, (x, values, torch.bfloat16, torch.float32, True))
    _, states, squares = torch.ops.kvbind.newton_schulz(x.detach(), values, torch.bfloat16, torch.float32, True)
    arguments = (states, squares, random(*shape), values, torch.bfloat16, torch.float32)
    torch.library.opcheck(torch.ops.kvbind.newton_schulz_backward.default, arguments)


def test_a_value_computed_without_keeping_has_no_gradient():
    x = random(2, 16, 16).requires_grad_()
    y, _, _ = torch.ops.kvbind.newton_schulz(x, [1.5, -0.5, 0.0], torch.float32, torch.float32, False)
    with pytest.raises(RuntimeError, match="keep=False"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x must be a matrix"),
        ({"x": torch.zeros(3, 3, dtype=torch.float64)}, TypeError, "x's dtype must be"),
        ({"dtype": torch.float64}, TypeError, "dtype must be"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be"),
        ({"coefficients": ()}, ValueError, "coefficients must be"),
        ({"coefficients": (1.0, 2.0, 3.0)}, ValueError, "coefficients must be"),
        ({"coefficients": ((1.0, 2.0),)}, ValueError, "coefficients must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        newton_schulz(**({"x": torch.zeros(3, 3), "coefficients": LANGUAGE_COEFFICIENTS} | arguments))
