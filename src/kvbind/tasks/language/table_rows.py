"""Rows of the paper's tables that the language task has: inner loops, and models without fast weights."""

from __future__ import annotations

from typing import Any

from kvbind.tasks.inner_loops import SOFTMAX, WINDOW, more_hidden, table_rows
from kvbind.tasks.language.config import LanguageConfig, inner_loop, model_fields


def rows(config: LanguageConfig) -> dict[str, Any]:
    """What `config.model.inner` is in each row of the paper's tables 1 and 2.

    Args:
        config: the full system's; its other edits of the inner loop hold for every row.

    Returns:
        By name: "rung0" to "rung6", the ladder; "ascent" and "key_for_query", each one change of the full system.
    """
    return table_rows(inner_loop(config.model))


FULL = 32768
"""The window of the baseline with full attention: no evaluation reads more tokens at once."""


def baselines(config: LanguageConfig) -> dict[str, dict[str, Any]]:
    """Edits of `config.model.fields` that make the models without fast weights, by row.

    Widths, depth and heads are the full system's; what that has in parameters of its fast weights goes into wider MLPs.

    Returns:
        "window", attention over the same window alone, and "softmax", full attention; none of a model of layers without
        attention.
    """
    from kvbind.models import LactConfig
    from kvbind.models.lact.blocks import LactBlock

    own = LactConfig(**model_fields(config.model) | {"inner": inner_loop(config.model)})
    if own.projections is not None:
        return {}
    without = LactConfig(**{**model_fields(config.model), "fast_weights": False})
    wider = own.mlp_width + more_hidden(LactBlock, own, without, 3 * own.hidden_size)
    edits = {"fast_weights": False, "intermediate_size": wider}
    return {WINDOW: edits, SOFTMAX: {**edits, "window_size": max(FULL, config.data.length)}}
