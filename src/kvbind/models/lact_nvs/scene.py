"""A scene: what a view-synthesis model keeps of its input views."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbind.forms.state import State
from kvbind.inner.spec import InnerLoop


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
            ValueError: a file that holds no scene.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if not {"scene", "architecture", "inner"} <= metadata.keys():
                    raise ValueError(f"path must be a file that Scene.save wrote; {path} holds no scene")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path must be a file that Scene.save wrote; {path} is not: {error}") from error
        facts = json.loads(metadata["scene"])
        states = []
        for i, inner in enumerate(json.loads(metadata["inner"])):
            prefix = f"layers.{i}."
            held = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            states.append(State(InnerLoop.from_dict(inner), held, (0,) * facts["batch"]))
        size = (facts["size"][0], facts["size"][1])
        return cls(tuple(states), size, facts["views"], json.loads(metadata["architecture"]), tensors["mark"].cpu())

    def __repr__(self) -> str:
        return (
            f"Scene({self.batch} of {self.views} views at {self.size[0]} x {self.size[1]}, {len(self.states)} layers, "
            f"{self.nbytes / self.batch / 2**20:.1f} MiB each)"
        )
