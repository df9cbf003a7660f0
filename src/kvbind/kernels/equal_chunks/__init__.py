"""The chunkwise parallel form of sequences of one length: what `kvbind.kernels.chunked` computes, planned once.

- Enter: queries and keys `[B, T, H, Dk]`, values `[B, T, H, Dv]` in bfloat16 or float16, of any strides; the last layer
  float32 `[H, F, Dv]` or `[B, H, F, Dv]`, the static layers `[H, D, F]`, rates and gates float32 `[B, T, H]`.
- Leave: outputs `[B, T, H, Dv]`, the state and the momentum buffer after the last complete chunk `[B, H, F, Dv]`.
- Reference implementation: `kvbind.forms.parallel.form.parallel`.

`operator.LaunchPlan` holds every launch for one `call_shapes.CallShapes`, those of the gradient in `backward`; products are
in `tma_products`, fed by the tensor memory accelerator, or in `library_products`. Needs compute capability 9.0.
"""
