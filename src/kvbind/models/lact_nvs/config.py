"""The configuration of LaCT view synthesis, its presets, and its reading of released configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from kvbind.files import shortened
from kvbind.inner.orthogonalize import VIEWS_COEFFICIENTS, NewtonSchulz
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import lact_nvs, ladder
from kvbind.inner.value import Value, check_bool, check_positive_int, nearest
from kvbind.layers.lact_nvs import check_fits_views
from kvbind.models.ablations import tell_unused, unused_parameters, views_ablation

_FULL = lact_nvs()

MOST_STEPS = 100
"""Newton-Schulz iterations, far above what any model has: a limit for numbers from files."""

INNER_LOOPS: dict[str, InnerLoop] = {
    "full": _FULL,
    "ascent": _FULL.replace(direction="ascent"),
    "key": _FULL.replace(query="key"),
    **{name: rung for name, rung in ladder(_FULL).items() if name in ("rung1", "rung2", "rung3", "rung6")},
    "steps2": _FULL.replace(steps=2),
    "steps4": _FULL.replace(steps=4),
}
"""The paper's rows for view synthesis, and several inner steps (arXiv 2602.21204, tables 1 and 2, figure 1).

Rung 5 does not apply, as there is no momentum to remove; rung 4's constant rate is part of rung 6.
"""


@dataclass(frozen=True, repr=False)
class LactNvsConfig(Value):
    """Sizes and inner loop of `LactNvs`.

    Attributes:
        dim: width d of the residual stream.
        layers: blocks.
        patch_size: side of a patch in pixels.
        head_dim: width of an attention head.
        fast_head_dim: width of a fast head.
        inter_multi: hidden width of the fast networks over `fast_head_dim`.
        mlp_ratio: hidden width of the MLPs over d.
        inner: the inner loop of every layer. With a `chunk`, in tokens, input views write chunk after chunk; an `anchor`
            draws weights back (Elastic TTT).
        base_lr: its learning rate before training.
        qk_norm: RMS norms on the attention's queries and keys.
        released_parameters: hold what released checkpoints hold, whether or not `inner` has a use for it.
        fast_weights: False for softmax attention to all input views in their place, as a baseline, in heads of `head_dim`.

    Raises:
        ValueError: widths that do not divide, or an inner loop that the layers cannot run.
        TypeError: a field of the wrong type.
    """

    dim: int = 768
    layers: int = 12
    patch_size: int = 8
    head_dim: int = 64
    fast_head_dim: int = 768
    inter_multi: float = 2
    mlp_ratio: float = 4
    inner: InnerLoop = _FULL
    base_lr: float = 0.01
    qk_norm: bool = True
    released_parameters: bool = False
    fast_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "patch_size", "head_dim", "fast_head_dim"):
            check_positive_int(name, getattr(self, name))
        for name in ("head_dim", "fast_head_dim"):
            if self.dim % getattr(self, name):
                raise ValueError(f"{name} must divide dim = {self.dim}; got {getattr(self, name)}")
        for name in ("inter_multi", "mlp_ratio", "base_lr"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name} must be a number; got {getattr(self, name)!r}")
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, and finite; got {getattr(self, name)}")
        check_bool("qk_norm", self.qk_norm)
        check_bool("released_parameters", self.released_parameters)
        check_bool("fast_weights", self.fast_weights)
        check_fits_views(self.inner)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The configuration that `to_dict` wrote; fields that are left out take their defaults.

        Raises:
            TypeError: `data` is no dict, or names an unknown field.
            ValueError: a field's value does not fit.
        """
        if isinstance(data, dict) and isinstance(data.get("inner"), dict):
            data = {**data, "inner": InnerLoop.from_dict(data["inner"])}
        return super().from_dict(data)

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """The configuration that a released file (arXiv 2505.23884's public code) stands for.

        Args:
            fields: `patch_size`, `dim`, `layers` and `block_config`, a list of three modules (attention inside each image,
                fast weights across views, MLP), each with `type`, `length_dim` and `params`. What `params` leaves out takes
                the released default. Those of the fast weights may hold the fields of arXiv 2602.21204's ablations,
                `ttt_loss_type`, `no_query`, `use_fused` and `grad_calc_method`; what a checkpoint of one holds without a
                use is said, as a logged warning.

        Raises:
            ValueError: a field that is missing or unknown, or a block of other modules, an attention that is causal, biases,
                or fast weights without Newton-Schulz steps, which are not supported.
        """
        _check_names("a released configuration", fields, ("patch_size", "dim", "layers", "block_config"), ())
        modules = fields["block_config"]
        if not isinstance(modules, list) or not all(
            isinstance(module, dict) and isinstance(module.get("params", {}), dict) for module in modules
        ):
            raise ValueError(
                f"block_config must be a list of modules with type, length_dim and params; got {shortened(modules)}"
            )
        kinds = [(str(module.get("type", "")).rpartition(".")[2], module.get("length_dim", "vl")) for module in modules]
        if kinds not in (_RELEASED_BLOCK, [*_RELEASED_BLOCK[:2], ("MLP", "l")]):
            raise ValueError(
                "block_config must be attention inside each image, fast weights across views and an MLP, "
                f"{_RELEASED_BLOCK}; got {kinds}"
            )
        attention, fast, mlp = (dict(module.get("params", {})) for module in modules)
        _check_names("SelfAttention's params", attention, ("head_dim",), ("use_qk_norm", "causal", "bias"))
        _check_names(
            "FastWeightGluMLPMultihead's params",
            fast,
            ("head_dim",),
            ("inter_multi", "base_lr", "muon_update_steps", "bias", *ABLATION_FIELDS),
        )
        _check_names("MLP's params", mlp, (), ("inter_multi", "bias"))
        for name, params in (("SelfAttention", attention), ("FastWeightGluMLPMultihead", fast), ("MLP", mlp)):
            for switch in ("causal", "bias"):
                if params.get(switch):
                    raise ValueError(f"{name}'s {switch} must be False; got {params[switch]!r}, which is not supported")
        steps, width = fast.get("muon_update_steps", 0), fast.get("inter_multi", 1)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps > MOST_STEPS:
            raise ValueError(f"muon_update_steps must be an int of at most {MOST_STEPS}; got {shortened(steps)}")
        ablation = {name: fast[name] for name in ABLATION_FIELDS if name in fast}
        inner = views_ablation(full_of_released(steps), **ablation, inter_multi=width)
        if steps < 1 and inner.orthogonalize is not None:
            raise ValueError(
                f"muon_update_steps must be at least 1; got {steps}, for which the released code divides each update by its "
                "norm, which is not supported"
            )
        tell_unused(ablation.get("ttt_loss_type", "dot_product"), inner)
        return cls(
            dim=fields["dim"],
            layers=fields["layers"],
            patch_size=fields["patch_size"],
            head_dim=attention["head_dim"],
            fast_head_dim=fast["head_dim"],
            inter_multi=width,
            mlp_ratio=mlp.get("inter_multi", 4),
            inner=inner,
            base_lr=fast.get("base_lr", 0.01),
            qk_norm=attention.get("use_qk_norm", True),
            released_parameters=bool(unused_parameters(inner)),
        )


