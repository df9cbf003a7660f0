"""How parameters of a layer are divided over ranks, each of which has some heads, or some hidden channels of an MLP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from kvbind.inner.gates import DECLARED
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.gates import GateMaker
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.operands import Paths, wide


@dataclass(frozen=True)
class Division:
    """Which part of a parameter is a rank's.

    Attributes:
        axis: along which it is divided; None where every rank has all of it.
        sections: along that axis, what lies side by side: how much, and how often all heads come in it; 0 for what every
            rank has all of. None for one section in which they come once.
    """

    axis: int | None = 0
    sections: tuple[tuple[int, int], ...] | None = None

    def part(self, weight: Tensor, rank: int, ranks: int) -> Tensor:
        """A rank's part.

        Raises:
            ValueError: ranks that do not divide it.
        """
        if self.axis is None or ranks == 1:
            return weight
        length, parts = weight.shape[self.axis], []
        sections = self.sections or ((length, 1),)
        for section, (size, groups) in zip(weight.split([size for size, _ in sections], self.axis), sections, strict=True):
            if groups and size % (groups * ranks):
                raise ValueError(f"tensor_parallel_size must divide {size // groups}, as weights have it; got {ranks}")
            own = section.unflatten(self.axis, (groups, ranks, -1)).select(self.axis + 1, rank) if groups else section
            parts.append(own.flatten(self.axis, self.axis + 1) if groups else own)
        return torch.cat(parts, self.axis)


WHOLE, ROWS, COLUMNS = Division(None), Division(0), Division(1)

OF_MLP = {r"(gate|up)_proj\.weight": ROWS, r"down_proj\.weight": COLUMNS}
"""Divisions of an MLP's parameters, by the pattern of their names."""


def lact_divisions(layer: LactLayer) -> dict[str, Division]:
    """Those of a LaCT layer's. Heads are rows, side by side."""
    return {
        r"ttt_norm\.weight": WHOLE,
        r"qkv\.(weight|bias)": Division(0, ((3 * layer.hidden_size, 3),)),
        r"[qk]_norm\.weight": ROWS,
        r"o_proj\.weight": COLUMNS,
        r"qk_(scale|offset)": ROWS,
        r"(ttt_scale|lr)_proj\.(weight|bias)": ROWS,
        rf"({'|'.join(DECLARED)})_proj\.0\.(weight|bias)": ROWS,
        r"w([012]|_\w+)(\.w_(left|right))?": ROWS,
    }


def fast_weight_divisions(layer: FastWeightLayer) -> dict[str, Division]:
    """Those of a layer's without attention."""
    p, outputs = layer.projections, layer.heads * layer.value_width

    def stream(name: str) -> Division:
        groups = 0 if p.shared_keys and name != "v" else 1 if name == "q" else layer.writes
        return Division(0, ((layer.widths[name], groups),))

    return {
        **{rf"{name}_proj\.weight": stream(name) for name in ("q", "k", "v")},
        r"conv\.(weight|bias)": Division(0, tuple(x for name in p.conv_on for x in stream(name).sections or ())),
        r"o_proj\.weight": COLUMNS,
        r"(output_gate|makers\.\w+\.proj)\.0\.weight": WHOLE,
        r"(output_gate|makers\.\w+\.proj)(\.2)?\.(weight|bias)": ROWS,
        r"output_norm\.(weight|bias)": WHOLE if p.output_norm == "rms" else Division(0, ((outputs, 1),)),
        r"makers\.\w+\.(log_rate|step_bias|logit)": ROWS,
        r"makers\.\w+\.theta": WHOLE,
        r"powers|shift\.\w+": WHOLE,
        r"kappa|alpha|rho|skip|correction|weights\.\w+": ROWS,
    }


def take_part(module: nn.Module, divisions: Mapping[str, Division]) -> None:
    """Give a module on the meta device this rank's part of its parameters, each of which then loads its own part.

    Args:
        module: the module.
        divisions: by the pattern of parameters' names.

    Raises:
        ValueError: a parameter that nothing is known of, which vLLM would not compute with.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, parameter in list(module.named_parameters()):
        division = next((how for pattern, how in divisions.items() if re.fullmatch(pattern, name)), None)
        if division is None:
            raise ValueError(
                f"a model that vLLM serves must have known parameters; {name!r} of {type(module).__name__} is not"
            )
        shape = division.part(parameter, rank, ranks).shape
        held = nn.Parameter(torch.empty(shape, dtype=parameter.dtype), requires_grad=False)

        def load(parameter: Tensor, whole: Tensor, division: Division = division) -> None:
            parameter.data.copy_(division.part(whole, rank, ranks))

        held.weight_loader = load  # type: ignore[attr-defined]
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], held)
        if isinstance(owner, nn.Linear) and held.dim() == 2:
            owner.out_features, owner.in_features = held.shape


def divide_lact(layer: LactLayer) -> None:
    """Have a layer on the meta device be this rank's part of it."""
    ranks = get_tensor_model_parallel_world_size()
    take_part(layer, lact_divisions(layer))
    layer.num_attn_heads //= ranks
    layer.num_lact_heads //= ranks
    paths = layer.paths
    layer.paths = Paths(layer.num_attn_heads, layer.num_lact_heads, paths.eps, paths.silu, paths.rotary)
    if ranks > 1 and layer.q_norm is not None and layer.k_norm is not None:
        layer.add_module("q_norm", DividedNorm(layer.q_norm))
        layer.add_module("k_norm", DividedNorm(layer.k_norm))


def divide_fast_weights(layer: FastWeightLayer) -> None:
    """Likewise, of a layer without attention."""
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    take_part(layer, fast_weight_divisions(layer))
    shared = {"q", "k"} if layer.projections.shared_keys else set()
    layer.widths = {name: width if name in shared else width // ranks for name, width in layer.widths.items()}
    layer.heads //= ranks
    for maker in layer.makers.values():
        assert isinstance(maker, GateMaker)
        maker.sizes = replace(maker.sizes, heads=layer.heads, first=rank * layer.heads)
    norm = layer.output_norm
    if isinstance(norm, nn.GroupNorm):
        norm.num_groups, norm.num_channels = layer.heads, layer.heads * layer.value_width
    elif ranks > 1 and norm is not None and layer.projections.output_norm != "rms":
        assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
        layer.add_module("output_norm", DividedNorm(norm))


class DividedNorm(nn.Module):
    """RMS or layer norm over channels of which each rank has a part.

    Args:
        norm: the norm of all channels, whose parameters it takes.
    """

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps or 0.0
        self.centered = isinstance(norm, nn.LayerNorm)
        self.bias = norm.bias if isinstance(norm, nn.LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[..., D / ranks]`."""
        y = wide(x)
        if self.centered:
            y = y - self._mean(y)
        y = y * torch.rsqrt(self._mean(y.square()) + self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _mean(self, y: Tensor) -> Tensor:
        width = y.shape[-1] * get_tensor_model_parallel_world_size()
        mean: Tensor = tensor_model_parallel_all_reduce(y.sum(-1, keepdim=True)) / width
        return mean
