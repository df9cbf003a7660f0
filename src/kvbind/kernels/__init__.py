"""Triton kernels behind `torch.library` operators, for NVIDIA GPUs of compute capability 8.0 and up.

A folder for each form of the inner loop (`chunked`, `equal_chunks`, `recurrent`, `causal`, `affine`, `mini_batches`,
`full_glu`, `full_conv`) and for `newton_schulz`, which several call; `elementwise` for what is around an inner loop,
`launching` for how kernels are launched, `common` for what all share. A form's folder says in its `__init__` what enters
and what leaves, and its `operator.py` starts with the function to call.

Modules here know tensors, not inner loops; `kvbind.forms.on_kernels.dispatch` says which of them a call can take, and
`kvbind.forms.on_kernels.kernel_calls` turns its operands into theirs. Importing one needs Triton, but for those that choose
between a kernel and PyTorch themselves (`gated_output`, `swiglu`, `cross_entropy`). Each operator is opaque to
`torch.compile`, with fake and autograd registrations, and tested against a reference implementation in PyTorch.
"""

from kvbind.kernels.common.devices import has_triton, interpreted

if interpreted() and has_triton():
    from kvbind.kernels.common.interpreter import repair

    repair()
