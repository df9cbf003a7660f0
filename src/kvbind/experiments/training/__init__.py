"""Training runs: planned, shared by what they compute, trained side by side, projected."""
