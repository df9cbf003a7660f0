"""full_glu."""
