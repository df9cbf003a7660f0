"""Forms on kernels: what fits which, and a call's operands as a kernel takes them.

`dispatch.py` is the table, a row for each kernel; `kernel_calls/` has a module for each; `fla.py` and `delta.py` are
flash-linear-attention's operators, `planned.py` calls that repeat.
"""
