"""Window attention of a slice whose keys begin before its queries; FlexAttention's mask of one."""

import pytest
import torch

from kvbind.layers.attention.window_attention import MASK_BLOCK, halo_of, window_attention, window_block_mask


@pytest.mark.parametrize("window", [1, 7, 200])
@pytest.mark.parametrize(("start", "before"), [(250, 250), (250, 3), (100, 0)])
def test_a_slice_with_its_halo_reads_what_the_row_reads(window, start, before):
    make = torch.Generator().manual_seed(window)
    q, k, v = torch.randn(3, 1, 400, 2, 4, generator=make, dtype=torch.float64).unbind(0)
    opened = start - before
    bounds = (0, opened, 330, 400) if opened else (0, 330, 400)
    whole = window_attention(q, k, v, window, cu_seqlens=bounds)
    ahead = min(before, halo_of(window))
    keys, values = k[:, start - ahead :], v[:, start - ahead :]
    got = window_attention(q[:, start:], keys, values, window, cu_seqlens=(0, 330 - start, 400 - start), ahead=ahead)
    torch.testing.assert_close(got, whole[:, start:])
    alone = window_attention(
        q[:, start:330], keys[:, : ahead + 330 - start], values[:, : ahead + 330 - start], window, ahead=ahead
    )
    torch.testing.assert_close(alone, whole[:, start:330])


@pytest.mark.parametrize("window", [1, MASK_BLOCK - 1, MASK_BLOCK, 3 * MASK_BLOCK + 5])
@pytest.mark.parametrize("bounds", [None, (0, 40, 41, 500, 700)])
@pytest.mark.parametrize("ahead", [1, MASK_BLOCK, 2 * MASK_BLOCK + 9])
def test_block_mask_covers_exactly_the_blocks_that_queries_behind_a_halo_reach(window, bounds, ahead):
    length = 700
    mask = window_block_mask(length, window, bounds, "cpu", ahead)
    own, column = torch.arange(ahead, ahead + length)[:, None], torch.arange(ahead + length)
    starts = torch.zeros(length, 1, dtype=torch.long)
    for bound in (bounds or (0,))[1:-1]:
        starts[bound:] = ahead + bound
    seen = (column <= own) & (own - column < window) & (column >= starts)
    assert torch.equal(mask.mask_mod(0, 0, torch.arange(length)[:, None], column).expand_as(seen), seen)

    rows, columns = -(-length // MASK_BLOCK), -(-(ahead + length) // MASK_BLOCK)
    held = torch.zeros(rows * MASK_BLOCK, columns * MASK_BLOCK, dtype=torch.bool)
    held[:length, : ahead + length] = seen
    tiles = held.view(rows, MASK_BLOCK, columns, MASK_BLOCK)

    def listed(counts, places):
        chosen = torch.zeros(rows, columns, dtype=torch.bool)
        for i in range(rows):
            chosen[i, places[0, 0, i, : counts[0, 0, i]].long()] = True
        return chosen

    partial, full = listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | full, tiles.any(3).any(1))
    assert torch.equal(full, tiles.all(3).all(1))
    assert not (partial & full).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is for CUDA")
@pytest.mark.parametrize("bounds", [None, (0, 5, 600, 1000)])
def test_flex_attention_behind_a_halo_equals_attention_in_blocks(bounds):
    make = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1000, 2, 64, generator=make).cuda().requires_grad_()
    k, v = (torch.randn(1, 1384, 2, 64, generator=make).cuda().requires_grad_() for _ in range(2))
    got = window_attention(q, k, v, 300, cu_seqlens=bounds, ahead=384)
    on_cpu = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    expected = window_attention(*on_cpu, 300, cu_seqlens=bounds, ahead=384)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-5)
    wanted = torch.autograd.grad(expected.square().sum(), on_cpu)
    for x, y in zip(torch.autograd.grad(got.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)
