"""How each kernel cuts widths and is launched, by what is called."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from kvbind.kernels.common.operands import power_of_2

HEADS = 16
"""Heads of a program that finds what rates and gates are to tokens."""

MULTIPROCESSORS = 132
"""As many programs are wanted at once that go through chunks in order: those of an H100 or H200."""

WIDEST_MOVE = 128
"""Key channels of a block of the map of a part."""


class AffineCall(NamedTuple):
    """What constants of kernels depend on.

    Attributes:
        dtype: of the operands.
        key: width of keys.
        value: width of values.
        chunk: tokens of a chunk.
        before: gates act before residuals read.
        delta: values are written as residuals.
        channel: gates are per key channel.
        rates: there are rates.
        gates: there are gates per head.
        precision: of products, and of those of float32 numbers that are made on the way.
        warpgroups: products take operands from shared memory (`kvbind.kernels.common.devices.by_warpgroups`).
    """

    dtype: torch.dtype
    key: int
    value: int
    chunk: int
    before: bool
    delta: bool
    channel: bool
    rates: bool
    gates: bool
    precision: str
    warpgroups: bool


class Blocks(NamedTuple):
    """Blocks of key channels and of values, warps, stages, and the most registers of a thread, or 0."""

    key: int
    value: int
    warps: int
    stages: int
    registers: int = 0


IN_ORDER = {
    "parts": Blocks(128, 64, 4, 3),
    "states": Blocks(128, 64, 4, 2),
    "part_gradients": Blocks(128, 128, 8, 2),
    "state_gradients": Blocks(128, 128, 8, 2),
}
"""Kernels that go through chunks in order. All key channels of a state are in one block."""

AT_ONCE = {
    "scale": Blocks(32, 16, 4, 1),
    "scores": Blocks(64, 16, 4, 1),
    "steep_scores": Blocks(16, 16, 4, 1),
    "prepare": Blocks(64, 16, 4, 1, 128),
    "pair_gradients": Blocks(64, 64, 4, 2),
    "key_gradients": Blocks(64, 64, 4, 2),
    # of several blocks of values Triton 3.6 makes a kernel that computes wrong
    "channel_gradients": Blocks(32, 256, 8, 1),
    "steep_channel_gradients": Blocks(32, 256, 8, 1),
}
"""Kernels of which each program has one chunk."""

LARGE = {*IN_ORDER, "channel_gradients", "steep_channel_gradients"}
"""Kernels that take all registers of a thread. Without `wgmma`, `ptxas` 12.8 gave some of them 32 where it was not said."""

NAMES = {
    "decays": "C BH BEFORE CHANNEL",
    "scale": "DK C BK BEFORE DELTA MILD",
    "scores": "DK C BK BEFORE DELTA PRECISION",
    "steep_scores": "DK C BK BEFORE DELTA PRECISION",
    "prepare": "DK DV C BK DELTA CHANNEL PRECISION NARROW",
    "parts": "DK DV C BD BV DELTA CHANNEL PRECISION STAGES",
    "chain": "DK DV BK BV REVERSE PRECISION",
    "states": "DK DV C BD BV DELTA CHANNEL PRECISION STAGES",
    "part_gradients": "DK DV C BD BV DELTA CHANNEL PRECISION STAGES",
    "state_gradients": "DK DV C BD BV DELTA CHANNEL PRECISION STAGES",
    "pair_gradients": "DK DV C BK BV BEFORE DELTA CHANNEL RATES PRECISION",
    "key_gradients": "DK DV C BK BV DELTA RATES GATES PRECISION",
    "channel_gradients": "DK DV C BK BV BEFORE DELTA RATES PRECISION STEEP",
    "steep_channel_gradients": "DK DV C BK BV BEFORE DELTA RATES PRECISION STEEP",
    "gate_gradients": "C BH NK BEFORE DELTA",
}
"""Constants of each kernel."""


def _blocks(kernel: str, call: AffineCall) -> Blocks:
    wide = call.dtype == torch.float32
    if kernel in IN_ORDER:
        blocks = IN_ORDER[kernel]
        # products of float32 are three of TF32, from tiles of twice the bytes
        if wide:
            blocks = Blocks(128, 16, 8, 1)
        elif call.key > 128:
            blocks = Blocks(256, 64, 8, 1)
        elif not call.warpgroups:
            # operands are in registers too
            blocks = Blocks(128, 64, 4, blocks.stages)
    elif kernel == "chain":
        blocks = Blocks(WIDEST_MOVE, 16, 8, 1)
    else:
        blocks = AT_ONCE.get(kernel, Blocks(16, 16, 4, 1))
        if wide:
            blocks = Blocks(min(blocks.key, 32), min(blocks.value, 32), 4, 1)
    large = kernel in LARGE or (kernel == "chain" and call.key > 128)
    if large and (wide or not call.warpgroups):
        blocks = blocks._replace(registers=255)
    return blocks


@cache
def constants_of(kernel: str, call: AffineCall, reverse: bool = False) -> dict[str, Any]:
    """The constants of a launch by name, warps, stages and registers among them.

    Args:
        kernel: a name of `NAMES`.
        call: what is called.
        reverse: of `chain`, that it goes from the end.
    """
    blocks, width = _blocks(kernel, call), max(power_of_2(call.key), 16)
    block = min(blocks.key, width)
    strip = min(_blocks("channel_gradients" if call.channel else "key_gradients", call).key, width)
    known = {
        "DK": call.key, "DV": call.value, "C": call.chunk, "BEFORE": call.before, "DELTA": call.delta,
        "CHANNEL": call.channel, "RATES": call.rates, "GATES": call.gates, "PRECISION": call.precision,
        "BK": block, "BV": min(blocks.value, max(power_of_2(call.value), 16)), "BD": width, "BH": HEADS,
        "NK": -(-call.key // strip), "REVERSE": reverse, "STEEP": kernel.startswith("steep"),
        "NARROW": call.dtype != torch.float32, "STAGES": blocks.stages,
        # the least logarithm (base 2) of a gate per channel that may be divided by
        "MILD": -2.0 if call.dtype == torch.float32 else -8.0,
    }  # fmt: skip
    named = {name: known[name] for name in NAMES[kernel].split()}
    named |= {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return named | ({"maxnreg": blocks.registers} if blocks.registers else {})


def parts_of(sequences: int, chunks: int, heads: int, value: int) -> int:
    """Into how many parts sequences are cut that run at once.

    Args:
        sequences: number of sequences.
        chunks: of all of them, or a bound on it.
        heads: number of heads.
        value: width of values.
    """
    programs = sequences * heads * -(-value // 128)
    return max(1, min(MULTIPROCESSORS // programs, chunks // sequences // 4))
