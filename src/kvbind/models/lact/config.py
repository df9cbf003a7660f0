"""The configuration of the LaCT language model, and its reading of released configurations."""

from __future__ import annotations

import inspect
from typing import Any, Self

from transformers import PretrainedConfig

from kvbind.forms.evaluate import FORMS, Form
from kvbind.inner.projections import DEFAULTS, Projections
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import PROJECTIONS, lact_llm
from kvbind.inner.value import check_bool, check_choice, check_positive, check_positive_int, nearest
from kvbind.layers.fast_weights.projection_fit import fast_widths
from kvbind.layers.lact.layer import NOT_MADE, DecodeDtype, check_decode_dtype
from kvbind.models.ablations import (
    LANGUAGE_NAMES,
    check_all_used,
    language_ablation,
    no_words_for,
    tell_unused,
    unused_parameters,
)
from kvbind.models.auto import WithImports
from kvbind.models.lact.cache import CACHE_NAMES
from kvbind.models.options import NOT_FOR_US, Refusals, inherited_fields

RELEASED_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attn_heads": 32,
    "num_lact_heads": 4,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "use_muon": False,
    "use_momentum": True,
    "ttt_prenorm": False,
    "w0_w2_low_rank": -1,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.006,
}
"""What a released configuration means by a field it leaves out, where that is not this library's default."""

FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "lr_dim": (1,),
    "lr_parameterization": ("mamba",),
    "hidden_act": ("swish", "silu"),
}
"""Released fields of which only these values are supported."""

HARMLESS_FIELDS = frozenset(
    {
        "elementwise_affine",
        "fp32_states",
        "fuse_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
        "last_layer_fuse_norm",
        "model_type",
        "use_fused_kernel",
    }
)
"""Released fields that say how something is computed, not what."""

REFUSED: Refusals = {
    **NOT_FOR_US,
    "attn_implementation": (
        ("sdpa", None),
        "attention is FlexAttention or scaled_dot_product_attention, whichever is faster",
    ),
}
"""Options of transformers that the model has no use for."""


