"""Single calls of `ttt`: by form, with kernels, beside what other libraries and compiled PyTorch do."""
