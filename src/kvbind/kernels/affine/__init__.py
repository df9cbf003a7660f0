"""The delta rule and its kin: writes that read the state, and decays per head or per key channel, token by token.

- Enter: queries, keys and erase keys `[B, T, H, Dk]`, values `[B, T, H, Dv]`, rates `[B, T, H]`, gates `[B, T, H]` or
  `[B, T, H, Dk]`, the initial state float32 `[B, H, Dk, Dv]`, boundaries of packed sequences `[n + 1]`.
- Leave: outputs `[B, T, H, Dv]` and final states `[B or n, H, Dk, Dv]`.
- Reference implementation: `kvbind.forms.recurrent.recurrent`; `kvbind.forms.parallel.affine` is the same form in PyTorch.

`operator` calls the kernels in this order: `decays`; `channels` where gates are per channel, with `halves`; `prepare`;
`states`, which goes through chunks in order; for the gradients `state_gradients`, likewise in order, `backward` or
`channels`, and `decays`. `launches` says how each is launched; `tiles` is what they share.
"""
