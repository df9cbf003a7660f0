"""The parallel form: all chunks at once, or blocks of tokens one after another, where writes allow it.

`form.py` is where it begins. `blockwise.py` goes over blocks of tokens, `affine*.py` over those of delta rules, whose state
is an affine map of the one before, `dual.py` and `spanwise.py` over spans whose gradients are taken at one point; `scan.py`
and `channels.py` are the prefix sums beneath. Operands are heads first: `[B, H, T, D]`.
"""
