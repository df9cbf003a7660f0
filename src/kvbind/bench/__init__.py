"""Benchmarks: what the forms of an inner loop cost and how exact they are, on the device at hand."""
