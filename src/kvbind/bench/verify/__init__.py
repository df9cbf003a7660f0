"""Whether numbers are right: kernels against float64, rounding, and what the documentation promises of models."""
