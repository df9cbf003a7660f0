"""Newton-Schulz orthogonalization of batches of matrices.

- Enter: matrices `[..., M, N]` in float32, bfloat16 or float16, an `(a, b, c)` per iteration, the precision of products.
- Leave: matrices `[..., M, N]`; for the gradient, X before each iteration and sums of squares.
- Reference implementation: `kvbind.inner.orthogonalize.NewtonSchulz`.

`operator` is the operator, and the same without autograd for other operators to call; `one_program` are the kernels of
matrices that one program holds, `tiled` those of larger ones.
"""
