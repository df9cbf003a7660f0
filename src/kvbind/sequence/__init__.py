"""How rows of tokens are cut: over the ranks of a group, with what the ranks exchange, and into packed documents."""

from kvbind.sequence.shard import Schedule, SequenceShard, Slice, current_shard, sequence_parallel
from kvbind.sequence.traffic import Traffic, count_bytes

__all__ = ["Schedule", "SequenceShard", "Slice", "Traffic", "count_bytes", "current_shard", "sequence_parallel"]
