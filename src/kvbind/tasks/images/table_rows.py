"""Rows of the paper's tables that the image task has: inner loops, and models without fast weights."""

from __future__ import annotations

from typing import Any

from kvbind.tasks.images.config import (
    ImagesConfig,
    inner_loops,
    model_fields,
)
from kvbind.tasks.inner_loops import SOFTMAX, more_hidden, table_rows


def rows(config: ImagesConfig) -> dict[str, dict[str, Any]]:
    """The rows of the paper's tables 1 and 2 that apply to ViTTT, each as a value of `config.model.inner`.

    Rungs change the heads alone: the convolution is one linear layer as it stands, and the published ablations clip it
    throughout. Rungs 2, 4 and 5 do not apply: there are no weight normalization, learned rates or momentum to remove.
    Ascent is the heads' alone, as published; the key takes the query's place in both branches.

    Args:
        config: whose own inner loops are "rung0".
    """
    loops = inner_loops(config.model)
    heads, conv = table_rows(loops["heads"], without=("rung2", "rung4", "rung5")), loops["conv"]
    conv_of = dict.fromkeys(heads, conv) | {"key_for_query": conv.replace(query="key")}
    return {name: {"heads": inner, "conv": conv_of[name].to_dict()} for name, inner in heads.items()}


def baselines(config: ImagesConfig) -> dict[str, dict[str, Any]]:
    """Edits of `config.model.fields` that make models without fast weights, by row: "softmax", a plain vision transformer.

    Width, depth and heads are the full system's; what that has in parameters of its fast weights and convolutions goes into
    wider MLPs. Hierarchical models have none.
    """
    from kvbind.models.vittt import VitttConfig
    from kvbind.models.vittt.blocks import VitttBlock

    fields, loops = model_fields(config.model), inner_loops(config.model)
    own = VitttConfig(**fields, inner=loops["heads"], inner_conv=loops["conv"])
    if own.hierarchical:
        return {}
    dim: int = own.embed_dim  # type: ignore[assignment]
    heads: int = own.num_heads  # type: ignore[assignment]

    def block(fast_weights: bool) -> VitttBlock:
        return VitttBlock(
            dim, heads, own.inner, own.inner_conv, mlp_ratio=own.mlp_ratio, qkv_bias=own.qkv_bias, drop_rate=0.0,
            drop_path=0.0, norm_eps=1e-6, mlp_convolution=False, fast_weights=fast_weights,
        )  # fmt: skip

    hidden = int(dim * own.mlp_ratio) + more_hidden(block, True, False, 2 * dim + 1)
    return {SOFTMAX: {"fast_weights": False, "mlp_ratio": hidden / dim}}
