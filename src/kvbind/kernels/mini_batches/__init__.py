"""TTT-Linear, TTT-MLP and Titans by the dual form of mini-batches.

The state is the matrix of one layer or those of two, their biases, and maybe a momentum buffer of each. The tokens of a
mini-batch write at the state `W` and the buffer `S` before it:

    u = k W1 + b1,  h = act(u),  z = h W2 + b2,  d2 = -dL/dz,  d1 = (d2 W2^T) o act'(u),  D = r d
    o = head(read2(act(read1(q))), q),  read(x) = s (x W + b) + m (x S + S_b) + (G o (x x_k^T)) D + G D_b
    W <- s_last W + m_last S + (G_last x_k)^T D,  S <- n S + (e x_k)^T D,  biases likewise

where `x_k` is what came into a layer with the keys, `L` is `-<f(k), v>` or `1/2 ||f(k) - v||^2`, `f` is `z` or layer
normalization of it with a gain and a shift, with or without `k` added; rates r and shares G (lower triangular), s, m, e, n
are numbers for each token. Products take operands in the dtype of q, k and v, a state is rounded to it where it is read, all
else is in float32. What is not finite in a token reaches only the outputs from there on, which are NaN.

Only the states need each other in order. Forward, one program for each sequence and head walks through a segment of
mini-batches with the state in registers and leaves the state before each (`states`); then all reads run at once, a program
for each mini-batch (`reads`). Backward goes stretch by stretch, from states that were kept before each: once more `states`;
then, all at once, the gradients of reads, which do not ask for the state's (`read_gradients`); then those of the state's
steps, in order, with the state's gradient in registers (`state_gradients`).

- Enter: queries and keys `[B, T, H, Dk]`, values `[B, T, H, Dv]` of one dtype, the state float32 in one piece, rates
  `[B, T, H, ..]`, maybe shares and a head's gain and shift; T is a whole number of mini-batches.
- Leave: outputs `[B, T, H, Dv]`, and the state after the last mini-batch.
- Reference implementation: `kvbind.forms.parallel.dual.dual`.

`operator` checks and launches, `parts` is what the kernels share.
"""
