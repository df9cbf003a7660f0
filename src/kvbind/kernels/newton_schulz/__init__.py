"""newton_schulz."""
