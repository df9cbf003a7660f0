"""Configurations of the released ViTTT code, its ablations by name, and the published sizes."""

from __future__ import annotations

from typing import Any

from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import nearest
from kvbind.models.ablations import IMAGES
from kvbind.models.vittt.hierarchical import HierarchicalVittt
from kvbind.models.vittt.image_model import ImageModel
from kvbind.models.vittt.plain import Vittt
from kvbind.models.vittt.released_fields import read_released_config

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
    hierarchical, _ = read_released_config(fields)
    return (HierarchicalVittt if hierarchical else Vittt).from_released_config(fields)
