"""Numbers in two halves: none of their bits is lost, and the first half is the nearest bfloat16."""

import torch

from kvbind.forms.halves import join, split


def test_two_halves_have_the_bits_of_every_number_and_the_first_is_the_nearest_bfloat16():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    # halfway between two bfloat16, both ways; the largest numbers; what is no number
    chosen = [0x3F808000, 0x3F818000, -0x407F8000, 0x7F7FFFFF, -0x00800001, 0x7F800000, -0x00800000, 1, 0, -(2**31)]
    chosen += [0x7FFFFFFF, -1, 0x7F800001]
    x = torch.cat((drawn, torch.tensor(chosen))).to(torch.int32).view(torch.float32)
    upper, lower = split(x)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    number = ~x.isnan()
    assert (~number).sum() > 3
    assert torch.equal(join(upper, lower)[number].view(torch.int32), x[number].view(torch.int32))
    assert torch.equal(upper.isnan(), ~number)
    assert torch.equal(join(upper, lower).isnan(), ~number)
    nearest = x.bfloat16()
    same = (upper == nearest) | ~number
    assert torch.equal((upper.double() - x.double()).abs()[~same], (nearest.double() - x.double()).abs()[~same])
    normal = number & (x.abs() >= 2.0**-126) & upper.isfinite()
    assert bool(((upper.double() - x.double()).abs() <= x.double().abs() / 256)[normal].all())
