"""How a model is spread over the processes of a run: over replicate, shard and sequence ranks, by DDP or FSDP.

Models know nothing of ranks: whatever happens is put around them here, from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kvbind.train.config import ParallelConfig, TrainConfig
from kvbind.train.ranks import Share, rank, ranks

LARGE = 500_000_000
"""Parameters from which on `strategy="auto"` shards a model: with gradients and AdamW's averages they take 8 GB."""


@dataclass(frozen=True)
class MeshLayout:
    """Where this process stands among the others.

    Attributes:
        weights: all processes as weights see them, with the dimensions "replicate", and "shard" over shard and sequence
            together; None for a single one.
        data: number of this data rank, and how many there are.
        sequence: number of this sequence rank, and how many share a sequence.
        group: the processes that share a sequence; None for this one alone.
    """

    weights: DeviceMesh | None = None
    data: tuple[int, int] = (0, 1)
    sequence: tuple[int, int] = (0, 1)
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, config: ParallelConfig, device: torch.device) -> MeshLayout:
        """The layout that a configuration describes, over the processes there are.

        Neighbouring ranks share a sequence, neighbouring groups of those a set of shards: what talks most is closest.

        Raises:
            ValueError: sizes that do not divide the number of processes.
        """
        count, sequence = ranks(), config.sequence
        if count % sequence:
            raise ValueError(f"train.parallel.sequence must divide the number of processes, {count}; got {sequence}")
        data = count // sequence
        shard = config.shard or data
        if data % shard:
            raise ValueError(f"train.parallel.shard must divide the number of data ranks, {data}; got {shard}")
        if count == 1:
            return cls()
        names = ("replicate", "shard")
        weights = init_device_mesh(device.type, (data // shard, shard * sequence), mesh_dim_names=names)
        group = None
        if sequence > 1:
            # never the group of all processes, in which gradients and weights travel: what a sequence exchanges would queue
            # up behind those, and every rank would have to ask for both kinds in one order
            groups = [dist.new_group(list(range(start, start + sequence))) for start in range(0, count, sequence)]
            group = groups[rank() // sequence]
        return cls(weights, (rank() // sequence, data), (rank() % sequence, sequence), group)

    def share(self, batch: int, accumulate: int) -> Share:
        """What this data rank reads of steps of `accumulate` batches of `batch` rows.

        Raises:
            ValueError: rows that cannot be divided evenly.
        """
        if self.group is None:
            return Share.of(*self.data, batch, accumulate)
        place, size = self.sequence
        # all processes take part in making each group
        groups = [dist.new_group(list(range(start, ranks(), size))) for start in range(size)]
        return Share.of(*self.data, batch, accumulate, groups[place], self.group)


class Distributed:
    """A model as the processes of a run train it together.

    Args:
        model: what is trained, the same on every process; on `device` in the end, in shards where it is sharded.
        blocks: its repeated parts, each sharded on its own.
        layout: of the processes.
        config: what is sharded, and in what precision.
        device: where it computes.
        trained: whether gradients will be asked for.

    Attributes:
        module: what is called; its gradients are means over all processes.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        layout: MeshLayout,
        config: TrainConfig,
        device: torch.device,
        trained: bool = True,
    ) -> None:
        self.module = model
        kind = strategy(model, config.parallel)
        if layout.weights is None or kind == "ddp":
            model.to(device)
        if layout.weights is None:
            return
        if kind == "fsdp":
            shard(model, blocks, layout, config)
        elif trained:
            self.module = DistributedDataParallel(
                model,
                device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Forward and backward of one batch; gradients meet those of other processes in the `last` of a step alone."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            yield
        elif isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield


def strategy(model: nn.Module, config: ParallelConfig) -> str:
    """How a model is spread over several processes, "ddp" or "fsdp"."""
    if config.strategy != "auto":
        return config.strategy
    return "fsdp" if sum(p.numel() for p in model.parameters()) >= LARGE else "ddp"


def shard(model: nn.Module, blocks: Iterable[nn.Module], layout: MeshLayout, config: TrainConfig) -> None:
    """Shard a model in place, block by block, over `layout.weights`: FSDP2, or HSDP where it is replicated too."""
    mesh = layout.weights
    if mesh is not None and mesh.size(0) == 1:
        mesh = mesh["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.gather == "bfloat16" else None,
        reduce_dtype=torch.float32,
        # what a model is given stays as exact as it is: cameras, for one
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for block in blocks:
        fully_shard(block, reshard_after_forward=config.parallel.reshard, **options)
    # the root is needed first in the backward pass, so that it stays whole
    fully_shard(model, reshard_after_forward=False, **options)


def reshard(model: nn.Module) -> None:
    """Give up what was gathered for a forward pass that no backward pass has followed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds but a part of the model."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def clip_(parameters: Iterable[nn.Parameter], most: float, scale: Tensor | float) -> Tensor:
    """Divide gradients by `scale`, then shorten them to a norm of `most` over all parameters and shards.

    Args:
        parameters: with gradients or without.
        most: the largest norm.
        scale: what gradients are divided by first.

    Returns:
        The norm before it was shortened, the same on every process.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Any = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm / scale
    factor = (most / (norm + 1e-6)).clamp(max=1.0) / scale
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return norm
