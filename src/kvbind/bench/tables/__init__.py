"""Tables made from result files: for a terminal and for the documentation."""
