"""Experiments beyond the paper: gaps along training and by size, chunks of views, capacity, systems side by side."""
