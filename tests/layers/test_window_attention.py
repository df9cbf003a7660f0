"""Sliding-window attention against a softmax per token; its memory; FlexAttention's block mask."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kvbind.layers.attention import window_attention as module
from kvbind.layers.attention.softmax import is_for_flash
from kvbind.layers.attention.window_attention import (
    MASK_BLOCK,
    OWN_KERNELS,
    QUERY_BLOCK,
    block_mask,
    has_own_kernel,
    window_attention,
    window_block_mask,
)
from kvbind.layers.rotary import rotary_tables, rotate
from kvbind.sequence.boundaries import Boundaries, with_room


def plain(q, k, v, window, starts):
    """One head at a time, one token at a time; `[T, H, D]`."""
    rows = []
    for t in range(len(q)):
        first = max(starts[t], t - window + 1)
        scores = torch.einsum("hd,thd->ht", q[t], k[first : t + 1]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), v[first : t + 1]))
    return torch.stack(rows)


def operands(batch, length):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(3, batch, length, 2, 4, generator=generator, dtype=torch.float64).unbind(0)


def unread(bounds, device="cpu"):
    """Boundaries of which the host knows a capacity alone."""
    return Boundaries(with_room(torch.tensor(bounds, device=device)), bounds[-1])


def starts_of(bounds):
    return [a for a, b in pairwise(bounds) for _ in range(b - a)]


@pytest.mark.parametrize("window", [1, 2, 40, QUERY_BLOCK + 9, 500])
@pytest.mark.parametrize("length", [1, 30, QUERY_BLOCK, 2 * QUERY_BLOCK + 17])
def test_equals_a_softmax_over_each_tokens_window(window, length):
    q, k, v = operands(2, length)
    got = window_attention(q, k, v, window)
    for i in range(2):
        torch.testing.assert_close(got[i], plain(q[i], k[i], v[i], window, [0] * length))


@pytest.mark.parametrize("window", [1, 7, 200])
@pytest.mark.parametrize("bounds", [(0, 5, 5, 6, 300), (0, 128, 256, 300), (0, 300)])
def test_packed_sequences_do_not_see_one_another(window, bounds):
    q, k, v = operands(1, 300)
    got = window_attention(q, k, v, window, cu_seqlens=bounds)
    torch.testing.assert_close(got[0], plain(q[0], k[0], v[0], window, starts_of(bounds)))
    assert torch.equal(window_attention(q, k, v, window, cu_seqlens=unread(bounds)), got)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": (0, 90, 300)}, {"ahead": 20}, {"ahead": 20, "held": (5,)}])
def test_what_is_not_finite_reaches_only_what_sees_it(where, value, options):
    ahead, window, token = options.get("ahead", 0), 40, 70
    given = [x[:, ahead:] if i == 0 else x for i, x in enumerate(operands(1, 300))]
    changed = [x.clone() for x in given]
    changed[where][0, token, 1, 0] = value
    sees = torch.zeros(1, 300 - ahead, 2, dtype=torch.bool)
    if where:
        # of keys, those ahead count; no window reaches past a boundary
        sees[0, token - ahead : min(token - ahead + window, options.get("cu_seqlens", (0, 300))[1]), 1] = True
    else:
        sees[0, token, 1] = True
    results = []
    for tensors in (given, changed):
        leaves = [x.clone().requires_grad_() for x in tensors]
        y = window_attention(*leaves, window, **options)
        results.append((y, torch.autograd.grad(y[~sees].square().sum(), leaves)))
    (y, grads), (z, found) = results
    assert z[sees].isnan().all()
    torch.testing.assert_close(z[~sees], y[~sees])
    for x, expected in zip(found, grads, strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("held", [(6, 6), (6, 2), (0, 5)])
@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize("block", [1, 4, 256])
def test_kept_keys_stand_before_the_calls_own(monkeypatch, block, held, length):
    monkeypatch.setattr(module, "KEY_BLOCK", block)
    window, q, k, v = 7, *operands(2, 6 + length)
    got = window_attention(q[:, 6:], k, v, window, ahead=6, held=held)
    for i, n in enumerate(held):
        expected = plain(q[i], k[i], v[i], window, [6 - n] * (6 + length))
        torch.testing.assert_close(got[i], expected[6:])


def test_one_query_after_another_meets_few_numbers_of_keys(monkeypatch):
    window, counts = 1000, set()
    attend = F.scaled_dot_product_attention

    def counting(q, k, v, **options):
        counts.add(k.shape[2])
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    q, k, v = operands(1, window)
    for held in range(0, 600, 7):
        window_attention(q[:, -1:], k, v, window, ahead=window - 1, held=(held,))
    assert counts == {1, 257, 513, 769}


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_memory_grows_with_length_times_window():
    length, window = 8192, 32
    q, k, v = operands(1, length)
    with LargestTensor() as seen:
        window_attention(q, k, v, window, cu_seqlens=(0, 100, length))
    assert seen.numel <= q.numel()
    assert seen.numel < length * length / 100


@pytest.mark.parametrize("window", [1, MASK_BLOCK - 1, MASK_BLOCK, 3 * MASK_BLOCK + 5])
@pytest.mark.parametrize("bounds", [None, (0, 40, 41, 500, 900), (0, 384, 512, 900)])
@pytest.mark.parametrize("read", [True, False])
def test_block_mask_covers_exactly_the_blocks_that_attention_reaches(window, bounds, read):
    length = 900
    if read:
        mask = window_block_mask(length, window, bounds, "cpu")
    else:
        mask = block_mask(unread(bounds or (0, length)).starts, length, window)
    row, column = torch.arange(length)[:, None], torch.arange(length)
    starts = torch.tensor(starts_of(bounds or (0, length)))[:, None]
    seen = (column <= row) & (row - column < window) & (column >= starts)
    assert torch.equal(mask.mask_mod(0, 0, row, column).expand(length, length), seen)

    blocks = -(-length // MASK_BLOCK)
    held = torch.zeros(blocks * MASK_BLOCK, blocks * MASK_BLOCK, dtype=torch.bool)
    held[:length, :length] = seen
    tiles = held.view(blocks, MASK_BLOCK, blocks, MASK_BLOCK)
    some, every = tiles.any(3).any(1), tiles.all(3).all(1)

    def listed(counts, columns):
        chosen = torch.zeros(blocks, blocks, dtype=torch.bool)
        for i in range(blocks):
            chosen[i, columns[0, 0, i, : counts[0, 0, i]].long()] = True
        return chosen

    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | full, some)
    assert torch.equal(full, every)
    assert not (partial & full).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is for CUDA")
@pytest.mark.parametrize("bounds", [None, (0, 5, 5, 600, 1000)])
def test_flex_attention_equals_attention_in_blocks(bounds):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1000, 2, 64, generator=generator).cuda().requires_grad_() for _ in range(3))
    got = window_attention(q, k, v, 300, cu_seqlens=bounds)
    with torch.no_grad():
        expected = window_attention(q, k, v, 300, cu_seqlens=bounds)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    if bounds is not None:
        assert torch.equal(window_attention(q, k, v, 300, cu_seqlens=unread(bounds, "cuda")), got)
    on_cpu = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(window_attention(*on_cpu, 300, cu_seqlens=bounds).square().sum(), on_cpu)
    for x, y in zip(torch.autograd.grad(got.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)


def flash_written_out(q, k, v, *rest, window_size_left, window_size_right):
    """What PyTorch says of its FlashAttention: `[B, T, H, D]`, the last query at the last key."""
    assert rest == (None, None, q.shape[1], k.shape[1], 0.0, True, False)
    row = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
    column = torch.arange(k.shape[1])[None, :]
    seen = (column >= row - window_size_left) & (column <= row + window_size_right)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2),)


@pytest.mark.parametrize(("ahead", "held"), [(0, None), (6, None), (6, (6, 6)), (6, (2, 2)), (6, (0, 0)), (6, (2, 5))])
def test_prompts_are_read_by_flash_attention_where_rows_are_as_long(ahead, held, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator) for n in (20, ahead + 20, ahead + 20))
    expected = window_attention(q, k, v, 7, ahead=ahead, held=held)
    calls = []
    monkeypatch.setattr(module, "is_for_flash", lambda *operands: True)
    monkeypatch.setattr(
        torch.ops.aten, "_flash_attention_forward", lambda *x, **y: calls.append(1) or flash_written_out(*x, **y)
    )
    with torch.no_grad():
        got = window_attention(q, k, v, 7, ahead=ahead, held=held)
    torch.testing.assert_close(got, expected)
    assert len(calls) == (held != (2, 5))


@pytest.mark.parametrize(
    ("layout", "taken"),
    [
        ({}, True),
        ({"stride": (16, 1, 16, 1)}, True),
        ({"stride": (1, 1, 24, 1)}, True),
        ({"stride": (160, 80, 20, 1)}, False),
        ({"stride": (512, 256, 1, 16)}, False),
        ({"data_ptr": 264}, False),
        ({"dtype": torch.float32}, False),
    ],
)
def test_flash_attention_reads_rows_in_vectors(layout, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    def stand_in(stride=(512, 256, 16, 1), data_ptr=256, dtype=torch.bfloat16):
        known = {"shape": (1, 1, 16, 16), "is_cuda": True, "device": 0, "dtype": dtype}
        return SimpleNamespace(**known, stride=lambda: stride, data_ptr=lambda: data_ptr)

    assert is_for_flash(stand_in(), stand_in(**layout), stand_in()) is taken


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it is for CUDA")
@pytest.mark.parametrize(("ahead", "held"), [(0, None), (299, None), (299, (299,)), (299, (100,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_on_a_gpu_equals_attention_in_float64(dtype, ahead, held):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=generator).to(dtype) for n in (1000, ahead + 1000, ahead + 1000))
    assert is_for_flash(*(x.cuda().transpose(1, 2) for x in (q, k, v)))
    with torch.no_grad():
        got = window_attention(q.cuda(), k.cuda(), v.cuda(), 300, ahead=ahead, held=held)
    expected = window_attention(q.double(), k.double(), v.double(), 300, ahead=ahead, held=held)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=1e-2)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(module, "_OWN", set())


@pytest.mark.usefixtures("nothing_compiled")
def test_the_first_lengths_have_kernels_of_their_own_and_keep_them():
    lengths = [(128 * n, 128 * n + ahead) for n in range(1, OWN_KERNELS + 3) for ahead in (0, 256)]
    first = [has_own_kernel(x) for x in lengths]
    assert first == [True] * OWN_KERNELS + [False] * (len(lengths) - OWN_KERNELS)
    assert [has_own_kernel(x) for x in lengths] == first


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("exhausted", [0, 1, 2])
def test_lengths_without_a_kernel_share_one_and_are_cut_into_blocks_when_the_compiler_has_had_enough(exhausted, monkeypatch):
    from torch._dynamo.exc import FailOnRecompileLimitHit

    def compiled(failing):
        def attention(q, k, v, *, block_mask):
            if failing:
                raise FailOnRecompileLimitHit
            return flex_attention(q, k, v, block_mask=block_mask)

        return attention

    for i, name in enumerate(("_for_one_length", "_for_any_length")):
        monkeypatch.setattr(module, name, lambda failing=i < exhausted: compiled(failing))
    for length in (300, 100, 400, 200, 500, 300):
        q, k, v = (x.transpose(1, 2) for x in operands(1, length))
        got = module._flex(q, k, v, 40, None, 0)
        torch.testing.assert_close(
            got.transpose(1, 2)[0], plain(*(x.transpose(1, 2)[0] for x in (q, k, v)), 40, [0] * length)
        )


def test_rotation_depends_on_relative_position_and_keeps_norms():
    x, y = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def at(z, position):
        return rotate(z, rotary_tables(torch.tensor([[position]]), 8, 100.0)).flatten()

    torch.testing.assert_close(at(x, 3) @ at(y, 10), at(x, 13) @ at(y, 20), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at(x, 7).norm(), x.norm(), rtol=1e-6, atol=1e-6)
    assert (at(x, 3) @ at(y, 10) - at(x, 3) @ at(y, 11)).abs() > 1e-3


@pytest.mark.parametrize("keys", [1, 2, 5, 64])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_one_token_that_sees_what_is_not_finite_is_not_a_number(keys, which):
    generator = torch.Generator().manual_seed(0)
    operands = {name: torch.randn(1, n, 1, 8, generator=generator) for name, n in (("q", 1), ("k", keys), ("v", keys))}
    operands[which][:, -1, :, 0] = float("nan")
    assert window_attention(*operands.values(), 512, ahead=keys - 1).isnan().all()


def test_no_rows_have_no_outputs():
    nothing = torch.zeros(0, 3, 2, 8)
    assert window_attention(nothing, nothing, nothing, 2, held=()).shape == nothing.shape
