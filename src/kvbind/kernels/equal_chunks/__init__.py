"""equal_chunks."""
