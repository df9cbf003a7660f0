"""What every kernel needs, whatever it computes.

- `devices`: whether and where kernels run, and what the device has.
- `operands`: dtypes, layouts and precisions of operands.
- `tracing`: what is at work around an operator (a trace, an export, a transform, gradients).
- `activations`, `grid_tiles`: functions that kernels call.
- `interpreter`: repairs of Triton's interpreter, for tests on a CPU.

Nothing here imports Triton but the last three.
"""
