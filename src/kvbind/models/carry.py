"""Weights carried from a model to one whose inner loop is another: those that still mean what they meant.

Everything around the fast-weight layers is the same in both. Inside of them a parameter keeps its meaning where both layers
have it in one shape, and of learned rates each fast matrix's own rows do. Fast matrices do not where a fast network gains or
loses its hidden layers: what the last matrix reads is then something else, features in the one and keys in the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.layers.fast_matrices import lact_parameter, vittt_parameter
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer
from kvbind.layers.lact_nvs import LactNvsLayer
from kvbind.layers.vittt import VitttLayer

PARAMETERS: dict[type[nn.Module], Callable[[str], str]] = {
    LactLayer: lact_parameter,
    LactNvsLayer: lact_parameter,
    VitttLayer: vittt_parameter,
    FastWeightLayer: lambda weight: "weights." + weight.replace(".", "_"),
}
"""The layers of fast weights, and under which name each holds a fast weight."""

LAYERS = tuple(PARAMETERS)

RATES = {LactLayer: "lr_proj", LactNvsLayer: "lr_fc"}
"""What makes learned rates, in layers whose rows of it belong to one fast matrix each."""


@dataclass(frozen=True)
class Carried:
    """What became of the weights of a model, as numbers of weights by name.

    Names are of parameters and buffers. Those of layers of fast weights are without the layer's own name, so that all layers
    count under one; of other lists of modules a star stands for the number.

    Attributes:
        kept: those that both models have; they are equal.
        dropped: those that only the old model had a use for.
        new: those that only the new model has, as they were drawn.
    """

    kept: Mapping[str, int]
    dropped: Mapping[str, int]
    new: Mapping[str, int]

    def lines(self) -> list[str]:
        """For people, a line each: how many weights were kept, which were dropped, which are new."""
        found = [f"kept: {sum(self.kept.values()):,} weights"]
        for title, names in (("dropped", self.dropped), ("new", self.new)):
            told = ", ".join(f"{name} ({count:,})" for name, count in names.items())
            found.append(f"{title}: {f'{sum(names.values()):,} weights: {told}' if names else 'none'}")
        return found


@torch.no_grad()
def carry_over(old: nn.Module, new: nn.Module) -> Carried:
    """Give `new` the weights of `old` that still mean what they meant; the others of `new` stay as they are.

    Args:
        old: a model of one of the three families; its weights may be on another device, or of another dtype.
        new: one that differs from it in its inner loops alone.

    Raises:
        ValueError: they differ in anything else.
    """
    given, own = old.state_dict(), new.state_dict()
    before, after = layers_of(old), layers_of(new)
    if list(before) != list(after) or any(type(before[name]) is not type(after[name]) for name in after):
        kinds = [", ".join(dict.fromkeys(type(layer).__name__ for layer in layers.values())) for layers in (before, after)]
        raise ValueError(
            f"the inner loop must be one that runs in the model's own layers, {len(before)} {kinds[0]}; the new one takes "
            f"{len(after)} {kinds[1]}, to which no weights can be carried"
        )
    within = tuple(f"{name}." for name in after)
    for name in dict.fromkeys((*own, *given)):
        shapes = [list(x[name].shape) if name in x else None for x in (given, own)]
        if not name.startswith(within) and shapes[0] != shapes[1]:
            raise ValueError(
                f"models must differ in their inner loops alone; {name} is {shapes[0]} in one, {shapes[1]} here"
            )
    kept: dict[str, int] = {}
    dropped: dict[str, int] = {}
    new_ones: dict[str, int] = {}
    seen = set()
    for name, x in own.items():
        if not name.startswith(within):
            x.copy_(given[name])
            if x.data_ptr() not in seen:  # tied weights are in a state dict twice
                count(kept, re.sub(r"\.\d+\.", ".*.", name), x)
            seen.add(x.data_ptr())
    for name, layer in after.items():
        for part, held, fresh in pieces(f"{name}.", before[name], layer, given, own):
            if held is not None and fresh is not None:
                fresh.copy_(held)
                count(kept, part, fresh)
            elif held is not None:
                count(dropped, part, held)
            elif fresh is not None:
                count(new_ones, part, fresh)
    return Carried(kept, dropped, new_ones)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers of fast weights, by their names in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def pieces(
    prefix: str, old: Any, new: Any, given: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """The weights of a layer, piece by piece: a name, the old layer's and the new one's; None where one has none.

    Args:
        prefix: of the layer's names.
        old: the layer that was.
        new: the layer that is.
        given: the weights of the model that was.
        own: those of the model that is.
    """
    held = of_layer(prefix, old, given)
    fresh = of_layer(prefix, new, own)
    parameter = PARAMETERS[type(new)]
    moved = {
        parameter(weight) for layer in (old, new) for weight in (*layer.inner.network.matrices, *layer.inner.network.vectors)
    }
    if old.inner.network.hidden_layers == new.inner.network.hidden_layers:
        moved = set()
    for name in dict.fromkeys((*held, *fresh)):
        one, other = held.get(name), fresh.get(name)
        fast = name in moved or name.partition(".")[0] in moved
        if one is not None and other is not None and (fast or one.shape != other.shape):
            yield name, one, None
            yield name, None, other
        else:
            yield name, one, other


def of_layer(prefix: str, layer: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a layer by name, without its prefix; learned rates by their fast matrix."""
    rates = RATES.get(type(layer))
    found: dict[str, Tensor] = {}
    for name, x in weights.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if rates is None or not name.startswith(f"{rates}."):
            found[name] = x
            continue
        for matrix in layer.rate_names:
            rows = layer.rate_rows(matrix)
            # a view, so that what is written to it is the model's
            found[f"{name} of {matrix}"] = x[rows.start : rows.stop : rows.step]
    return found


def count(counts: dict[str, int], name: str, x: Tensor) -> None:
    """Add a tensor to the numbers of weights by name."""
    counts[name] = counts.get(name, 0) + x.numel()
