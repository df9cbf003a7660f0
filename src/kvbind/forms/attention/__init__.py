"""The linear attention that an inner loop is: `linearize.py` makes it, `linear_attention.py` computes it."""
