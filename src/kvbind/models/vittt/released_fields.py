"""Fields of the released ViTTT code's configurations, as arguments of the two models."""

from __future__ import annotations

from typing import Any

from kvbind.inner.value import nearest

_COMMON = ("num_classes", "in_chans", "mlp_ratio", "qkv_bias", "drop_rate", "drop_path_rate")

_PLAIN = ("embed_dim", "depth", "num_heads", "patch_size")

_HIERARCHICAL = ("dim", "depths", "num_heads")

_OTHER = ("img_size", "use_checkpoint", "ttt_loss_type")

_PLAIN_DEFAULTS = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16}

_HIERARCHICAL_DEFAULTS = {"dim": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}


def read_released_config(fields: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether a released configuration is of the hierarchical model, and the model's arguments, without inner loops.

    Raises:
        ValueError: an unknown field.
    """
    hierarchical = "dim" in fields or "depths" in fields
    known = (*(_HIERARCHICAL if hierarchical else _PLAIN), *_COMMON, *_OTHER)
    for name in fields:
        if name not in known:
            raise ValueError(
                f"fields of a released configuration must be among {', '.join(known)}; got {name!r}{nearest(name, known)}"
            )
    defaults = _HIERARCHICAL_DEFAULTS if hierarchical else _PLAIN_DEFAULTS
    return hierarchical, {**defaults, **{name: value for name, value in fields.items() if name not in _OTHER}}
