"""Softmax attention: over a window of tokens, over all, and its cache."""
