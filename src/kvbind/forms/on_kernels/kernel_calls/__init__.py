"""How a call's operands become a kernel's, and what the kernel returns becomes outputs and a state.

A module for each folder of `kvbind.kernels` that `kvbind.forms.on_kernels.dispatch` lists; `operands` is what they share. In
each, `run_...` takes an inner loop and a checked call, and returns outputs `[B, H, T, Dv]` in q's dtype and the state after
the call. Kernels are imported in the call that needs them, as they need Triton.
"""
