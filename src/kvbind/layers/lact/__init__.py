"""`LactLayer`, attention and fast weights side by side: the layer, and its steps of one token."""
