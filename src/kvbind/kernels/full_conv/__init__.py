"""One update of depthwise 3x3 kernels from all places of a grid, then a read: `visibility="full"`.

- Enter: queries, keys and values `[B, T, H, D]`, the places of a grid row after row, T = height * width; kernels float32
  `[C, 3, 3]`, `[B, C, 3, 3]` or `[B, H, D, 3, 3]` with C = H * D; the rate as a number or `[B, T, H]`.
- Leave: outputs `[B, T, H, D]` and the new kernels float32 `[B, H, D, 3, 3]`.
- Reference implementation: `kvbind.forms.recurrent.recurrent` under `visibility="full"`.

`operator` checks and launches, `kernels` is what runs.
"""
