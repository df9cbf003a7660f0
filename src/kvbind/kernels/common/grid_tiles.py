"""Tokens on a grid inside kernels: tiles of places, their neighbours, and the nine weights of a 3x3 convolution."""

import triton
import triton.language as tl

PART = 64
"""The fewest places in a part of the grid."""


@triton.jit
def grid_places(start, stop, width, BT: tl.constexpr):
    """A tile of places: numbers, rows and columns, each `[BT, 1]`; rows past `stop` are far outside the grid."""
    p = (start + tl.arange(0, BT))[:, None]
    return p, tl.where(p < stop, p // width, -4), p % width


@triton.jit
def shifted(
    x, x_row, rate, rate_row, p, row, column, down: tl.constexpr, right: tl.constexpr, height, width, channels, inside,
    RATED: tl.constexpr,
):  # fmt: skip
    """Float32 `x`, times its places' rates if `RATED`, at the neighbours of a tile of places; zero outside the grid."""
    row, column = row + down, column + right
    there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    p = (p + (down * width + right)).to(tl.int64)
    y = tl.load(x + p * x_row + channels, mask=there & inside, other=0.0).to(tl.float32)
    if RATED:
        y *= tl.load(rate + p * rate_row, mask=there, other=0.0)
    return y


@triton.jit
def program_channels(heads, D: tl.constexpr, BC: tl.constexpr):
    """What a program has: which sequence and head, their number, and some channels."""
    TILES: tl.constexpr = (D + BC - 1) // BC
    program = (tl.program_id(0) // TILES).to(tl.int64)
    channels = (tl.program_id(0) % TILES) * BC + tl.arange(0, BC)[None, :]
    return program // heads, program % heads, program, channels, channels < D


@triton.jit
def weight_places(channels, inside):
    """The places of the nine weights of some channels, as a tile `[16, channels]`, and which of it is there."""
    weights = tl.arange(0, 16)[:, None]
    return channels * 9 + weights, inside & (weights < 9)


@triton.jit
def one_weight(kernel, index: tl.constexpr):
    """One of the nine weights of each channel, from a tile of them."""
    return tl.sum(tl.where((tl.arange(0, 16) == index)[:, None], kernel, 0.0), axis=0)[None, :]


def channels_per_program(width: int) -> int:
    """How many channels a program has: the most, up to 64, that divide the width, unless these are few."""
    return next((n for n in (64, 32, 16) if width % n == 0), min(64, triton.next_power_of_2(width)))
