"""The recurrent form of SwiGLU and one-layer networks: one update of the weights after another, a chunk each.

- Enter: queries and keys `[B, T, H, Dk]`, values `[B, T, H, Dv]`, matrices float32 `[B, H, in, out]`, rates `[B, T, H]` of
  each, chunk means of gates `[B, H, T / chunk]`; T is a whole number of chunks.
- Leave: outputs `[B, T, H, Dv]`, and matrices and momentum buffers after the last chunk.
- Reference implementation: `kvbind.forms.recurrent.recurrent`.

`operator` goes through the chunks. `chunk_update` is one chunk's update of all matrices, captured as a CUDA graph;
`batched_chunks` is what many chunks do at once. Their kernels: `swiglu_gradients`, `chunk_matmul`, `weight_update` and
`kvbind.kernels.newton_schulz`. `packed_weights` says how matrices lie in memory, `workspace` what a call allocates.
"""
