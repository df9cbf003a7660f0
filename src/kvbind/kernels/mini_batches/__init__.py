"""TTT-Linear by the dual form of mini-batches: one program for each sequence and head.

- Enter: queries and keys `[B, T, H, Dk]`, values `[B, T, H, Dv]` of one dtype, the matrix float32 `[B, H, Dk, Dv]`, maybe a
  bias and a head's gain and shift `[B, H, Dv]`, rates `[B, T, H]`; T is a whole number of mini-batches.
- Leave: outputs `[B, T, H, Dv]`, and the matrix and the bias after the last mini-batch.
- Reference implementation: `kvbind.forms.dual.dual`.

`operator` checks and launches, `kernels` is what runs.
"""
