"""One layer of LaCT view synthesis: attention inside each image, fast weights across views, MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.layers.attention.modules import FullAttention
from kvbind.layers.attention.softmax import softmax_attention
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.norm import RMSNorm, add_layer_norm
from kvbind.layers.operands import split_heads
from kvbind.models.lact_nvs.config import LactNvsConfig


class ImageAttention(nn.Module):
    """Softmax attention among the tokens of each image, queries and keys RMS-normed per head.

    Args:
        dim: width d.
        head_dim: width of a head.
        qk_norm: the norms on queries and keys.
    """

    def __init__(self, dim: int, head_dim: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.c_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim) if qk_norm else None
        self.k_norm = RMSNorm(head_dim) if qk_norm else None

    def forward(self, x: Tensor, per_image: int) -> Tensor:
        """`[B, V * per_image, d]` to the same shape, attention inside each run of `per_image` tokens."""
        images = x.reshape(-1, per_image, x.shape[-1])
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(images).chunk(3, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = softmax_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        output: Tensor = self.c_proj(mixed.transpose(1, 2).flatten(2))
        return output.reshape(x.shape)


class LactNvsMlp(nn.Module):
    """`c_proj(gelu(c_fc(x)))`, without biases.

    Args:
        dim: width d.
        hidden: hidden width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to the same shape."""
        output: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return output


class LactNvsBlock(nn.Module):
    """Attention inside each image, fast weights across views, MLP; each behind a LayerNorm, on a residual stream.

    The released names put the three, with their norms `ln`, into one list, `module_list`.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: LactNvsConfig) -> None:
        super().__init__()
        dim = config.dim
        fast: nn.Module = FullAttention(dim, config.head_dim)
        if config.fast_weights:
            fast = LactNvsLayer(
                dim, config.fast_head_dim, config.inner, inter_multi=config.inter_multi, base_lr=config.base_lr,
                released_parameters=config.released_parameters,
            )  # fmt: skip
        parts = (ImageAttention(dim, config.head_dim, config.qk_norm), fast, LactNvsMlp(dim, int(dim * config.mlp_ratio)))
        self.module_list = nn.ModuleList(nn.ModuleDict({"ln": nn.LayerNorm(dim, bias=False), "f": part}) for part in parts)

    @property
    def fast(self) -> LactNvsLayer:
        """The fast-weight layer."""
        layer: LactNvsLayer = self.module_list[1]["f"]  # type: ignore[index]
        return layer

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of the block's layer, assignable as there."""
        return self.fast.inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        self.fast.inner = inner

    def forward(self, x: Tensor, per_image: int, update_tokens: slice | None, state: State | None) -> tuple[Tensor, State]:
        """On tokens `[B, V * per_image, d]`; the rest as `LactNvsLayer.forward`."""
        (attention_norm, attention), (fast_norm, fast), (mlp_norm, mlp) = (
            (part["ln"], part["f"])  # type: ignore[index]
            for part in self.module_list
        )
        x, h = add_layer_norm(x, None, attention_norm)
        x, h = add_layer_norm(x, attention(h, per_image), fast_norm)
        mixed, after = fast(h, update_tokens, state)
        x, h = add_layer_norm(x, mixed, mlp_norm)
        return x + mlp(h), after
