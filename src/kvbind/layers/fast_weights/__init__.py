"""`FastWeightLayer`, a mixer of fast weights alone: the layer, its state, its output, and what fits it."""
