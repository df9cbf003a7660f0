"""Operators around an inner loop, bound by memory: each element is read and written once, in one launch each way.

- `layer_operands`: queries and keys `[B, T, d]` rotated for attention; scaled, normalized and rotated for fast weights.
- `silu_unit`: queries, keys and values `[B, T, H, D]` from one projection `[B, T, 3 H D]`, with SiLU and L2 norm.
- `gated_output`: fast weights' outputs `[B, T, H, D]` normalized, gated and added to `[B, T, H D]`.
- `add_norm`: a residual sum and its norm, `[..., D]`.
- `swiglu`: `silu(gate) * up`, `[..., W]`.
- `depthwise`: a 3x3 convolution of tokens on a grid, `[B, T, C]`.
- `cross_entropy`: losses `[N]` and gradients of logits `[N, vocab]`.
- `decode_attention`: softmax attention of one query `[B, H, D]` to a ring of keys `[B, H, S, D]`.

Reference implementations: `reference` in the module, or for those without one the layer that calls it, with kernels off.
"""
