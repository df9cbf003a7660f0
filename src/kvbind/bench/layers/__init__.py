"""What a layer does around an inner loop: elementwise work and window attention."""
