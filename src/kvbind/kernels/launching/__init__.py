"""How kernels and operators are launched, apart from what they compute.

- `dispatcher`: an operator called past PyTorch's dispatcher where that has nothing to do.
- `launcher`: a Triton kernel launched past Triton's own way where it was launched before.
- `bound_kernel`: a kernel bound to all but its tensors, for calls that are planned.
- `autotuning`: a kernel that chooses among a few configurations at its first call.
- `warm_up`: all kernels of an operator compiled in threads before its first call of a kind.
- `cuda_graphs`: work that repeats with the same shapes, captured once and replayed.
"""
