"""The fast-weight mixer of LaCT view synthesis: input views write it, every view reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.autocast import without_autocast
from kvbind.forms.state import State
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import lact_nvs
from kvbind.inner.value import check_positive_int
from kvbind.kernels.common.devices import runs_on
from kvbind.layers.fast_matrices import inverse_softplus, lact_parameter, with_released_parameters
from kvbind.layers.fitting import check_built, check_rates_built, check_sees_everything
from kvbind.layers.inner_call import InnerCall, check_input
from kvbind.layers.norm import NORM_EPS, RMSNorm
from kvbind.layers.operands import split_heads, unit, wide
from kvbind.layers.plain_modules import input_dtype, is_a_product

INIT_GAIN = math.sqrt(2)
"""Of the starting fast weights, over the root of their fan-in."""


class LactNvsLayer(nn.Module):
    """Fast weights over the tokens of all views of a scene (specification, section 5; arXiv 2505.23884).

    `q, k, v = silu(to_qkv(x))` per head, q and k brought to L2 norm 1. The tokens that update write, with rates
    `softplus(lr_fc(x) + softplus^-1(base_lr))` per token, head and matrix; all tokens read, and what they read is RMS-normed
    per head and projected. Rates are in float32 also under autocast.

    All of them write once; or with `inner.chunk` in chunks of so many tokens, one after the other, before any token reads
    (tttLRM, arXiv 2602.20160), where `inner.anchor` draws the weights back between chunks (Elastic TTT, arXiv 2604.07350).

    Parameters have the released names and layouts (specification, section 6): `w0`, `w1`, `w2` `[heads, in, out]` for gate,
    out and up; `lr_fc` with the matrices outermost. Only what the inner loop needs is built.

    Args:
        dim: width d of the residual stream.
        head_dim: width of a fast head; `dim / head_dim` of them.
        inner: the inner loop; by default `kvbind.systems.lact_nvs()`.
        inter_multi: hidden width of the fast network over `head_dim`.
        base_lr: the learning rate where `lr_fc` gives 0.
        bias: biases in `to_qkv` and `c_proj`.
        released_parameters: build what released checkpoints hold, a SwiGLU's matrices with learned rates for each, whether
            or not `inner` has a use for them.

    Attributes:
        inner: the inner loop; assigning one that asks for parameters that were not built raises.

    Raises:
        ValueError: widths that do not divide, a rate that is not above 0, or an inner loop that cannot run here.
        TypeError: `inner` is no InnerLoop.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        inner: InnerLoop | None = None,
        *,
        inter_multi: float = 1,
        base_lr: float = 0.01,
        bias: bool = False,
        released_parameters: bool = False,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("head_dim", head_dim)
        if dim % head_dim:
            raise ValueError(f"head_dim must divide dim = {dim}; got {head_dim}")
        base_lr_inverse = inverse_softplus(base_lr)
        inner = lact_nvs() if inner is None else inner
        check_fits_views(inner)

        self.dim, self.head_dim, self.heads = dim, head_dim, dim // head_dim
        self.hidden_width = int(head_dim * inter_multi)
        self.base_lr_inverse = base_lr_inverse
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.c_proj = nn.Linear(dim, dim, bias=bias)
        self.o_norm = RMSNorm(head_dim, eps=NORM_EPS)
        built = with_released_parameters(inner) if released_parameters else inner
        self._built_shapes = self._shapes_for(built)
        check_built("inner", inner, self._shapes_for(inner), self._built_shapes)
        for matrix, shape in self._built_shapes.items():
            self.register_parameter(lact_parameter(matrix), nn.Parameter(torch.empty(self.heads, *shape)))
        # the released order: gate, out, up
        self.rate_names = tuple(sorted(built.updated, key=lact_parameter)) if built.token_lr else ()
        self.lr_fc = nn.Linear(dim, self.heads * len(self.rate_names)) if built.token_lr else None
        self._inner = inner
        self.register_load_state_dict_pre_hook(_add_queries)
        self.reset_parameters()

    def _shapes_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The `(in, out)` of each fast matrix that `inner` needs."""
        network = inner.network
        return network.shapes(self.head_dim, self.head_dim, (self.hidden_width,) * network.hidden_layers)

    def reset_parameters(self) -> None:
        """Draw the starting fast weights anew."""
        for matrix, shape in self._built_shapes.items():
            nn.init.normal_(self.get_parameter(lact_parameter(matrix)), std=INIT_GAIN / math.sqrt(shape[0]))

    @property
    def inner(self) -> InnerLoop:
        """The inner loop that the layer runs."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        check_fits_views(inner)
        check_built("inner", inner, self._shapes_for(inner), self._built_shapes)
        check_rates_built(inner, inner.updated, self.rate_names)
        self._inner = inner

    def start_weights(self) -> dict[str, Tensor]:
        """The fast weights that every scene starts from, `[heads, in, out]` by matrix name."""
        return {name: getattr(self, lact_parameter(name)) for name in self._inner.network.matrices}

    def rate_rows(self, matrix: str) -> range:
        """The rows of `lr_fc` that make the rates of a fast matrix, one for each head."""
        first = self.rate_names.index(matrix) * self.heads
        return range(first, first + self.heads)

    def learning_rates(self, x: Tensor) -> float | dict[str, Tensor]:
        """Rates `[B, T, H]` by updated matrix, float32 or wider; or the constant 1 without `inner.token_lr`."""
        if not self._inner.token_lr or self.lr_fc is None:
            return 1.0
        with without_autocast(x.device.type):
            if is_a_product(self.lr_fc) and self.lr_fc.bias is not None:
                logits = F.linear(wide(x), wide(self.lr_fc.weight), wide(self.lr_fc.bias))
            else:
                logits = wide(self.lr_fc(x.to(input_dtype(self.lr_fc, x.dtype))))
            rates = torch.split(F.softplus(logits + self.base_lr_inverse), self.heads, dim=-1)
        by_name = dict(zip(self.rate_names, rates, strict=True))
        return {name: by_name[name] for name in self._inner.updated}

    def call(self, x: Tensor) -> InnerCall:
        """What the layer gives to `kvbind.ttt` for normalized input `[B, T, d]`."""
        check_input(x, self.dim)
        return InnerCall(
            self._inner, self.start_weights(), *unit_operands(self.to_qkv(x), self.heads), self.learning_rates(x)
        )

    def forward(
        self, x: Tensor, update_tokens: slice | Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Write with some tokens, read with all.

        Args:
            x: normalized input `[B, T, d]`, the tokens of a scene's views one view after another.
            update_tokens: which tokens write, as `kvbind.ttt` takes it; by default all. `slice(0, 0)` only reads.
            state: what an earlier call on the same scenes returned, to write on top of it or to read it.

        Returns:
            `[B, T, d]`, and the fast weights after the update.

        Raises:
            ValueError: an input without a scene or of another shape, or a state of another inner loop, batch or width.
        """
        output, after = self.call(x).run(update_tokens, state)
        mixed: Tensor = self.c_proj(self.o_norm(output).flatten(2))
        return mixed, after

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"heads={self.heads}, inner={self._inner!r}"


def unit_operands(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU of a projection `[B, T, 3 d]`, and queries and keys of L2 norm 1 per head, on a kernel where one takes it.

    Returns:
        Queries, keys and values `[B, T, H, d / H]`, in the projection's dtype.
    """
    if runs_on(qkv.device):
        from kvbind.kernels.elementwise.silu_unit import covers, silu_unit

        if covers(qkv, heads):
            return silu_unit(qkv, heads, NORM_EPS)
    q, k, v = (split_heads(part, heads) for part in F.silu(qkv).chunk(3, dim=-1))
    return unit(q, NORM_EPS).to(v.dtype), unit(k, NORM_EPS).to(v.dtype), v


def add_queries(weight: Tensor, dim: int) -> Tensor:
    """`to_qkv`'s weight `[2 d, d]` or bias `[2 d]` without queries, with queries of zeros; any other as it is.

    Released layers that read with keys have no queries.
    """
    return torch.cat((weight.new_zeros(dim, *weight.shape[1:]), weight)) if weight.shape[0] == 2 * dim else weight


def _add_queries(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A layer that reads with keys takes weights without queries."""
    if isinstance(module, LactNvsLayer) and module.inner.query == "key":
        for name in (f"{prefix}to_qkv.weight", f"{prefix}to_qkv.bias"):
            if name in state_dict:
                state_dict[name] = add_queries(state_dict[name], module.dim)


def check_fits_views(inner: InnerLoop) -> None:
    """Refuse an inner loop that the layer cannot run.

    Raises:
        TypeError: no InnerLoop.
        ValueError: not `visibility="full"`, gates, which the layer has not, or a network that reads a grid.
    """
    check_sees_everything("inner", inner)
    if isinstance(inner.network, DepthwiseConv):
        raise ValueError("inner's network must read single tokens; DepthwiseConv reads a grid of them")
