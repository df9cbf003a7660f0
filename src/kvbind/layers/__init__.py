"""Layers: `nn.Module`s that hold parameters and projections around one call of `kvbind.ttt`.

Each layer keeps its inner loop as its attribute `inner`, which can be assigned; its parameters stay.
"""
