"""Named sizes of the LaCT language model, as keyword arguments of `LactConfig`."""

from __future__ import annotations

from typing import Any

from kvbind.inner.systems import lact_llm

_PAPER: dict[str, Any] = {
    "vocab_size": 32000,
    "num_hidden_layers": 24,
    "num_attn_heads": 24,
    "num_lact_heads": 4,
    "window_size": 2048,
    "inner": lact_llm(chunk=2048),
    "w0_w2_low_rank": 32,
    "base_lr": 1e-3,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "window_size": 64,
        "inner": lact_llm(chunk=64),
        "w0_w2_low_rank": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "30m": {
        "vocab_size": 32000,
        "hidden_size": 384,
        "num_hidden_layers": 10,
        "num_attn_heads": 6,
        "num_lact_heads": 2,
        "window_size": 512,
        "inner": lact_llm(chunk=512),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "125m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attn_heads": 12,
        "num_lact_heads": 4,
        "window_size": 1024,
        "inner": lact_llm(chunk=1024),
        "max_position_embeddings": 16384,
        "tie_word_embeddings": True,
    },
    "760m": {**_PAPER, "hidden_size": 1536},
    "3b": {**_PAPER, "hidden_size": 3072},
}
"""Presets by name: "tiny" trains on a CPU in minutes (bytes), "760m" is the paper's, "3b" the larger released one.

Edit one as any dict: `LactConfig(**{**PRESETS["30m"], "inner": rung})`.
"""
