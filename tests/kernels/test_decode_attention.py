"""Attention of one query to keys in a ring is that of PyTorch to the same keys in their order."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from kvbind.kernels.common.devices import interpreted
from kvbind.kernels.elementwise.decode_attention import covers, decode_attention

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or interpreted()), reason="needs a GPU or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(batch, heads, room, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, width, generator=generator).to(DEVICE, dtype) for n in (1, room, room))
    return q[:, :, 0], k, v


@pytest.mark.parametrize(
    ("heads", "room", "width", "dtype", "tolerance"),
    [
        (2, 300, 24, torch.float32, 2e-6),
        (2, 130, 64, torch.bfloat16, 1e-2),
        (1, 2200, 16, torch.float16, 1e-3),
        (3, 7, 128, torch.float32, 2e-6),
    ],
)
def test_it_is_attention_to_the_keys_that_are_seen(heads, room, width, dtype, tolerance):
    q, k, v = operands(3, heads, room, width, dtype)
    first, count = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, room - 1, room // 2], [1, room, room // 3])
    )
    for keys in (k, k.transpose(1, 2).contiguous().transpose(1, 2)):
        got = decode_attention(q, keys, v, first, count)
        for b in range(3):
            places = (first[b] + torch.arange(int(count[b]), device=DEVICE)) % room
            expected = F.scaled_dot_product_attention(
                *(x[b].double() for x in (q[:, :, None], k[:, :, places], v[:, :, places]))
            )
            torch.testing.assert_close(got[b].double(), expected[:, 0], rtol=0, atol=tolerance)


def test_where_in_the_ring_keys_lie_changes_no_bit():
    q, k, v = operands(1, 2, 150, 32, torch.float32)
    count = torch.full((1,), 140, dtype=torch.int32, device=DEVICE)
    found = []
    for shift in (0, 37, 149):
        first = torch.full((1,), shift, dtype=torch.int32, device=DEVICE)
        found.append(decode_attention(q, k.roll(shift, 2), v.roll(shift, 2), first, count))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_lies_in_places_that_are_not_seen_does_not_matter():
    q, k, v = operands(1, 1, 40, 16, torch.float32)
    first, count = (torch.full((1,), n, dtype=torch.int32, device=DEVICE) for n in (30, 20))
    expected = decode_attention(q, k, v, first, count)
    k[:, :, 10:30], v[:, :, 10:30] = float("nan"), float("inf")
    assert torch.equal(decode_attention(q, k, v, first, count), expected)


def test_what_it_takes():
    q, k, v = operands(1, 1, 4, 16, torch.float32)
    assert covers(q, k, v)
    assert not covers(q.double(), k.double(), v.double())
    assert not covers(q, k.half(), v)
    assert not covers(q, k.mT.contiguous().mT, v)