class LactConfig(WithImports, PretrainedConfig):
    """Configuration of `LactModel` and `LactForCausalLM`; the defaults are the paper's 760M model.

    Fields have the released names. The inner loop is one field, `inner`; in its place the released fields `lact_chunk_size`,
    `use_muon`, `use_momentum`, `ttt_prenorm` and `ttt_loss_type` may be given, which describe one. A JSON file or dict
    without `inner` is read as a released configuration: what it leaves out takes the released defaults.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width d of the residual stream.
        num_hidden_layers: blocks.
        num_attn_heads: attention heads.
        num_lact_heads: fast heads.
        window_size: tokens that attention sees, itself among them.
        inner: the inner loop, or its plain dict; read back as an `InnerLoop`, stored as plain data.
        projections: how fast weights are a layer of their own, without attention, as `kvbind.layers.FastWeightLayer` takes
            it: a `Projections`, its plain dict, or the name of a system whose published layer it is
            (`kvbind.inner.systems.PROJECTIONS`). None for `LactLayer`, attention and fast weights on one set of queries,
            keys and values; or, where the inner loop has what that does not make (`kvbind.layers.lact.layer.NOT_MADE`), for
            a `FastWeightLayer` that follows the inner loop. With it, `num_lact_heads`, `inter_multi` and `base_lr` are those
            of that layer, and fields of attention and of queries, keys and values have no meaning.
        fast_weights: False for attention alone, as a baseline: over `window_size` tokens, as many as a text has or fewer.
            `inner` and the fields of fast weights then have no meaning.
        ttt_form: "auto", "recurrent" or "parallel", as `kvbind.ttt` takes it.
        inter_multi: hidden width of the fast network over its head width.
        w0_w2_low_rank: rank of the gate and up matrices' starting values; 0 or less for full matrices.
        fw_init_gain: of the low-rank factors at the start.
        base_lr: the inner learning rate before training.
        qkv_bias: a bias in the qkv projection.
        attn_qk_norm: RMS norms on q and k, for both paths.
        qkv_silu: silu on fast q, k and v.
        no_v_silu: leaves fast v out of that.
        ttt_nope: no rotary positions on fast q and k.
        learnable_ttt_scale: a learned scale of the fast weights' output.
        rope_theta: base of the rotary wavelengths.
        max_position_embeddings: the length trained at; nothing is limited to it.
        hidden_ratio: width of the MLP over d, before the factor 2/3 and rounding up to 256.
        intermediate_size: width of the MLP, in place of `hidden_ratio`.
        initializer_range: standard deviation of linear layers and embeddings at the start.
        norm_eps: of the block norms and the last norm.
        use_cache: generate with a cache.
        pad_token_id: of padding, or None.
        bos_token_id: of the sequence's start.
        eos_token_id: of its end.
        tie_word_embeddings: one matrix for embeddings and output.
        lact_chunk_size: tokens in a chunk, where `inner` is None.
        use_muon: orthogonalization, where `inner` is None; default True (False in a released configuration).
        use_momentum: momentum, where `inner` is None; default True.
        ttt_prenorm: normalized weights are read while unnormalized ones accumulate, where `inner` is None; default False.
        ttt_loss_type: an ablation of arXiv 2602.21204 by its released name (`kvbind.models.ablations`), where `inner` is
            None; default "dot_product", the full system.
        released_parameters: hold what released checkpoints hold, whether or not `inner` has a use for it; by default where
            released fields describe an inner loop that has none for some.
        decode_dtype: "bfloat16" for decoding steps that read the fast weights rounded to it, as `LactLayer` takes it; None
            for fast weights as they are.
        **kwargs: fields of transformers' `PretrainedConfig`, and released fields that do not change the computation.
            `num_labels`, `id2label`, `label2id` and `problem_type` are for heads of your own on top of `LactModel`.

    Raises:
        ValueError: a field with a value that is not supported, an unknown field that is set, an option of transformers that
            the model has no use for, a setting of generation, or an inner loop given twice.
        TypeError: `inner` is neither an InnerLoop nor a dict.
    """

    model_type = "lact_swiglu"
    auto_home = "kvbind.models.lact"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012
    attribute_map = {"num_attention_heads": "num_attn_heads"}  # noqa: RUF012
    # transformers' own plan knows embeddings by another name
    base_model_fsdp_plan = {  # noqa: RUF012
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1536,
        num_hidden_layers: int = 24,
        num_attn_heads: int = 24,
        num_lact_heads: int = 4,
        window_size: int = 2048,
        inner: InnerLoop | dict[str, Any] | None = None,
        ttt_form: Form = "auto",
        inter_multi: float = 1,
        w0_w2_low_rank: int = 32,
        fw_init_gain: float = 0.5,
        base_lr: float = 1e-3,
        qkv_bias: bool = False,
        attn_qk_norm: bool = False,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        ttt_nope: bool = False,
        learnable_ttt_scale: bool = True,
        rope_theta: float = 1e6,
        max_position_embeddings: int = 32768,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        initializer_range: float = 0.02,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        lact_chunk_size: int | None = None,
        use_muon: bool | None = None,
        use_momentum: bool | None = None,
        ttt_prenorm: bool | None = None,
        ttt_loss_type: str | None = None,
        released_parameters: bool | None = None,
        projections: Projections | dict[str, Any] | str | None = None,
        fast_weights: bool = True,
        decode_dtype: DecodeDtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("ttt_form", ttt_form, FORMS)
        decode_dtype = check_decode_dtype(decode_dtype)
        whole = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers,
                 "num_attn_heads": num_attn_heads, "num_lact_heads": num_lact_heads, "window_size": window_size}  # fmt: skip
        for name, number in whole.items():
            check_positive_int(name, number)
        if intermediate_size is not None:
            check_positive_int("intermediate_size", intermediate_size)
        for name, real in {"inter_multi": inter_multi, "fw_init_gain": fw_init_gain, "base_lr": base_lr,
                             "rope_theta": rope_theta, "norm_eps": norm_eps}.items():  # fmt: skip
            check_positive(name, real)
        released = {
            "lact_chunk_size": lact_chunk_size,
            "use_muon": use_muon,
            "use_momentum": use_momentum,
            "ttt_prenorm": ttt_prenorm,
            "ttt_loss_type": ttt_loss_type,
        }
        given: dict[str, Any] = {name: value for name, value in released.items() if value is not None}
        if inner is None:
            inner = inner_of_released(**given, inter_multi=inter_multi)
            if released_parameters is None:
                released_parameters = bool(unused_parameters(inner))
        elif given:
            raise ValueError(f"inner says what {', '.join(given)} would say; give one or the other")
        self.inner, self.projections = inner, projections
        check_bool("fast_weights", fast_weights)
        if not fast_weights and self.projections is not None:
            raise ValueError("fast_weights must be True with projections, which are of fast weights; got False")
        self.fast_weights, self.decode_dtype = fast_weights, decode_dtype
        if decode_dtype is not None and (self.projections is not None or not fast_weights):
            raise ValueError(f"decode_dtype must be None but for fast weights beside attention; got {decode_dtype!r}")

        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attn_heads, self.num_lact_heads, self.window_size = num_attn_heads, num_lact_heads, window_size
        self.ttt_form, self.released_parameters = ttt_form, bool(released_parameters)
        self.inter_multi, self.w0_w2_low_rank, self.fw_init_gain = inter_multi, w0_w2_low_rank, fw_init_gain
        self.base_lr = base_lr
        self.qkv_bias, self.attn_qk_norm = qkv_bias, attn_qk_norm
        self.qkv_silu, self.no_v_silu, self.ttt_nope = qkv_silu, no_v_silu, ttt_nope
        self.learnable_ttt_scale = learnable_ttt_scale
        self.rope_theta, self.max_position_embeddings = rope_theta, max_position_embeddings
        self.hidden_ratio, self.intermediate_size = hidden_ratio, intermediate_size
        self.initializer_range, self.norm_eps, self.use_cache = initializer_range, norm_eps, use_cache
        super().__init__(**_transformers_fields(kwargs))
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of every layer."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop | dict[str, Any]) -> None:
        if isinstance(inner, dict):
            inner = InnerLoop.from_dict(inner)
        if not isinstance(inner, InnerLoop):
            raise TypeError(f"inner must be a kvbind.InnerLoop or its dict; got {type(inner).__name__}")
        self._inner = inner

    @property
    def projections(self) -> Projections | None:
        """How fast weights are a layer of their own; None where they share one with attention."""
        if self._projections is None and any(name in self.inner.extensions for name in NOT_MADE):
            return DEFAULTS
        return self._projections

    @projections.setter
    def projections(self, projections: Projections | dict[str, Any] | str | None) -> None:
        if isinstance(projections, str):
            if projections not in PROJECTIONS:
                raise ValueError(
                    f"projections must be those of a system, one of {', '.join(PROJECTIONS)}; got "
                    f"{projections!r}{nearest(projections, PROJECTIONS)}"
                )
            projections = PROJECTIONS[projections]
        if isinstance(projections, dict):
            projections = Projections.from_dict(projections)
        if projections is not None and not isinstance(projections, Projections):
            raise TypeError(
                f"projections must be a kvbind Projections, its dict, the name of a system or None; got "
                f"{type(projections).__name__}"
            )
        self._projections = projections

    @property
    def fast_widths(self) -> tuple[int, int, int]:
        """Channels of a fast head's keys, of its values, and of the fast network's hidden layers."""
        if self.projections is not None:
            return fast_widths(self.hidden_size, self.num_lact_heads, self.projections, self.inter_multi)
        width = self.hidden_size // self.num_lact_heads
        return width, width, int(width * self.inter_multi)

    @property
    def reach(self) -> int:
        """How many tokens attention sees, the token itself among them: 1 where there is none."""
        return self.window_size if self.projections is None else 1

    @property
    def mlp_width(self) -> int:
        """Hidden width of the blocks' MLP: `intermediate_size`, or `2/3 * hidden_ratio * d` rounded up to 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (4 if self.hidden_ratio is None else self.hidden_ratio) * 2 / 3)
        return -(-width // 256) * 256

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the inner loop included."""
        fields: dict[str, Any] = super().to_dict()
        fields.pop("_inner", None)
        given = fields.pop("_projections", None)
        made = {} if given is None else {"projections": given.to_dict()}
        return {**fields, "inner": self.inner.to_dict(), **made}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that `to_dict` wrote, or, of a dict without `inner`, a released one.

        Args:
            config_dict: fields.
            **kwargs: as transformers takes them: fields to override, `return_unused_kwargs`.

        Raises:
            ValueError, TypeError: as the class does.
        """
        if "inner" in config_dict:
            return super().from_dict(dict(config_dict), **kwargs)
        read = super().from_dict({**RELEASED_DEFAULTS, **config_dict}, **kwargs)
        config = read[0] if isinstance(read, tuple) else read
        tell_unused(config_dict.get("ttt_loss_type") or "dot_product", config.inner)
        return read

    @classmethod
    def from_released_config(cls, fields: dict[str, Any]) -> Self:
        """The configuration that a released JSON file (arXiv 2505.23884's public code) stands for.

        Newton-Schulz runs in bfloat16, as there. Fields left out take the released defaults. `ttt_loss_type` may name any
        ablation of arXiv 2602.21204; what a checkpoint of it holds without a use is said, as a logged warning.

        Args:
            fields: the file's content.

        Raises:
            ValueError: a field that changes the computation in a way that is not supported, or `inner`, which no released
                configuration has.
        """
        if "inner" in fields:
            raise ValueError("fields must be of a released configuration, which has no 'inner'; use LactConfig(**fields)")
        config: Self = cls.from_dict(fields)
        return config

    def to_released_config(self) -> dict[str, Any]:
        """The released JSON fields that mean this configuration.

        Raises:
            ValueError: an inner loop, or a field, that the released code has no words for, or a model without the
                parameters of released checkpoints.
        """
        if self.projections is not None:
            raise ValueError(f"projections must be None in a released configuration; got {self.projections!r}")
        if not self.fast_weights:
            raise ValueError("fast_weights must be True in a released configuration; got False")
        fields: dict[str, Any] = self.to_dict()
        for name in ("inner", "ttt_form", "base_lr", "released_parameters", "fast_weights", "decode_dtype", "auto_map"):
            fields.pop(name, None)
        described = released_of_inner(self.inner)
        if not self.released_parameters:
            check_all_used(described["ttt_loss_type"], self.inner, lact_llm(described["lact_chunk_size"]))
        if self.base_lr != 1e-3:
            raise ValueError(f"base_lr must be 0.001 in a released configuration; got {self.base_lr}")
        if self.hidden_ratio is not None:
            fields["hidden_ratio"] = self.hidden_ratio
        return {
            **fields,
            **described,
            **{name: values[0] for name, values in FIXED_FIELDS.items()},
            "architectures": ["LaCTForCausalLM"],
            "fuse_norm": True,
            "last_layer_fuse_norm": True,
            "fuse_swiglu": True,
            "fuse_cross_entropy": True,
        }


def inner_of_released(
    lact_chunk_size: int = 2048,
    use_muon: bool = True,
    use_momentum: bool = True,
    ttt_prenorm: bool = False,
    ttt_loss_type: str = "dot_product",
    inter_multi: float = 1,
) -> InnerLoop:
    """The inner loop that the released fields describe.

    Raises:
        ValueError: an ablation that is unknown or not supported.
    """
    return language_ablation(
        lact_llm(lact_chunk_size), ttt_loss_type, use_muon=use_muon, use_momentum=use_momentum, ttt_prenorm=ttt_prenorm,
        inter_multi=inter_multi,
    )  # fmt: skip


def released_of_inner(inner: InnerLoop) -> dict[str, Any]:
    """The released fields that describe `inner`.

    Raises:
        ValueError: an inner loop that they cannot describe; the message names the fields that stand in the way.
    """
    if inner.chunk is None:
        raise ValueError("inner's chunk must be a number in a released configuration; got None")
    fields: dict[str, Any] = {
        "lact_chunk_size": inner.chunk,
        "use_muon": inner.orthogonalize is not None,
        "use_momentum": inner.momentum,
        "ttt_prenorm": inner.normalize == "read",
    }
    for name in ("dot_product",) if fields["ttt_prenorm"] else LANGUAGE_NAMES:
        if inner_of_released(**fields, ttt_loss_type=name) == inner:
            return {**fields, "ttt_loss_type": name}
    raise ValueError(no_words_for(inner, inner_of_released(**fields)))


def _transformers_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Of further fields, those that belong to transformers; the rest must be harmless.

    Raises:
        ValueError: a fixed field with another value, an option that would do nothing, or an unknown field that is set.
    """
    for name in FIXED_FIELDS.keys() & fields.keys():
        if fields[name] not in FIXED_FIELDS[name]:
            allowed = " or ".join(repr(x) for x in FIXED_FIELDS[name])
            raise ValueError(f"{name} must be {allowed}; got {fields[name]!r}, which is not supported")
    further = {name: x for name, x in fields.items() if name not in FIXED_FIELDS and name not in HARMLESS_FIELDS}
    own = inspect.signature(LactConfig.__init__).parameters
    return inherited_fields("LactConfig", further, REFUSED, own)
