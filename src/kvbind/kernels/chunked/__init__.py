"""The chunkwise parallel form of inner loops whose writes add up, sequences of any lengths.

- Enter: queries `[query rows, H, D]`, keys `[writing rows, H, D]`, values `[writing rows, H, Dv]` of one dtype; the last
  layer float32 `[S, H, F, Dv]`, the static layers `[1 or 2, S or 1, H, D, F]`, rates `[rows, H]`, gates `[chunks, H]`; and
  `span_tables.SpanTables`, which rows belong together.
- Leave: outputs `[query rows, H, Dv]`, the state and the momentum buffer after the last complete chunks `[S, H, F, Dv]`.
- Reference implementation: `kvbind.forms.parallel.form.parallel`.

`operator` joins `span_products` (features, reads, writes), `prefix_sums` (momentum, decay, sums over chunks) and
`kvbind.kernels.newton_schulz`; `rank_exchange` carries the sums on over ranks.
"""
