"""Token-causal linear attention, token by token or in short chunks, with or without a decay per head.

- Enter: queries and keys `[B, T, H, Dk]`, values `[B, T, H, Dv]`, rates and decay `[B, T, H]`, the initial state float32
  `[B, H, Dk, Dv]`, boundaries of packed sequences `[n + 1]`.
- Leave: outputs `[B, T, H, Dv]` and final states `[B or n, H, Dk, Dv]`.
- Reference implementation: `kvbind.forms.recurrent.recurrent` under `visibility="token"`.

`segments` cuts sequences into as many pieces as fill the device, `segment_states` finds the state in which each starts,
`segment_pass` goes through them once for outputs and each of three gradients, `gate_gradients` has the fourth. `operator`
joins them.
"""
