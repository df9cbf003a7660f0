"""A scene: what a view-synthesis model keeps of its input views."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvbind.files import parse_json, read_tensors
from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_positive_int
from kvbind.models.lact_nvs.config import LactNvsConfig


@dataclass(frozen=True, eq=False)
class Scene:
    """The fast weights of every layer after reading some views: constant size, whatever their number.

    `scene[i]`, `scene[[2, 0]]` and `scene[1:]` choose scenes of a batch; an int keeps the batch axis.

    Attributes:
        states: fast weights of each layer, first to last, each a batch of B scenes.
        size: height and width of the views in pixels.
        views: how many views have been read.
        architecture: the sizes of the model that read them, as plain data.
        mark: numbers by which that model knows its scenes again, float32 `[layers, matrices]` on the CPU.
    """

    states: tuple[State, ...]
    size: tuple[int, int]
    views: int
    architecture: dict[str, Any]
    mark: Tensor

    @property
    def batch(self) -> int:
        """How many scenes this is a batch of."""
        return self.states[0].batch

    @property
    def device(self) -> torch.device:
        """Where the fast weights are."""
        return self.states[0].weights["out"].device

    @property
    def nbytes(self) -> int:
        """Size of the fast weights in bytes."""
        return sum(x.numel() * x.element_size() for state in self.states for x in state.tensors.values())

    def _with(self, change: Callable[[State], State]) -> Self:
        return type(self)(tuple(map(change, self.states)), self.size, self.views, self.architecture, self.mark)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """This scene moved, as by `torch.Tensor.to`."""
        return self._with(lambda state: state.to(*args, **kwargs))

    def detach(self) -> Self:
        """This scene cut from the autograd graph."""
        return self._with(State.detach)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        return self._with(lambda state: state[index])

    def save(self, path: str | Path) -> None:
        """Write this scene as a safetensors file: `mark`, and `layers.I.NAME` as the states name their tensors."""
        tensors = {"mark": self.mark}
        for i, state in enumerate(self.states):
            tensors |= {f"layers.{i}.{name}": x.detach().contiguous() for name, x in state.tensors.items()}
        metadata = {
            "scene": json.dumps({"size": self.size, "views": self.views, "batch": self.batch}),
            "architecture": json.dumps(self.architecture),
            "inner": json.dumps([state.spec.to_dict() for state in self.states]),
        }
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            device: where to put the fast weights.

        Raises:
            OSError: a file that cannot be read.
            ValueError: a file that holds no scene, or one whose parts do not fit each other.
        """
        try:
            tensors, metadata = read_tensors(path, device)
            if not {"scene", "architecture", "inner"} <= metadata.keys():
                raise ValueError(f"{path} holds no scene")
            facts, architecture, inners = (
                parse_json(metadata[name], f"its {name}") for name in ("scene", "architecture", "inner")
            )
            size, views, batch = _facts(facts)
            # the sizes are those of a configuration, whose own checks apply
            config = LactNvsConfig.from_dict(architecture)
            if not isinstance(inners, list) or len(inners) != config.layers:
                raise ValueError(f"its inner must be a list of {config.layers} inner loops, one for each layer")
            specs = [InnerLoop.from_dict(inner) for inner in inners]
            parts: list[dict[str, Tensor]] = [{} for _ in specs]
            mark = tensors.pop("mark", None)
            for name, x in tensors.items():
                word, _, rest = name.partition(".")
                layer, _, rest = rest.partition(".")
                if word != "layers" or not layer.isdecimal() or int(layer) >= len(parts):
                    raise ValueError(f"its tensors must be mark and those of {config.layers} layers; got {name!r}")
                parts[int(layer)][rest] = x
            if any(x.shape[:1] != (batch,) for x in tensors.values()):  # before so many places are made
                raise ValueError(f"its fast weights must be of a batch of {batch} scenes, as its metadata says")
            states = tuple(State(spec, part, (0,) * batch) for spec, part in zip(specs, parts, strict=True))
            for state in states:
                state.check()
                _check_width(state, config)
            rows = [config.layers, 2 + len(specs[0].network.matrices)]
            if mark is None or list(mark.shape) != rows or mark.dtype != torch.float32 or not bool(mark.isfinite().all()):
                found = "it is missing" if mark is None else f"got {mark.dtype} {list(mark.shape)}"
                raise ValueError(f"its mark must be finite float32 numbers {rows}; {found}")
            if any(side % config.patch_size for side in size):
                raise ValueError(f"its size must be one that patches of {config.patch_size} pixels tile; got {size}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"path must be a file that Scene.save wrote; {path} is not: {error}") from error
        return cls(states, size, views, architecture, mark.cpu())

    def __repr__(self) -> str:
        return (
            f"Scene({self.batch} of {self.views} views at {self.size[0]} x {self.size[1]}, {len(self.states)} layers, "
            f"{self.nbytes / self.batch / 2**20:.1f} MiB each)"
        )


def _facts(facts: Any) -> tuple[tuple[int, int], int, int]:
    """Size, views and batch of a scene's metadata.

    Raises:
        TypeError, ValueError: something else.
    """
    if not isinstance(facts, dict) or facts.keys() != {"size", "views", "batch"}:
        raise ValueError("its scene must have size, views and batch")
    size = facts["size"]
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError("its size must be a height and a width")
    for name, number in (("height", size[0]), ("width", size[1]), ("views", facts["views"]), ("batch", facts["batch"])):
        check_positive_int(f"its {name}", number)
    return (size[0], size[1]), facts["views"], facts["batch"]


def _check_width(state: State, config: LactNvsConfig) -> None:
    out = state.weights["out"]
    heads, width = config.dim // config.fast_head_dim, config.fast_head_dim
    if out.shape[1] != heads or out.shape[-1] != width:
        raise ValueError(
            f"its fast weights must have {heads} heads of width {width}, as its architecture says; got {out.shape[1]} of "
            f"{out.shape[-1]}"
        )
