"""Configurations of the released ViTTT code, its ablations by name, and the published sizes."""

from __future__ import annotations

from typing import Any

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import nearest
from kvbind.models.ablations import IMAGES, images_ablation
from kvbind.models.vittt.model import HierarchicalVittt, ImageModel, Vittt

_LINEAR, _CONV = IMAGES["only_w1_straight_qk"]

INNER_LOOPS: dict[str, tuple[InnerLoop, InnerLoop]] = {
    "full": IMAGES["dot_product"],
    "ascent": IMAGES["ga_dot_product"],
    "key": IMAGES["no_query_dot_product"],
    "rung1": IMAGES["only_w1"],
    "rung3": IMAGES["only_w1_straight_qk"],
    "rung6": (_LINEAR.replace(clip=False), _CONV),
    "squared": IMAGES["mse"],
}
"""The paper's rows for ViTTT: the inner loops of the heads and of the convolution (arXiv 2602.21204, tables 1 and 2).

Rungs change the heads alone: a convolution is one linear layer as it stands, and the published ablations clip it throughout.
Rungs 2, 4 and 5 do not apply: there are no weight normalization, no learned rates and no momentum to remove.
"""

SIZES: dict[str, dict[str, Any]] = {
    "vittt_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 6, "patch_size": 16},
    "vittt_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    "vittt_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16},
    "h_vittt_tiny": {"dim": (64, 128, 320, 512), "depths": (1, 3, 9, 4), "num_heads": (2, 4, 10, 16)},
    "h_vittt_small": {"dim": (64, 128, 320, 512), "depths": (2, 6, 18, 8), "num_heads": (2, 4, 10, 16)},
    "h_vittt_base": {"dim": (96, 192, 448, 640), "depths": (2, 6, 18, 8), "num_heads": (3, 6, 14, 20)},
}
"""The published sizes: keyword arguments of `Vittt`, and under `h_` of `HierarchicalVittt` (arXiv 2512.01643)."""

_COMMON = ("num_classes", "in_chans", "mlp_ratio", "qkv_bias", "drop_rate", "drop_path_rate")
_PLAIN = ("embed_dim", "depth", "num_heads", "patch_size")
_HIERARCHICAL = ("dim", "depths", "num_heads")
_OTHER = ("img_size", "use_checkpoint", "ttt_loss_type")
_PLAIN_DEFAULTS = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16}
_HIERARCHICAL_DEFAULTS = {"dim": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}


def build(name: str, **fields: Any) -> ImageModel:
    """A model of a published size, with random weights.

    Args:
        name: one of `SIZES`.
        **fields: further arguments of `Vittt` or `HierarchicalVittt`, or others in place of the size's.

    Raises:
        ValueError: an unknown name, or fields that do not fit.
    """
    if name not in SIZES:
        raise ValueError(f"name must be one of {', '.join(SIZES)}; got {name!r}{nearest(name, SIZES)}")
    arguments = {**SIZES[name], **fields}
    return HierarchicalVittt(**arguments) if name.startswith("h_") else Vittt(**arguments)


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


def from_released_config(fields: dict[str, Any]) -> Vittt | HierarchicalVittt:
    """A model with random weights, built as a released configuration says; a released state dict loads into it by name.

    Warns where `ttt_loss_type` names an ablation whose released computation is another than the name says.

    Args:
        fields: arguments of the released model classes (`embed_dim`, `depth`, ... of the plain one; `dim` and `depths` make
            it the hierarchical one) and `ttt_loss_type`. What is left out takes the released default. `img_size` is not
            needed: these models take images of any size.

    Raises:
        ValueError: an unknown field or `ttt_loss_type`, or a field that does not fit.
    """
    hierarchical, arguments = read_released_config(fields)
    inner, inner_conv = images_ablation(fields.get("ttt_loss_type", "dot_product"))
    model = HierarchicalVittt(**arguments) if hierarchical else Vittt(**arguments)
    # after building, as released checkpoints hold every matrix, also those that their ablation does not use
    model.inner, model.inner_conv = inner, inner_conv
    return model
