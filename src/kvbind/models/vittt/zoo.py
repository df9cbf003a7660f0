"""Entry points by which timm makes these models: `timm.create_model("vittt_tiny", num_classes=10)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvbind.models.vittt.model import ImageModel
from kvbind.models.vittt.released import SIZES, build

__all__ = ["default_cfgs", "register", *SIZES]

_CALL_FIELDS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "img_size")
"""What timm passes along that these models have no use for; they take images of any size."""


def _default_cfg(first_conv: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
    }


# timm looks for this name in the module of an entry point
default_cfgs: dict[str, dict[str, Any]] = {
    name: _default_cfg("patch_embed.conv.0.conv" if name.startswith("h_") else "patch_embed.proj") for name in SIZES
}


def _make(name: str, pretrained: bool, fields: dict[str, Any]) -> ImageModel:
    if pretrained:
        raise ValueError(f"pretrained must be False: kvbind distributes no weights of {name}")
    model = build(name, **{key: value for key, value in fields.items() if key not in _CALL_FIELDS})
    model.pretrained_cfg = model.default_cfg = {**default_cfgs[name], "architecture": name}  # type: ignore[assignment]
    return model


def vittt_tiny(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Plain ViTTT, 12 blocks of width 192 with 6 heads, patch 16; `fields` as `Vittt` takes them."""
    return _make("vittt_tiny", pretrained, fields)


def vittt_small(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Plain ViTTT, 12 blocks of width 384 with 6 heads, patch 16; `fields` as `Vittt` takes them."""
    return _make("vittt_small", pretrained, fields)


def vittt_base(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Plain ViTTT, 12 blocks of width 768 with 12 heads, patch 16; `fields` as `Vittt` takes them."""
    return _make("vittt_base", pretrained, fields)


def h_vittt_tiny(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Hierarchical ViTTT, 17 blocks of widths 64 to 512; `fields` as `HierarchicalVittt` takes them."""
    return _make("h_vittt_tiny", pretrained, fields)


def h_vittt_small(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Hierarchical ViTTT, 34 blocks of widths 64 to 512; `fields` as `HierarchicalVittt` takes them."""
    return _make("h_vittt_small", pretrained, fields)


def h_vittt_base(pretrained: bool = False, **fields: Any) -> ImageModel:
    """Hierarchical ViTTT, 34 blocks of widths 96 to 640; `fields` as `HierarchicalVittt` takes them."""
    return _make("h_vittt_base", pretrained, fields)


def register(register_model: Callable[[Callable[..., ImageModel]], Any] | None = None) -> bool:
    """Make timm know these models.

    Args:
        register_model: timm's function of that name; by default it is imported, where timm can be.

    Returns:
        Whether that worked.
    """
    if register_model is None:
        try:
            from timm.models import register_model as timms
        except ImportError:
            return False
        register_model = timms
    for entry in (vittt_tiny, vittt_small, vittt_base, h_vittt_tiny, h_vittt_small, h_vittt_base):
        register_model(entry)
    return True
