"""The interpreter does as GPUs do where it would otherwise be kinder: order of programs, masked loads, NaN, bfloat16."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from kvbind.kernels.common.interpreter import _scattered, repair

repair()


@triton.jit
def note_programs(out, counter):
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(out + tl.atomic_add(counter, 1), program)


@pytest.mark.parametrize("grid", [(1, 1, 1), (7,), (2, 3, 4), (1, 5, 1), (12,)])
def test_programs_run_once_each_in_an_order_of_no_meaning(grid):
    count = math.prod(grid)
    out, counter = torch.full((count,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    note_programs[grid](out, counter)
    order = out.tolist()
    assert sorted(order) == list(range(count))
    assert count < 3 or order not in (sorted(order), sorted(order)[::-1])


def test_some_programs_run_before_and_some_behind_their_neighbours():
    for count in range(4, 200):
        place = {_scattered(i, count): i for i in range(count)}
        assert len(place) == count
        assert {place[i] < place[i + 1] for i in range(count - 1)} == {False, True}


@triton.jit
def load_some(x, out):
    place = tl.arange(0, 4)
    tl.store(out + place, tl.load(x + place, mask=place < 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_a_masked_load_brings_anything_where_it_is_not_told(dtype):
    x, out = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    load_some[1,](x, out)
    assert out[:2].tolist() == [1, 1]
    assert (out[2:].isnan() if dtype.is_floating_point else out[2:] > 2**20).all()


@triton.jit
def compare(x, y, out):
    place = tl.arange(0, 2)
    a, b = tl.load(x + place), tl.load(y + place)
    tl.store(out + place, tl.maximum(a, b))
    tl.store(out + 2 + place, tl.minimum(a, b))
    tl.store(out + 4 + place, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))


def test_the_larger_and_the_smaller_of_a_number_and_nan_are_the_number():
    nan = float("nan")
    out = torch.zeros(6)
    compare[1,](torch.tensor([nan, 1.0]), torch.tensor([2.0, nan]), out)
    assert out[:4].tolist() == [2, 1, 2, 1]
    assert out[4:].isnan().all()
