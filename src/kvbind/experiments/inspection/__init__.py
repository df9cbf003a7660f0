"""What layers do on an input, in the form that pages show: heads, inputs, and systems with random weights."""
