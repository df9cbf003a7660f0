"""The mixer of ViTTT: fast weights with a gated linear unit per head, beside one head with a depthwise convolution."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from kvbind.forms.autocast import autocasts
from kvbind.inner.networks import DepthwiseConv
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import vittt
from kvbind.inner.value import check_positive_int
from kvbind.kernels.common.tracing import is_exported
from kvbind.layers.fast_matrices import vittt_parameter
from kvbind.layers.fitting import check_built, check_sees_everything
from kvbind.layers.inner_call import InnerCall, check_input
from kvbind.layers.operands import split_heads, wide

INIT_STD = 0.02
"""Standard deviation of the fast weights at the start, where nothing else is said."""

LOSS_SCALE = 1 / 3
"""What the mean of the inner loss over tokens is multiplied by: `9^-1/2`, for the nine weights of a 3x3 kernel."""

ROTARY_BASE = 10000.0


class VitttLayer(nn.Module):
    """Two fast networks side by side, trained by the image that they then read (specification, section 5; arXiv 2512.01643).

    One projection emits q, k and v for `heads` heads of width `dim / heads` and for one more head of the same width. The
    first run `inner`, the last runs `inner_conv` over the grid of tokens. Their outputs are concatenated and projected.

    The inner loss is averaged over the T tokens and divided by 3: the learning rate is `1 / (3 T)`. For the dot product that
    is the same as values scaled by `1 / (3 T)`; for the squared error it leaves the targets what they are.

    State, norms and updates are in float32 whatever the input's dtype. Outputs beyond float16's range saturate there.

    Parameters have the released names and layouts (specification, section 6), so that released checkpoints load: `qkv`,
    `proj`, `w1`, `w2` `[1, heads, in, out]`, `w3` `[dim / heads, 1, 3, 3]`. Only matrices that `inner` needs are built.

    Args:
        dim: width d of the residual stream.
        heads: heads of the first branch.
        inner: their inner loop; by default `kvbind.systems.vittt()`.
        inner_conv: the convolution's; by default `kvbind.systems.vittt("conv")`. A `grid` in its network binds the layer to
            grids of that shape.
        qkv_bias: a bias in the `qkv` projection.

    Attributes:
        inner: the inner loop of the heads; assigning one that asks for matrices that were not built raises.
        inner_conv: the inner loop of the convolution, assignable likewise.

    Raises:
        ValueError: heads that do not divide the width, or an inner loop that cannot run here.
        TypeError: `inner` or `inner_conv` is no InnerLoop.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: InnerLoop | None = None,
        inner_conv: InnerLoop | None = None,
        *,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("heads", heads)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}; got {heads}")
        inner = vittt() if inner is None else inner
        inner_conv = vittt("conv") if inner_conv is None else inner_conv
        check_fits_heads(inner)
        check_fits_conv(inner_conv)

        self.dim, self.heads, self.head_width = dim, heads, dim // heads
        width = self.head_width
        self.qkv = nn.Linear(dim, 3 * (dim + width), bias=qkv_bias)
        self._built_shapes = self._shapes_for(inner)
        for matrix, shape in self._built_shapes.items():
            self.register_parameter(vittt_parameter(matrix), nn.Parameter(torch.empty(1, heads, *shape)))
        self.w3 = nn.Parameter(torch.empty(width, 1, 3, 3))
        self.proj = nn.Linear(dim + width, dim)
        self._inner, self._inner_conv = inner, inner_conv
        self._conv_on: dict[tuple[int, int], InnerLoop] = {}
        self.reset_parameters()

    @torch.compiler.assume_constant_result
    def _prepare_grid(self, height: int, width: int) -> None:
        """Put the convolution's inner loop for this grid into `_conv_on`.

        A compiler cannot trace the making of a value. It runs this as it stands, and then finds the value in the dict.
        """
        if (height, width) not in self._conv_on:
            self._conv_on[height, width] = self._inner_conv.replace(network=DepthwiseConv((height, width)))

    def _shapes_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The `(in, out)` of each fast matrix that `inner` needs."""
        width, network = self.head_width, inner.network
        return network.shapes(width, width, (width,) * network.hidden_layers)

    def reset_parameters(self, std: float = INIT_STD) -> None:
        """Draw the starting fast weights anew, normal of standard deviation `std`."""
        for name in (*map(vittt_parameter, self._built_shapes), "w3"):
            nn.init.trunc_normal_(self.get_parameter(name), std=std)

    @property
    def inner(self) -> InnerLoop:
        """The inner loop of the heads."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        check_fits_heads(inner)
        check_built("inner", inner, self._shapes_for(inner), self._built_shapes)
        self._inner = inner

    @property
    def inner_conv(self) -> InnerLoop:
        """The inner loop of the convolution."""
        return self._inner_conv

    @inner_conv.setter
    def inner_conv(self, inner: InnerLoop) -> None:
        check_fits_conv(inner)
        self._inner_conv = inner
        self._conv_on = {}

    def start_weights(self) -> dict[str, Tensor]:
        """The fast weights that the heads start from on every image, `[heads, in, out]` by matrix name."""
        return {name: getattr(self, vittt_parameter(name))[0] for name in self._inner.network.matrices}

    def calls(self, x: Tensor, grid: tuple[int, int], rotary: Tensor | None = None) -> tuple[InnerCall, InnerCall]:
        """What each branch gives to `kvbind.ttt`, heads first: their `linearize()` shows what the layer attends to.

        Args:
            x: normalized input `[B, T, d]`.
            grid: height and width of the image in tokens, `T = height * width`.
            rotary: as `forward` takes it.

        Raises:
            ValueError: a grid that T tokens do not fill, or that `inner_conv` is not made for.
        """
        check_input(x, self.dim)
        # plain numbers: a compiler makes a graph for each grid, as the convolution's inner loop names it; an exported
        # program is one graph for all
        if not is_exported():
            grid = (operator.index(grid[0]), operator.index(grid[1]))
        length, width = grid[0] * grid[1], self.head_width
        if length != x.shape[1]:
            raise ValueError(f"grid must have as many places as x has tokens, {x.shape[1]}; got {grid[0]} x {grid[1]}")
        made_for = self._inner_conv.network.grid  # type: ignore[attr-defined]
        if made_for not in (None, grid):
            raise ValueError(
                f"grid must be {made_for[0]} x {made_for[1]}, which inner_conv's network is made for; got {grid[0]} x "
                f"{grid[1]} (DepthwiseConv(grid=None) takes any)"
            )
        if is_exported():
            conv = self._inner_conv.replace(network=DepthwiseConv(grid))
        else:
            self._prepare_grid(*grid)
            conv = self._conv_on[grid]
        # of a length that is a symbol, a tensor
        lr = LOSS_SCALE / (torch.scalar_tensor(length, device=x.device) if isinstance(length, torch.SymInt) else length)
        q, k, v, conv_q, conv_k, conv_v = torch.split(self.qkv(x), [self.dim] * 3 + [width] * 3, dim=-1)
        if rotary is not None:
            q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
            q, k = (x.to(v.dtype) if v.dtype == torch.bfloat16 else x for x in (q, k))
        # an output has its query's dtype: float16 would overflow, bfloat16 does not
        q, conv_q = (x if x.dtype == torch.bfloat16 else wide(x) for x in (q, conv_q))
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        conv_q, conv_k, conv_v = (split_heads(part, 1) for part in (conv_q, conv_k, conv_v))
        return (
            InnerCall(self._inner, self.start_weights(), q, k, v, lr),
            InnerCall(conv, {"out": self.w3[:, 0]}, conv_q, conv_k, conv_v, lr),
        )

    def forward(self, x: Tensor, grid: tuple[int, int], rotary: Tensor | None = None) -> Tensor:
        """Mix the tokens of images.

        Args:
            x: normalized input `[B, T, d]`, the rows of the grid one after another.
            grid: height and width of the image in tokens, `T = height * width`.
            rotary: angles `[T, d / 2]` by which pairs of channels of q and k turn (`rotary_angles`), or None.

        Returns:
            `[B, T, d]`.

        Raises:
            ValueError: an input without an image or of another shape, or a grid that does not fit.
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if autocasts(kind) else x.dtype
        outputs = [narrow(call.run()[0].flatten(2), dtype) for call in self.calls(x, grid, rotary)]
        mixed: Tensor = self.proj(torch.cat(outputs, dim=-1))
        return mixed

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"heads={self.heads}, inner={self._inner!r}, inner_conv={self._inner_conv!r}"


def check_fits_heads(inner: InnerLoop) -> None:
    """Refuse an inner loop that the heads cannot run.

    Raises:
        TypeError: no InnerLoop.
        ValueError: not `visibility="full"`, gates or learned rates, which the layer has not, or a depthwise convolution.
    """
    check_sees_everything("inner", inner)
    _check_no_rates("inner", inner)
    if isinstance(inner.network, DepthwiseConv):
        raise ValueError("inner's network must read single tokens; a DepthwiseConv is for inner_conv")


def check_fits_conv(inner: InnerLoop) -> None:
    """Refuse an inner loop that the convolution's head cannot run.

    Raises:
        TypeError: no InnerLoop.
        ValueError: gates or learned rates, which the layer has not, or a network that is no depthwise convolution.
    """
    check_sees_everything("inner_conv", inner)
    _check_no_rates("inner_conv", inner)
    if not isinstance(inner.network, DepthwiseConv):
        raise ValueError(f"inner_conv's network must be a DepthwiseConv; got {inner.network!r}")


def _check_no_rates(argument: str, inner: InnerLoop) -> None:
    if inner.token_lr:
        raise ValueError(f"{argument} must have token_lr=False: this layer learns no rate per token")


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; in float16, which overflows where float32 does not, values saturate."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def rotary_angles(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """Angles of a two-dimensional rotary embedding over all `dim` channels, float32 `[height * width, dim / 2]`.

    The first half of a token's pairs of channels turns with its row, the second with its column, pair i of a half by
    `position * 10000^(-4 i / dim)` (the hierarchical model of arXiv 2512.01643).

    Args:
        grid: height and width.
        dim: channels, a multiple of 4.
        device: of the result.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4 for rotary positions on a grid; got {dim}")
    quarter = dim // 4
    rates = ROTARY_BASE ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32)[:, None] * rates for side in grid)
    height, width = grid
    both = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return both.reshape(height * width, 2 * quarter)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring channels `(2 i, 2 i + 1)` of `x` `[B, T, d]` by `angles` `[T, d / 2]`; float32 or wider."""
    even, odd = wide(x)[..., 0::2], wide(x)[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
