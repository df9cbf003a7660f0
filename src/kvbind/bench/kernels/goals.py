"""What there is to beat, and by how much: the peers' measured speeds and the goals set from them."""

from __future__ import annotations

from dataclasses import dataclass

from kvbind.bench.harness.operands import Size

SOURCE = (
    "peers measured on one NVIDIA H100 80GB with PyTorch 2.11 and Triton 3.6, bfloat16 inputs, float32 state, median: the "
    "released style of implementation under torch.compile (a loop over chunks; batched products with cumprod and cumsum), "
    "and chunk_linear_attn of flash-linear-attention 0.6.0 for token visibility"
)

SIZE, CHUNK, DTYPE = Size(batch=1, tokens=32768, heads=4, width=384), 2048, "bfloat16"
"""The call they were measured at: a layer of the 760M language model."""


@dataclass(frozen=True)
class Goal:
    """Speeds of the peers and speeds to reach, millions of tokens per second; None where there is no such number.

    Attributes:
        peer_forward: of the peer's forward pass.
        peer_training: of its forward and backward pass.
        forward: to reach.
        training: to reach.
    """

    peer_forward: float | None = None
    peer_training: float | None = None
    forward: float | None = None
    training: float | None = None


GOALS: dict[tuple[str, str], Goal] = {
    ("rung0", "recurrent"): Goal(1.58, 0.49, 16, 5),
    ("rung2", "recurrent"): Goal(None, None, 12, None),
    ("rung2", "parallel"): Goal(21.7, 6.4, 56, 17),
    ("rung3", "parallel"): Goal(30.6, 9.8, 94, 31),
    ("rung4", "parallel"): Goal(32.7, 10.6, 97, 33),
    ("rung5", "parallel"): Goal(35.0, 10.8, 100, 34),
    ("rung6", "recurrent"): Goal(28.4, None, None, None),
    ("rung6", "parallel"): Goal(144.6, 30.2, 250, 80),
}
"""By rung and form, at `SIZE` and `CHUNK`."""

TOKEN_PEERS: dict[tuple[int, int], tuple[float, float]] = {
    (12, 128): (75.3, 15.6),
    (24, 64): (73.0, 19.3),
    (6, 256): (58.0, 8.7),
}
"""Forward and forward-and-backward of the peer under token visibility by (heads, width), at `SIZE`'s batch and tokens."""

TOKEN_GOAL = 1.3
"""Times the peer."""

DELTA_GOALS: dict[tuple[str, int, int], Goal] = {
    ("delta_net", 12, 128): Goal(29, None, 40, 12),
    ("gated_delta_net", 16, 128): Goal(26, 6.6, 66, 17.5),
}
"""By system, heads and width: the peer measured on an H200 (of gated DeltaNet as published for it, fla 0.5.1), and what to
reach; of gated DeltaNet what FlashQLA publishes for an H200."""

TRAINING_BYTES = {("rung2", "parallel"): (4.5 * 2**30, 2.0 * 2**30)}
"""Peak memory of a forward and backward pass: the peer's, and the goal."""

FIRST_CALL_SECONDS = {"cold": 15.0, "warm": 1.0}
"""First call of the recurrent form at a new shape, from an empty cache and from a warm one; peers take 60 s and more."""


def goal_of(name: str, form: str, size: Size, chunk: int | None, dtype: str) -> Goal | None:
    """The goal of a row of the ladder or of `linear_attention`; None for a call that peers were not measured at."""
    if dtype != DTYPE or (size.batch, size.tokens) != (SIZE.batch, SIZE.tokens):
        return None
    if name == "linear_attention":
        peer = TOKEN_PEERS.get((size.heads, size.width))
        return None if peer is None else Goal(*peer, *(round(TOKEN_GOAL * x, 1) for x in peer))
    if (name, size.heads, size.width) in DELTA_GOALS:
        return DELTA_GOALS[name, size.heads, size.width]
    return GOALS.get((name, form)) if (size, chunk) == (SIZE, CHUNK) else None
