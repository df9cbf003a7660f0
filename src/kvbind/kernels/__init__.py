"""Triton kernels behind `torch.library` operators, for NVIDIA GPUs of compute capability 8.0 and up.

Modules here know tensors, not inner loops; `kvbind.forms.fused` turns an inner loop into their calls. Importing one needs
Triton, but for those that choose between a kernel and PyTorch themselves (`gated_output`, `swiglu`). Each operator is opaque
to `torch.compile`, with fake and autograd registrations, and tested against a PyTorch twin.
"""

from kvbind.kernels.common.devices import has_triton, interpreted

if interpreted() and has_triton():
    from kvbind.kernels.common.interpreter import repair

    repair()
