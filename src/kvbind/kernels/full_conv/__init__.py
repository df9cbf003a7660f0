"""full_conv."""
