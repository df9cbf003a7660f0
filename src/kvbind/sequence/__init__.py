"""Sequence parallelism: one row of tokens cut over the ranks of a group, and what the ranks exchange."""

from kvbind.sequence.shard import Schedule, SequenceShard, Slice, current_shard, sequence_parallel
from kvbind.sequence.traffic import Traffic, count_bytes

__all__ = ["Schedule", "SequenceShard", "Slice", "Traffic", "count_bytes", "current_shard", "sequence_parallel"]
