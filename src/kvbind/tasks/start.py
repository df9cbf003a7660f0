"""A saved model that a run starts from: its weights, and its outputs as targets where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.models.carry import Carried, carry_over
from kvbind.models.opening import open_exported
from kvbind.models.saving import CONFIG, weight_files
from kvbind.tasks.contents import content_hash
from kvbind.train.config import config_hash
from kvbind.train.unfinished import CONFIG as RUN
from kvbind.train.unfinished import WEIGHTS, unfinished

TARGETS = ("data", "outputs")


@dataclass
class StartConfig:
    """What a run starts from; nothing where it starts from weights drawn anew.

    Attributes:
        model: a model's folder, such as a run's `model/`, or what `kvbind convert` wrote. The run's model differs from it in
            its inner loop at the most, and takes over every weight that both have.
        weights: a hash of that folder's files, which is found out; a run does not go on from another model.
        targets: what is learned: the "data", as ever, or the "outputs" of the model that is started from (distillation).
    """

    model: str | None = None
    weights: str = ""
    targets: str = "data"

    INDIFFERENT: ClassVar[tuple[str, ...]] = ("model",)
    """What `kvbind.train.config.what_matters` leaves out: it goes by the weights, wherever they are."""

    def __post_init__(self) -> None:
        check_choice("start.targets", self.targets, TARGETS)
        if self.targets != "data" and self.model is None and not self.weights:
            raise ValueError(
                f"start.model must name the model whose outputs are the targets; got start.targets={self.targets}"
            )

    def resolved(self) -> StartConfig:
        """With the hash of the weights.

        Raises:
            ValueError: a folder that holds no model of this library.
            OSError: a file that cannot be read.
        """
        return self if self.model is None else replace(self, weights=weights_hash(Path(self.model)))


def weights_hash(folder: Path) -> str:
    """Twelve hexadecimal digits that differ where a model's configuration or weights do.

    Raises:
        ValueError: a folder that holds no model.
        OSError: a file that cannot be read.
    """
    if not (folder / CONFIG).is_file():
        run, inside = (folder / RUN).is_file(), folder / WEIGHTS
        if run and not inside.is_dir():
            raise ValueError(f"start.model must be of a finished run; {unfinished(folder)}")
        hint = f", the folder of a run, whose model is {str(inside)!r}" if run else ""
        raise ValueError(f"start.model must be the folder of a model, which holds {CONFIG}; got {str(folder)!r}{hint}")
    return config_hash([content_hash(path) for path in (folder / CONFIG, *weight_files(folder))])


class Start:
    """The model that a run starts from.

    Args:
        config: of the run, as `StartConfig.resolved` gives it.

    Attributes:
        distils: whether its outputs are the targets.
        carried: what became of its weights; None before `into`.

    Raises:
        ValueError: a folder that holds no model of this library, or another one than when the run began.
        OSError: a file that cannot be read.
    """

    def __init__(self, config: StartConfig) -> None:
        assert config.model is not None
        folder = Path(config.model)
        found = weights_hash(folder)
        if config.weights and found != config.weights:
            raise ValueError(
                f"start.model must be the model that the run began with, of hash {config.weights}; {config.model!r} holds "
                f"another one, of hash {found}"
            )
        self.distils = config.targets == "outputs"
        self.carried: Carried | None = None
        self._original: Any = open_exported(folder).float().requires_grad_(False)

    @classmethod
    def of(cls, config: StartConfig, training: bool) -> Start | None:
        """The model that a run starts from; None where it starts from none, or will not train."""
        return cls(config) if training and config.model is not None else None

    def into(self, model: Any) -> Any:
        """`model` with the weights that are carried over.

        Raises:
            ValueError: models that differ in more than their inner loops.
        """
        self.carried = carry_over(self._original, model)
        return model

    def inner_loops(self) -> list[Any]:
        """The inner loops of the model whose outputs are the targets; none where they are not."""
        return [self._original.config.inner] if self.distils else []

    @torch.no_grad()
    def outputs(self, *inputs: Any, device: torch.device, **named: Any) -> Any:
        """What the original says, on the device."""
        self._original = self._original.to(device).eval()
        return self._original(*inputs, **named)


def divergence(logits: Tensor, wanted: Tensor, counted: Tensor | None = None, rows: int = 4096) -> Tensor:
    """The Kullback-Leibler divergence of predictions from those wanted, in nats, a scalar, float32.

    `sum_j p_j (log p_j - log q_j)` with p of `wanted` and q of `logits`, averaged over rows (Hinton et al., 2015, at
    temperature 1).

    Args:
        logits: `[..., classes]`, any dtype.
        wanted: logits of the same shape, of the predictions that are wanted.
        counted: bool `[...]`, which rows count; all without it.
        rows: so many are in float32 at one time in the forward pass.
    """
    pairs = zip(logits.flatten(0, -2).split(rows), wanted.flatten(0, -2).split(rows), strict=True)
    each = torch.cat([
        F.kl_div(x.float().log_softmax(-1), y.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for x, y in pairs
    ])  # fmt: skip
    if counted is None:
        return each.mean()
    chosen = counted.flatten()
    return (each * chosen).sum() / chosen.sum()
