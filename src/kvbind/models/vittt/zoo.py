"""Entry points by which timm makes these models: `timm.create_model("vittt_tiny", num_classes=10)`.

`vittt_folder` opens a trained one: `timm.create_model("vittt_folder", folder="runs/.../model")`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbind.models.vittt.image_model import ImageModel
from kvbind.models.vittt.released import SIZES, build

__all__ = ["default_cfgs", "register", "vittt_folder"]
__all__.extend(SIZES)

FOLDER = "vittt_folder"
"""The entry point of trained models."""


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
    name: _default_cfg("patch_embed.conv.0.conv" if name.startswith("h_") else "patch_embed.proj")
    for name in (*SIZES, FOLDER)
}


def _make(name: str, pretrained: bool, fields: dict[str, Any]) -> Any:
    """A model for timm, or its features, of the model's own arguments and of those that timm has for every model."""
    if pretrained:
        raise ValueError(f"pretrained must be False: kvbind distributes no weights of {name}")
    fields.pop("cache_dir", None)
    wants_features, layers = fields.pop("features_only", False), fields.pop("out_indices", None)
    if layers is not None and not wants_features:
        raise ValueError(f"out_indices must not be given without features_only=True; got {layers}")
    config = {**default_cfgs[name], **(fields.pop("pretrained_cfg", None) or {}), "architecture": name}
    changed = fields.pop("pretrained_cfg_overlay", None) or {}
    size, dynamic = fields.pop("img_size", None), fields.pop("dynamic_img_size", True)
    if not isinstance(dynamic, bool):
        raise ValueError(f"dynamic_img_size must be a bool, and either way images of any size are taken; got {dynamic!r}")
    model = _open(config, **fields) if name == FOLDER else build(name, **fields)
    config |= {"num_classes": model.num_classes, "input_size": (model.in_chans, *config["input_size"][1:]), **changed}
    model.pretrained_cfg = model.default_cfg = config
    model.set_input_size(size)
    return _features(model, layers) if wants_features else model


def _features(model: ImageModel, layers: Any) -> Any:
    """A module of timm's that returns the features of some layers, by default of the last four."""
    from timm.models._features import FeatureGetterNet

    features = FeatureGetterNet(model, out_indices=min(4, model.depth) if layers is None else layers)
    features.pretrained_cfg = features.default_cfg = model.pretrained_cfg
    return features


def _open(config: dict[str, Any], folder: str | Path, num_classes: int | None = None) -> ImageModel:
    """The model in a folder, `config` told of what its pictures are like; arguments as `vittt_folder` takes them."""
    from kvbind.models.opening import open_exported
    from kvbind.models.vittt.config import VitttForImageClassification
    from kvbind.models.vittt.processing import VitttImageProcessor

    home = Path(folder)
    home = home / "model" if (home / "config.yaml").is_file() else home
    opened = open_exported(home)
    if not isinstance(opened, VitttForImageClassification):
        raise ValueError(f"folder must be one of a ViTTT classifier; {str(home)!r} holds a {type(opened).__name__}")
    model, side = opened.vittt, opened.config.img_size
    config["input_size"] = (model.in_chans, *((side, side) if isinstance(side, int) else side))
    if opened.config.hierarchical:
        config["first_conv"] = "patch_embed.conv.0.conv"
    if (home / "preprocessor_config.json").is_file():
        seen = VitttImageProcessor.from_pretrained(home)
        config |= {"mean": tuple(seen.image_mean), "std": tuple(seen.image_std), "crop_pct": seen.crop_pct}
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
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


def vittt_folder(pretrained: bool = False, **fields: Any) -> ImageModel:
    """A trained model: its size, inner loops and weights from the folder that a run of `kvbind train images` left.

    Args:
        pretrained: False; the weights come with the folder.
        **fields: `folder`, of the run or its `model/`; `num_classes` for a new, untrained head of another number; and what
            timm has for every model, such as `features_only`.

    Raises:
        ValueError: a folder of no such model.
        TypeError: an argument that would make it another model.
    """
    return _make(FOLDER, pretrained, fields)


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
    for entry in (vittt_tiny, vittt_small, vittt_base, h_vittt_tiny, h_vittt_small, h_vittt_base, vittt_folder):
        register_model(entry)
    return True
