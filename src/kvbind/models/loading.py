"""Weights into a model: whether they and its configuration fit each other, before anything of their sizes is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.files import blaming, shortened

Fields = dict[str, Any]
Weights = dict[str, Tensor]


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What weights may be held in."""


LAYERS = ("num_hidden_layers", "layers", "depth", "depths")
"""Fields that say how many layers a model has, or each of its stages."""


def check_layers(source: Path, fields: Fields | None, parameters: int) -> None:
    """Refuse a configuration of more layers than there are parameters, before anything is built of it.

    Args:
        source: where it is from, for the message.
        fields: the configuration.
        parameters: how many there are.

    Raises:
        ValueError: it has more.
    """
    for name in LAYERS:
        count = (fields or {}).get(name)
        for number in count if isinstance(count, list) else [count]:
            if isinstance(number, int) and number > parameters:
                raise ValueError(
                    f"the configuration of {source} does not fit its weights: {name} is {shortened(count)}, but there are "
                    f"{parameters} parameters"
                )


@contextmanager
def configured(source: Path, title: str, fields: Fields | None, weights: Weights) -> Iterator[None]:
    """Build a model of fields from elsewhere in here: they fit it, or are refused in one line.

    Args:
        source: where they are from, for the message.
        title: what the model is, likewise.
        fields: the configuration.
        weights: by name; there are no more layers than of these.

    Raises:
        ValueError: fields that describe no model, or one of more layers than there are weights.
        OSError: a configuration that is missing.
    """
    check_layers(source, fields, len(weights))
    with blaming(f"the configuration of {source}", f"of a {title}"):
        yield


def check_weights(weights: Mapping[object, object], source: Path) -> Weights:
    """A state dict from elsewhere, where it is one: dense tensors of numbers, each backed by what it holds.

    Raises:
        ValueError: names that are no text, and values that are anything else.
    """
    for name, x in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{source} must hold parameters by name; got {shortened(name)} for a name")
        if not isinstance(x, Tensor):
            raise ValueError(f"{source} must hold tensors alone; {shortened(name)} is a {type(x).__name__}")
        if x.layout != torch.strided or x.device.type == "meta" or x.is_quantized:
            raise ValueError(f"{source} must hold dense tensors; {shortened(name)} is none")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{source} must hold all numbers of a tensor; {shortened(name)} repeats some")
    return dict(weights)  # type: ignore[arg-type]


def load_into(model: nn.Module, weights: Weights, source: Path) -> None:
    """Give a model without weights those of a checkpoint, in their own dtypes.

    Raises:
        ValueError: weights that are not the model's, or of other kinds of numbers; the message names them.
    """
    needed = model.state_dict()
    missing, extra = sorted(needed.keys() - weights.keys()), sorted(weights.keys() - needed.keys())
    if missing or extra:
        raise ValueError(
            f"the weights of {source} do not fit its configuration: missing {shortened(missing, 400)}, not expected "
            f"{shortened(extra, 400)}"
        )
    for name, x in weights.items():
        if x.shape != needed[name].shape:
            raise ValueError(
                f"the weights of {source} do not fit its configuration: {name} must be {list(needed[name].shape)}; got "
                f"{list(x.shape)}"
            )
        need = needed[name].dtype
        if x.dtype != need and not (need.is_floating_point and x.dtype in DTYPES):
            kind = "floating point" if need.is_floating_point else str(need)
            raise ValueError(f"the weights of {source} do not fit its configuration: {name} must be {kind}; got {x.dtype}")
    model.load_state_dict(weights, assign=True)
