"""mini_batches."""
