"""`InPlaceMLP`, a gated MLP whose last matrix is written while it reads: the layer, and its chunks."""
