"""Products of equal chunks give what plain PyTorch gives in float64, wherever their tokens lie, and write nothing else."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvbind.kernels.common.devices import has_triton, interpreted, multiprocessors

pytestmark = pytest.mark.skipif(
    not has_triton() or not (interpreted() or torch.cuda.is_available()), reason="needs Triton's interpreter or a GPU"
)
if has_triton():
    from kvbind.kernels.chunked.prefix_sums import MatrixOrder, bound_scan
    from kvbind.kernels.equal_chunks import tma_products as products
    from kvbind.kernels.equal_chunks.tma_products import Theta, TokenRows
    from kvbind.kernels.launching.bound_kernel import Block, stream_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAM = stream_of(0 if DEVICE == "cuda" else -1)
LIKE = torch.empty(0, dtype=torch.float16, device=DEVICE)
ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
    "tanh": torch.tanh, "identity": lambda x: x,
}  # fmt: skip


def randn(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tokens(batch, length, heads, width, layout="tokens", seed=0):
    if layout == "heads":
        return randn(batch, heads, length, width, seed=seed).transpose(1, 2)
    if layout == "sliced":
        return randn(batch, length + 3, heads, 3 * width, seed=seed)[:, 2:-1, :, width : 2 * width]
    return randn(batch, length, heads, width, seed=seed)


def unwritten(*shape, dtype=torch.float16):
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def close(found, want, bound=1.5e-3):
    assert found.shape == want.shape
    error = (found.double() - want).norm() / want.norm()
    assert error < bound, f"{error:.1e}"


def chosen(matrices, batch, length, chunk, own):
    """The matrix that each token reads, `[B, T, H, K, N]`, of `[B, states, H, K, N]`."""
    place = (torch.arange(length, device=DEVICE) // chunk + own).clamp(max=matrices.shape[1] - 1)
    return matrices.double()[:, place]


@pytest.mark.parametrize("layout", ["tokens", "heads", "sliced"])
@pytest.mark.parametrize(
    ("length", "chunk", "inner", "width", "own"),
    [(150, 64, 48, 16, False), (128, 64, 16, 96, True), (200, 192, 64, 48, False), (300, 256, 16, 192, False)],
)
def test_tokens_are_multiplied_by_the_matrix_of_their_chunk(layout, length, chunk, inner, width, own):
    batch, heads = 2, 2
    states = length // chunk + 1
    x, w = tokens(batch, length, heads, inner, layout), randn(batch * states, heads, inner, width, seed=1)
    y = unwritten(batch, length, heads, width)
    products.product(TokenRows.of(x), TokenRows.of(y), chunk, states, LIKE, own=own)(STREAM, x, w, y, LIKE, LIKE, LIKE)
    close(
        y,
        torch.einsum("bthk,bthkn->bthn", x.double(), chosen(w.view(batch, states, *w.shape[1:]), batch, length, chunk, own)),
    )


@pytest.mark.parametrize("width", [48, 192])
@pytest.mark.parametrize("chunk", [64, 256])
def test_products_are_rated_and_summed_against_other_tokens(width, chunk):
    batch, length, heads, inner = 2, chunk + 70, 2, 16
    x, w = tokens(batch, length, heads, inner), randn(batch * 2, heads, width, inner, seed=1)
    z = tokens(batch, length, heads, width, "heads", seed=2)
    # rates are not contiguous either
    rates = torch.rand(batch, heads, length, device=DEVICE).transpose(1, 2)
    y, sums = unwritten(batch, length, heads, width), unwritten(batch, length, heads, -(-width // 128), dtype=torch.float32)
    products.product(
        TokenRows.of(x), TokenRows.of(y), chunk, 2, LIKE, transposed=True, rates=rates.stride(), against=TokenRows.of(z)
    )(STREAM, x, w, y, z, rates, sums)  # fmt: skip
    plain = torch.einsum("bthk,bthnk->bthn", x.double(), chosen(w.view(batch, 2, *w.shape[1:]), batch, length, chunk, False))
    close(y, plain * rates[..., None])
    close(sums.sum(-1), (plain * z.double()).sum(-1))


@pytest.mark.parametrize("layout", ["tokens", "heads", "sliced"])
@pytest.mark.parametrize(("height", "width"), [(16, 48), (144, 16), (96, 192)])
def test_writes_are_sums_over_each_chunk(layout, height, width):
    batch, chunk, parts, heads = 2, 64, 3, 2
    length = 150  # the last chunk ends early
    x, g = tokens(batch, length, heads, height, layout), tokens(batch, length, heads, width, layout, seed=1)
    y = unwritten(batch * parts, heads, height, width, dtype=torch.float32)
    products.write(TokenRows.of(x), TokenRows.of(g), chunk, parts, LIKE)(STREAM, x, g, y)
    a, b = (F.pad(t.double(), (0, 0, 0, 0, 0, parts * chunk - length)).unflatten(1, (parts, chunk)) for t in (x, g))
    close(y.view(batch, parts, heads, height, width), torch.einsum("bcthm,bcthn->bchmn", a, b), 1e-5)


def of_theta(x, theta, activation):
    """Features in float64, of matrices `[factors, sets, H, D, F]`."""
    u = torch.einsum("bthd,xbhdf->xbthf", x, theta.expand(-1, len(x), -1, -1, -1))
    return ACTIVATIONS[activation](u[0]) * (u[1] if len(u) == 2 else 1)


@pytest.mark.parametrize(
    ("activation", "factors", "sets", "rated"),
    [*((name, 1, 1, False) for name in ACTIVATIONS), ("silu", 2, 2, True), ("gelu", 2, 1, True)],
)
def test_features_and_their_gradients(activation, factors, sets, rated):
    batch, length, heads, width, hidden = 2, 70, factors, 48, 64 * factors
    x, w = tokens(batch, length, heads, width, "heads"), randn(factors, sets, heads, width, hidden, seed=1)
    rates = torch.rand(batch, length, heads, device=DEVICE) if rated else None
    theta, strides = Theta(factors, sets, hidden, activation), None if rates is None else rates.stride()
    given = LIKE if rates is None else rates
    y = unwritten(batch, heads, length, hidden).transpose(1, 2)
    products.features(TokenRows.of(x), theta, LIKE, strides, TokenRows.of(y))(STREAM, x, w, y, given)
    multiplied = 1 if rates is None else rates.double()[..., None]
    wide = w.double().requires_grad_()
    projected = torch.einsum("bthd,xbhdf->xbthf", x.double(), wide.expand(-1, batch, -1, -1, -1)).detach().requires_grad_()
    plain = ACTIVATIONS[activation](projected[0]) * (projected[1] if factors == 2 else 1)
    close(y, (plain * multiplied).detach())
    close(y, of_theta(x.double(), w.double(), activation) * multiplied)

    d, again = randn(batch, length, heads, hidden, seed=2), unwritten(batch, length, heads, hidden)
    du = unwritten(batch, length, heads, factors * hidden)
    sums = unwritten(batch, length, heads, hidden // 64, dtype=torch.float32)
    products.features_backward(TokenRows.of(x), theta, LIKE, strides)(STREAM, x, w, d, again, du, given, sums)
    close(again, y.double())
    (want,) = torch.autograd.grad(plain, projected, d.double() * multiplied)
    close(du, torch.cat(want.unbind(0), -1))
    if rates is not None:
        close(sums.sum(-1), (plain * d.double()).sum(-1).detach())
    else:
        assert sums.isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_of_what_is_no_number_are_none(activation):
    x, theta = tokens(1, 64, 1, 16), Theta(1, 1, 64, activation)
    x[0, 5] = torch.nan
    y = torch.zeros(1, 64, 1, 64, dtype=x.dtype, device=DEVICE)
    products.features(TokenRows.of(x), theta, LIKE)(STREAM, x, randn(1, 16, 64), y, LIKE)
    assert y[0, 5].isnan().all()
    assert y.isnan().sum() == 64


@pytest.mark.parametrize(("batch", "length", "heads"), [(1, 16, 1), (3, 65, 1), (1, 1, 5)])
def test_every_token_is_rated(batch, length, heads):
    x = tokens(batch, length, heads, 48, "heads")
    rates = torch.rand(batch, heads, length, device=DEVICE).transpose(1, 2)
    y = unwritten(batch + 1, length, heads, 48)
    products.rated(TokenRows.of(x), rates.stride(), TokenRows.of(y[:batch]))(STREAM, x, rates, y)
    close(y[:batch], x.double() * rates.double()[..., None])
    assert y[batch:].isnan().all()


def test_heads_may_lie_further_apart_than_32_bits_count():
    x, rates = tokens(1, 2, 3, 16), torch.rand(1, 2, 3, device=DEVICE)
    apart, room = (1, 16, 2**30, 1), 2**31 + 32
    # memory that is for the most part never touched
    memory = torch.empty(room, dtype=x.dtype, device=DEVICE) if x.is_cuda else torch.from_numpy(np.empty(room, np.float16))
    far, y = memory.as_strided(x.shape, apart).copy_(x), unwritten(*x.shape)
    products.rated(TokenRows.of(far), rates.stride(), TokenRows.of(y))(STREAM, far, rates, y)
    close(y, x.double() * rates.double()[..., None])


@pytest.mark.parametrize("last", [None, True, False])
def test_scans_of_whole_writes_take_them_in_either_order(last):
    batch, chunks, heads, size = 2, 3, 2, 48
    order = MatrixOrder.by_chunk(heads) if last is None else MatrixOrder.by_head(chunks, last)
    count = chunks if last is False else chunks + 1

    def placed(x):
        return x if last is None else x.transpose(1, 2).contiguous()

    def found(x, count):
        return x.view(batch, count, heads, size) if last is None else x.view(batch, heads, count, size).transpose(1, 2)

    writes = randn(batch, chunks, heads, size, dtype=torch.float32)
    gates = torch.rand(batch * chunks, heads, device=DEVICE)
    start = randn(heads, size, dtype=torch.float32, seed=3)
    table = torch.tensor([[b * chunks, chunks, chunks, b * count] for b in range(batch)], dtype=torch.int32)
    kept, states = unwritten(batch * chunks, heads, size, dtype=torch.float32), unwritten(batch * count + 1, heads, size)
    moved, end = (unwritten(batch, heads, size, dtype=torch.float32) for _ in range(2))
    zero = torch.zeros(size, device=DEVICE)
    bound_scan(batch, heads, size, order, sign=-1.0, keep=True, momentum=True, state=(0, size))(
        STREAM, placed(writes), LIKE, gates, LIKE, zero, start, table.to(DEVICE), kept, states, moved, end
    )
    assert states[-1].isnan().all()
    d, s = torch.zeros(batch, heads, size, device=DEVICE).double(), start.double().expand(batch, -1, -1)
    for c in range(chunks):
        close(found(states[:-1], count)[:, c], s)
        d = writes[:, c].double() + gates.view(batch, chunks, heads, 1)[:, c] * d
        s = s - d
        close(found(kept, chunks)[:, c], d, 1e-6)
    close(end, s, 1e-6)
    close(moved, d, 1e-6)


def test_constants_of_kernels_do_not_grow_with_a_sequence():
    def launches(length, batch):
        x, y = (TokenRows.of(torch.empty(batch, length, 2, d, device="meta")) for d in (16, 48))
        theta, rates = Theta(2, 1, 64, "silu"), (2 * length, 2, 1)
        return [
            products.product(x, y, 64, length // 64 + 1, LIKE),
            products.product(x, y, 64, length // 64, LIKE, transposed=True, rates=rates, against=y),
            products.write(x, y, 64, length // 64, LIKE),
            products.features(x, theta, LIKE, rates),
            products.features_backward(x, theta, LIKE, rates),
            products.rated(x, rates, x),
        ]

    few, many = launches(65, 1), launches(64000, 3)
    for short, long in zip(few, many, strict=True):
        assert short.constants == long.constants
        assert "PROGRAMS" not in long.constants or long.grid[0] == long.constants["PROGRAMS"]
        grown = {place for place, pair in enumerate(zip(short.numbers, long.numbers, strict=True)) if pair[0] != pair[1]}
        plain = [p.do_not_specialize for p in short.kernel.params] if hasattr(short.kernel, "params") else None
        assert plain is None or all(plain[len(short.views) + place] for place in grown)
    assert few[0].grid[0] < multiprocessors(LIKE)


def test_tokens_that_cannot_be_fetched_are_not_taken():
    x = tokens(2, 70, 2, 16)
    assert products.fits(64, x, x)
    assert not products.fits(96, x)
    assert not products.fits(64, x.float())
    assert not products.fits(64, x, tokens(2, 70, 2, 24))
    assert not products.fits(64, randn(2, 70, 2, 17)[..., 1:])
    assert not products.fits(64, randn(2, 70, 2, 20)[..., :16])
    assert not products.fits(64, x.transpose(1, 3))
    assert not products.fits(64, x[:, :, :1].expand(-1, -1, 2, -1))
    assert products.fits(64, x[:1].as_strided((1, 70, 2, 16), (0, 32, 16, 1)))


def test_blocks_hold_all_that_a_launch_reads_of_a_descriptor():
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = Block(LIKE, (4, 8), (8, 1), (2, 8))
    plain = TensorDescriptor(torch.zeros(4, 8, device=DEVICE), [4, 8], [8, 1], [2, 8])
    for field in dataclasses.fields(TensorDescriptor):
        mine, theirs = (getattr(x, field.name) for x in (block, plain))
        assert field.name == "base" or (mine == theirs if isinstance(theirs, bool) else list(mine) == list(theirs))
