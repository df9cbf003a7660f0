"""What `kvbind bench verify` holds to PyTorch beside inner loops: the kernels of the layer around one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.bench.harness.errors import Evaluation
from kvbind.bench.harness.named_operands import Leaves
from kvbind.kernels.elementwise.gated_output import gated_output
from kvbind.kernels.elementwise.swiglu import swiglu
from kvbind.layers.grid import add_convolution
from kvbind.layers.lact_nvs import unit_operands
from kvbind.layers.norm import NORM_EPS, add_layer_norm, residual_norm
from kvbind.layers.operands import Paths, make_operands
from kvbind.layers.rotary import rotary_tables
from kvbind.models.lact.loss import linear_cross_entropy


@dataclass(frozen=True)
class LayerOperator:
    """A function that takes a kernel where there is one.

    Attributes:
        name: of the case.
        shapes: of its operands, by name.
        narrow: those that come in the working precision; others are in float32 at the least.
        call: from operands and the working precision to results.
        spread: standard deviations of operands that are not drawn with 1.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    narrow: tuple[str, ...]
    call: Callable[[Leaves, torch.dtype], tuple[Tensor, ...]]
    spread: Mapping[str, float] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"form": "layer", "reference": "layer", "newton_schulz": False}

    def draw(self, device: torch.device, dtype: torch.dtype) -> Leaves:
        """Operands, the same in every precision: those that come in `dtype`, rounded to it; in float64."""
        generator = torch.Generator(device).manual_seed(0)
        leaves = {
            name: self.spread.get(name, 1.0) * torch.randn(s, generator=generator, device=device).double()
            for name, s in self.shapes.items()
        }
        return {name: x.to(dtype).double() if name in self.narrow else x.float().double() for name, x in leaves.items()}

    def operands(self, leaves: Leaves, dtype: torch.dtype) -> Leaves:
        """What `call` takes in a working precision, as leaves that want gradients."""
        wide = torch.promote_types(dtype, torch.float32)
        return {name: x.to(dtype if name in self.narrow else wide).requires_grad_() for name, x in leaves.items()}

    def evaluate(self, leaves: Leaves, dtype: torch.dtype) -> Evaluation:
        """All results, and gradients of a fixed random combination of them.

        Args:
            leaves: from `draw`.
            dtype: the working precision.
        """
        own = self.operands(leaves, dtype)
        results = self.call(own, dtype)
        gradients = torch.autograd.grad(results, list(own.values()), slopes(results))
        output = torch.cat([y.detach().double().flatten() for y in results])
        return Evaluation(output, {}, dict(zip(own, gradients, strict=True)))


def slopes(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Fixed random gradients of results, that bfloat16 holds."""
    generator = torch.Generator(results[0].device).manual_seed(1)
    return [torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype) for y in results]


def pieces(tokens: int, heads: int, width: int) -> list[LayerOperator]:
    """Everything around an inner loop that has a kernel, of layers and blocks, and the loss; at two batches of tokens.

    Args:
        tokens: in a row.
        heads: fast heads.
        width: of one; made of two or six attention heads.
    """
    model, together = heads * width, 6 if width % 12 == 0 and width >= 192 else 2
    rows, by_head = (2, tokens, model), (2, tokens, heads, width)

    def operands(silu: bool, rotary: bool) -> Callable[[Leaves, torch.dtype], tuple[Tensor, ...]]:
        def call(x: Leaves, dtype: torch.dtype) -> tuple[Tensor, ...]:
            tables = rotary_tables(torch.arange(tokens, device=x["q"].device)[None], width // together, 1e6)
            paths = Paths(together * heads, heads, NORM_EPS, silu, rotary)
            return make_operands(x["q"], x["k"], x["q"], x["scale"], x["offset"], tables, paths)

        return call

    def gated(x: Leaves, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (gated_output(x["fast"], x["weight"], x.get("gate"), x["mixed"], NORM_EPS),)

    def summed(x: Leaves, dtype: torch.dtype) -> tuple[Tensor, ...]:
        y, h = residual_norm(x["stream"], x.get("delta"), x["weight"], NORM_EPS, dtype)
        return (y, h) if "delta" in x else (h,)

    def layer_normed(x: Leaves, dtype: torch.dtype) -> tuple[Tensor, ...]:
        norm = nn.LayerNorm(model, eps=NORM_EPS, bias="bias" in x, device="meta")
        given = {name: x[name] for name in ("weight", "bias") if name in x}
        norm.__dict__["_parameters"] |= given
        y, h = add_layer_norm(x["stream"], x.get("delta"), norm)
        return (y, h) if "delta" in x else (h,)

    def convolved(x: Leaves, dtype: torch.dtype) -> tuple[Tensor, ...]:
        conv = nn.Conv2d(model, model, 3, padding=1, groups=model, device="meta")
        conv.__dict__["_parameters"] |= {name: x[name] for name in ("weight", "bias")}
        # PyTorch's convolution takes operands of one dtype
        with torch.autocast(x["image"].device.type, dtype=dtype, enabled=x["image"].dtype != x["weight"].dtype):
            return (add_convolution(x["image"], conv, (side, side)),)

    def loss(x: Leaves, _: torch.dtype) -> tuple[Tensor, ...]:
        labels = torch.arange(2 * tokens, device=x["hidden"].device).view(2, tokens) % vocabulary
        return (linear_cross_entropy(x["hidden"], x["vocabulary"], labels),)

    vocabulary = 32000 if width >= 192 else 10 * model
    words = {"hidden": rows, "vocabulary": (vocabulary, model)}
    made = {"q": rows, "k": rows, "scale": (model, 2), "offset": (model, 2)}
    outputs = {"fast": by_head, "weight": (width,), "mixed": rows}
    stream = {"stream": rows, "weight": (model,)}
    mlp = (2, tokens, 8 * model // 3)
    side = math.isqrt(tokens)
    image = {"image": (2, side * side, model), "weight": (model, 1, 3, 3), "bias": (model,)}
    return [
        LayerOperator("layer: queries and keys", made, ("q", "k"), operands(silu=True, rotary=True)),
        LayerOperator(
            "layer: queries and keys without SiLU and rotation", made, ("q", "k"), operands(silu=False, rotary=False)
        ),
        LayerOperator("layer: gated output", outputs | {"gate": (2, tokens, heads)}, ("fast", "mixed", "gate"), gated),
        LayerOperator("layer: output without gate", outputs, ("fast", "mixed"), gated),
        LayerOperator("layer: SwiGLU", {"gate": mlp, "up": mlp}, ("gate", "up"), lambda x, _: (swiglu(x["gate"], x["up"]),)),
        LayerOperator("layer: norm of the stream", stream, (), summed),
        LayerOperator("layer: sum and norm of the stream", stream | {"delta": rows}, ("delta",), summed),
        LayerOperator("block: layer norm", stream | {"bias": (model,)}, (), layer_normed),
        LayerOperator("block: sum and layer norm", stream | {"delta": rows}, ("delta",), layer_normed),
        LayerOperator("block: depthwise convolution", image, ("image",), convolved),
        LayerOperator(
            "layer: queries, keys and values of views",
            {"qkv": (2, tokens, 3 * model)},
            ("qkv",),
            lambda x, _: unit_operands(x["qkv"], heads),
        ),
        # logits of ordinary size: a softmax of large ones magnifies the rounding of their product
        LayerOperator("layer: loss", words, tuple(words), loss, spread={"vocabulary": model**-0.5}),
    ]
