"""One layer of the LaCT language model: what mixes its tokens, a SwiGLU MLP, and norms."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from kvbind.inner.spec import InnerLoop
from kvbind.kernels.elementwise.swiglu import swiglu
from kvbind.layers.attention.modules import WindowAttention
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.lact.slots import DecodeStep, Slots
from kvbind.layers.layout import Layout
from kvbind.layers.norm import ResidualNorm
from kvbind.layers.rotary import Tables
from kvbind.models.lact.cache import MixerState
from kvbind.models.lact.config import LactConfig


class LactMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, `[..., d]` to `[..., d]`.

    Args:
        hidden_size: d.
        width: hidden width.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return output


def make_mixer(config: LactConfig) -> LactLayer | FastWeightLayer | WindowAttention:
    """The layer that mixes tokens: attention and fast weights, or one of the two alone."""
    if not config.fast_weights:
        return WindowAttention(
            config.hidden_size,
            config.num_attn_heads,
            config.window_size,
            qkv_bias=config.qkv_bias,
            qk_norm=config.attn_qk_norm,
            rope_theta=config.rope_theta,
        )
    if config.projections is not None:
        return FastWeightLayer(
            config.hidden_size,
            config.num_lact_heads,
            config.inner,
            config.projections,
            form=config.ttt_form,
            hidden_multiplier=config.inter_multi,
            base_lr=config.base_lr,
        )
    return LactLayer(
        config.hidden_size,
        config.num_attn_heads,
        config.num_lact_heads,
        config.inner,
        config.window_size,
        form=config.ttt_form,
        hidden_multiplier=config.inter_multi,
        low_rank=config.w0_w2_low_rank if config.w0_w2_low_rank > 0 else None,
        init_gain=config.fw_init_gain,
        base_lr=config.base_lr,
        qkv_bias=config.qkv_bias,
        qk_norm=config.attn_qk_norm,
        silu_qk=config.qkv_silu,
        silu_v=config.qkv_silu and not config.no_v_silu,
        rotary=not config.ttt_nope,
        rope_theta=config.rope_theta,
        output_scale=config.learnable_ttt_scale,
        released_parameters=config.released_parameters,
        decode_dtype=config.decode_dtype,
    )


class LactBlock(GradientCheckpointingLayer):
    """One layer: `x + attn(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LactConfig) -> None:
        super().__init__()
        self.attn_norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = make_mixer(config)
        self.mlp_norm = ResidualNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = LactMLP(config.hidden_size, config.mlp_width)

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of the block's layer, assignable as there.

        Raises:
            AttributeError: a layer without fast weights.
        """
        return self.attn.inner  # type: ignore[return-value]

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        self.attn.inner = inner

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        tables: Tables,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        """As `LactLayer.forward`, on the residual stream `[B, T, d]`."""
        x, normed = self.attn_norm(x)
        mixed, after = self.attn(normed, layout, tables, state, return_state)
        x, normed = self.mlp_norm(x, mixed)
        return x + self.mlp(normed), after

    def step(self, x: Tensor, tables: Tables, place: DecodeStep, slots: Slots) -> Tensor:
        """As `LactLayer.step`, on the residual stream `[B, 1, d]`."""
        assert isinstance(self.attn, LactLayer)
        x, normed = self.attn_norm(x)
        mixed = self.attn.step(normed, tables, place, slots)
        x, normed = self.mlp_norm(x, mixed)
        output: Tensor = x + self.mlp(normed)
        return output
