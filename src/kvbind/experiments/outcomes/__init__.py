"""What came out of trained rows, as values, text, pictures and verdicts."""
