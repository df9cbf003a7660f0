"""One update of a gated linear unit, or of one linear layer, from all tokens, then a read: `visibility="full"`.

- Enter: queries `[B, Tq, H, Dk]`, keys `[B, Tk, H, Dk]`, values `[B, Tk, H, Dv]`, matrices float32 `[H, Dk, Dv]` or
  `[B, H, Dk, Dv]`, rates as numbers or `[B, Tk, H]`.
- Leave: outputs `[B, Tq, H, Dv]` and the new matrices `[B, H, Dk, Dv]`.
- Reference implementation: `kvbind.forms.recurrent.recurrent` under `visibility="full"`.

`operator` checks and launches (`launch`); `forward` and `backward` are kernels over tokens, `weight_update` those that enter
an update into the weights, `tiles` what they share.
"""
