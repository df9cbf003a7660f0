"""The three model families as checkpoints have them: how each is recognized, and what its released configuration says.

All three keep the released parameter names and layouts, so that a family is told from the names alone; what differs between
a released checkpoint and one of this library is the configuration and the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvbind.inner.networks import Linear
from kvbind.inner.value import nearest
from kvbind.layers.lact_nvs import add_queries
from kvbind.models.ablations import (
    IMAGES,
    IMAGES_DIFFERING,
    VIEWS_NAMES,
    check_all_used,
    no_words_for,
    views_ablation,
)
from kvbind.models.loading import Fields, Weights


class Family(Protocol):
    """What a conversion asks of a family."""

    title: str
    """For people."""

    weights_file: str
    """Where a released checkpoint of it has its weights."""

    fields_file: str
    """Where it has its configuration."""

    def owns(self, weights: Weights) -> bool:
        """Whether these are weights of this family."""
        ...

    def is_released(self, fields: Fields | None, weights: Weights) -> bool:
        """Whether a checkpoint is of the released code, and not of this library."""
        ...

    def named(self, name: str) -> Fields:
        """The released configuration of a published size.

        Raises:
            ValueError: an unknown name.
        """
        ...

    def build(self, fields: Fields | None, weights: Weights, released: bool) -> tuple[Any, Weights]:
        """The model that a checkpoint is of, without weights, and the weights under its names.

        Raises:
            ValueError: a configuration that is missing or not supported.
        """
        ...

    def release(self, model: Any) -> tuple[Fields, Weights]:
        """A model's configuration and weights as the released code has them.

        Raises:
            ValueError: a configuration that the released code has no words for.
        """
        ...


class Language:
    """The LaCT language model (arXiv 2505.23884): config.json, with `inner` where it is ours, and weights."""

    title = "LaCT language model"
    weights_file = "model.safetensors"
    fields_file = "config.json"

    def owns(self, weights: Weights) -> bool:
        return "model.embeddings.weight" in weights

    def is_released(self, fields: Fields | None, weights: Weights) -> bool:
        return fields is None or "inner" not in fields

    def named(self, name: str) -> Fields:
        raise ValueError(f"config must be the released JSON file of a language model; got {name!r}, which does not exist")

    def build(self, fields: Fields | None, weights: Weights, released: bool) -> tuple[Any, Weights]:
        from kvbind.models.lact import LactConfig, LactForCausalLM

        if fields is None:
            raise FileNotFoundError("source must have a config.json, as the weights do not say all of a language model")
        config: Any = LactConfig.from_dict(fields)
        if config.tie_word_embeddings:
            weights = {"lm_head.weight": weights["model.embeddings.weight"], **weights}
        with torch.device("meta"):
            return LactForCausalLM(config), weights

    def release(self, model: Any) -> tuple[Fields, Weights]:
        weights = dict(model.state_dict())
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return model.config.to_released_config(), weights


class Images:
    """ViTTT (arXiv 2512.01643): weights say all sizes; a configuration is needed for an ablation alone."""

    title = "ViTTT classifier"
    weights_file = "checkpoint.pth"
    fields_file = "config.json"
    prefix = "vittt."
    """Before every name in a checkpoint of this library."""

    def owns(self, weights: Weights) -> bool:
        return any(re.fullmatch(r"(vittt\.)?(layers\.\d+\.)?blocks\.0\.attn\.w3", name) for name in weights)

    def is_released(self, fields: Fields | None, weights: Weights) -> bool:
        return not any(name.startswith(self.prefix) for name in weights)

    def named(self, name: str) -> Fields:
        from kvbind.models.vittt import SIZES

        if name not in SIZES:
            raise ValueError(
                f"config must be a JSON or YAML file, or one of {', '.join(SIZES)}; got {name!r}{nearest(name, SIZES)}"
            )
        return dict(SIZES[name])

    def build(self, fields: Fields | None, weights: Weights, released: bool) -> tuple[Any, Weights]:
        from kvbind.models.vittt import VitttConfig, VitttForImageClassification

        config: Any
        if released:
            config = VitttConfig.from_released_config(vittt_fields(weights) | (fields or {}))
            # tables that we compute, and a gate that the ablation to one linear layer does not use
            unused = (".rope.rotations", ".attn.w2") if config.inner.network == Linear() else (".rope.rotations",)
            weights = {f"{self.prefix}{name}": x for name, x in weights.items() if not name.endswith(unused)}
        elif fields is None:
            raise FileNotFoundError("source must have a config.json, as models of this library do")
        else:
            config = VitttConfig.from_dict(fields)
        with torch.device("meta"):
            return VitttForImageClassification(config), weights

    def release(self, model: Any) -> tuple[Fields, Weights]:
        config = model.config
        loops = (config.inner, config.inner_conv)
        faithful = {name: known for name, known in IMAGES.items() if name not in IMAGES_DIFFERING}
        named = [name for name, known in faithful.items() if known == loops]
        if not named:
            raise ValueError(
                "inner and inner_conv must be those of a released ablation whose computation is the same, one of "
                f"{', '.join(faithful)}; got {loops[0]} and {loops[1]}"
            )
        weights = {name.removeprefix(self.prefix): x for name, x in model.state_dict().items()}
        rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
        return vittt_fields(weights) | rates | {"img_size": config.img_size, "ttt_loss_type": named[0]}, weights


class Views:
    """LaCT view synthesis (arXiv 2505.23884): weights, and the YAML file that the released code is started with."""

    title = "LaCT view synthesis model"
    weights_file = "model.pt"
    fields_file = "config.yaml"

    def owns(self, weights: Weights) -> bool:
        return "input_linear.weight" in weights and "blocks.0.module_list.0.ln.weight" in weights

    def is_released(self, fields: Fields | None, weights: Weights) -> bool:
        return fields is None or "block_config" in fields

    def named(self, name: str) -> Fields:
        from kvbind.models.lact_nvs import PRESETS

        if name not in PRESETS:
            raise ValueError(
                f"config must be a JSON or YAML file, or one of {', '.join(PRESETS)}; got {name!r}{nearest(name, PRESETS)}"
            )
        return nvs_fields(PRESETS[name])

    def build(self, fields: Fields | None, weights: Weights, released: bool) -> tuple[Any, Weights]:
        from kvbind.models.lact_nvs import LactNvs

        if fields is None:
            raise FileNotFoundError(
                "source must have its configuration beside it, or config must name it: the weights do not say how often "
                "updates are orthogonalized, nor at which rate"
            )
        if not released:
            return LactNvs.from_saved_config(fields), weights
        with torch.device("meta"):
            model = LactNvs.from_released_config(fields)
        if model.inner.query == "key":
            weights = {
                name: add_queries(x, model.config.dim) if name.endswith("to_qkv.weight") else x
                for name, x in weights.items()
            }
        return model, weights

    def release(self, model: Any) -> tuple[Fields, Weights]:
        weights, dim = dict(model.state_dict()), model.config.dim
        if model.inner.query == "key":
            for i in range(len(model.mixers)):
                name = f"blocks.{i}.module_list.1.f.to_qkv.weight"
                weights[name] = weights[name][dim:]
        return nvs_fields(model.config.replace(inner=model.inner)), weights


FAMILIES: tuple[Family, ...] = (Language(), Images(), Views())


def family_of(weights: Weights, source: Path) -> Family:
    """The family whose weights these are.

    Raises:
        ValueError: none.
    """
    for family in FAMILIES:
        if family.owns(weights):
            return family
    hint = " (kvbind in-place turns it into a model of this library)" if any(".mlp.ttt_" in name for name in weights) else ""
    raise ValueError(
        f"source must be a checkpoint of one of: {', '.join(family.title for family in FAMILIES)}; {source} holds none of "
        f"their parameters, but {', '.join(list(weights)[:3]) or 'nothing'}{hint}"
    )


def vittt_fields(weights: Mapping[str, Tensor]) -> Fields:
    """The released configuration of the full ViTTT system that has such weights.

    Raises:
        ValueError: weights that lack what says it.
    """
    blocks = sorted(
        {tuple(map(int, found.groups(default="0"))) for name in weights
         if (found := re.match(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.", name))}
    )  # fmt: skip
    hierarchical = any(name.startswith("layers.") for name in weights)
    stages = sorted({stage for stage, _ in blocks})
    first = [f"layers.{stage}.blocks.0" if hierarchical else "blocks.0" for stage in stages]
    stem = "patch_embed.conv.0.conv.weight" if hierarchical else "patch_embed.proj.weight"
    needed = [stem, *(f"{block}.{name}" for block in first for name in ("attn.qkv.weight", "attn.w1", "mlp.fc1.weight"))]
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"the weights must hold all parameters of a ViTTT model; missing {missing}")
    widths = [weights[f"{block}.attn.qkv.weight"].shape[1] for block in first]
    heads = [weights[f"{block}.attn.w1"].shape[1] for block in first]
    depths = [sum(stage == s for s, _ in blocks) for stage in stages]
    fields: Fields = {
        "num_classes": weights["head.weight"].shape[0] if "head.weight" in weights else 0,
        "in_chans": weights[stem].shape[1],
        "mlp_ratio": weights[f"{first[0]}.mlp.fc1.weight"].shape[0] / widths[0],
        "qkv_bias": f"{first[0]}.attn.qkv.bias" in weights,
    }
    if hierarchical:
        return {"dim": widths, "depths": depths, "num_heads": heads, **fields}
    height, width = weights[stem].shape[2:]
    patch = height if height == width else [height, width]
    return {"embed_dim": widths[0], "depth": depths[0], "num_heads": heads[0], "patch_size": patch, **fields}


def nvs_fields(config: Any) -> Fields:
    """The released configuration that means a `LactNvsConfig`.

    Raises:
        ValueError: an inner loop that it has no words for; the message names the fields that stand in the way.
    """
    from kvbind.models.lact_nvs.config import full_of_released

    inner = config.inner
    steps = 0 if inner.orthogonalize is None else len(inner.orthogonalize.coefficients)
    full = full_of_released(steps)
    loss = next((name for name in VIEWS_NAMES if views_ablation(full, name) == inner), None)
    if loss is None:
        raise ValueError(no_words_for(inner, full))
    if not config.released_parameters:
        check_all_used(loss, inner, full)
    ablation: Fields = {} if loss == "dot_product" else {"ttt_loss_type": loss}
    if inner.query == "key":
        ablation = {"ttt_loss_type": "dot_product", "no_query": True}
    return {
        "patch_size": config.patch_size,
        "dim": config.dim,
        "layers": config.layers,
        "block_config": [
            {
                "type": "model.SelfAttention",
                "length_dim": "l",
                "params": {"head_dim": config.head_dim, "use_qk_norm": config.qk_norm},
            },
            {
                "type": "lact_ttt.FastWeightGluMLPMultihead",
                "length_dim": "vl",
                "params": {
                    "head_dim": config.fast_head_dim,
                    "inter_multi": config.inter_multi,
                    "base_lr": config.base_lr,
                    "muon_update_steps": steps,
                    **ablation,
                },
            },
            {"type": "model.MLP", "length_dim": "vl", "params": {"inter_multi": config.mlp_ratio}},
        ],
    }