ABLATION_FIELDS = ("ttt_loss_type", "no_query", "use_fused", "grad_calc_method")
"""Released fields that say which ablation of arXiv 2602.21204 a model is, as `views_ablation` takes them."""


def full_of_released(steps: int) -> InnerLoop:
    """The full system's inner loop with so many Newton-Schulz steps, at least one."""
    return _FULL.replace(orthogonalize=NewtonSchulz(VIEWS_COEFFICIENTS[:1] * max(steps, 1)))


_RELEASED_BLOCK = [("SelfAttention", "l"), ("FastWeightGluMLPMultihead", "vl"), ("MLP", "vl")]


def _check_names(what: str, fields: dict[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for name in fields:
        if name not in (*needed, *optional):
            known = ", ".join((*needed, *optional))
            raise ValueError(f"{what} must have none but {known}; got {name!r}{nearest(name, (*needed, *optional))}")
    for name in needed:
        if name not in fields:
            raise ValueError(f"{what} must have {name}; it has {', '.join(fields) or 'none'}")


PRESETS: dict[str, LactNvsConfig] = {
    "tiny": LactNvsConfig(dim=128, layers=3, head_dim=32, fast_head_dim=128),
    "small": LactNvsConfig(dim=384, layers=6, fast_head_dim=384),
    "114m": LactNvsConfig(layers=12, inter_multi=1),
    "14x768": LactNvsConfig(layers=14),
    "24x768": LactNvsConfig(layers=24),
    "24x768-4x": LactNvsConfig(layers=24, inter_multi=4),
}
"""Presets by name. "114m" is that of arXiv 2602.21204, named by its parameters outside the fast weights, hidden
multiplier 1; "14x768" (objects), "24x768" and "24x768-4x" (scenes), hidden multipliers 2, 2 and 4, are the released ones of
arXiv 2505.23884. All have 8x8 patches; edit one with `.replace(patch_size=4)`.
"""
