"""What a user would train in place of this library's models: the same sizes with softmax attention.

That is transformers' Llama for the LaCT language model, a vision transformer of timm's for ViTTT, and for view synthesis the
same transformer with full attention to all input views. Their steps are those of an ordinary loop (autocast, fused AdamW,
clipping), eager, compiled, and both replayed as CUDA graphs by `kvbind.train.GraphedStep`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.bench.harness.device_time import first_line
from kvbind.bench.models.views import FullAttentionNvs
from kvbind.bench.models.vision import autocast, vision_transformer
from kvbind.bench.training.cuda_graphs import Random, TrainingCase, build, give_back, timed, warnings_of_training
from kvbind.models.lact import LactConfig
from kvbind.models.lact_nvs import LactNvsConfig
from kvbind.models.peers import llama
from kvbind.precision import matmul_precision
from kvbind.train import GraphedStep

CLIP = 1.0
"""The largest gradient norm, that of `TrainConfig`."""


def language(case: TrainingCase, config: LactConfig) -> TrainingCase:
    """The Llama beside a case of the LaCT language model."""
    return replace(case, build=partial(llama, config), blocks=lambda model: model.model.layers)


def images(case: TrainingCase, name: str, size: int) -> TrainingCase:
    """A vision transformer of timm's beside ViTTT, for images of `size` pixels a side."""
    return replace(case, build=partial(vision_transformer, name, size), blocks=lambda model: model.blocks)


def views(case: TrainingCase, config: LactNvsConfig) -> TrainingCase:
    """Full attention to all input views beside LaCT view synthesis."""
    return replace(case, build=partial(FullAttentionNvs, config))


def compile_(model: nn.Module, blocks: Iterable[nn.Module], scope: str) -> None:
    """Let `torch.compile` make the kernels of a model: of each of its `blocks`, all of which share one graph, or "whole".

    Args:
        model: what is compiled in place.
        blocks: its repeated parts.
        scope: "blocks", "whole", or "" for nothing.
    """
    if scope:
        torch.compiler.reset()
    for part in {"": [], "blocks": [*blocks], "whole": [model]}[scope]:
        part.compile()


def ordinary_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Any, Any], Tensor], device: torch.device
) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function of a batch that takes a training step as one writes it, and returns the loss."""

    def step(batch: dict[str, Tensor]) -> Tensor:
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        with autocast(device):
            found = loss(model, batch)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return step


def training(
    case: TrainingCase, device: torch.device, seconds: float, *, ways: Sequence[str] = ("eager", "graphs"), scope: str = ""
) -> dict[str, Any]:
    """Time the training steps of a peer.

    Args:
        case: the peer's model, batches and loss.
        device: where to train.
        seconds: how long to time each way.
        ways: "eager", as Python launches them, and "graphs", replays of the whole step.
        scope: what is compiled, see `compile_`.

    Returns:
        By way, as `kvbind.bench.training.cuda_graphs.timed`, and "captured", "said", "parameters"; or "failed", where it
        failed.
    """
    give_back(device)
    found: dict[str, Any] = {}
    with warnings_of_training() as said, matmul_precision("high"):
        model = build(case, device)
        compile_(model, case.blocks(model), scope)
        parameters = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        batches = Random(case).batches(None)
        plain = ordinary_step(model, optimizer, case.loss, device)
        for way in ways:
            graphed = None
            if way == "graphs":
                kind = torch.bfloat16 if device.type == "cuda" else None
                graphed = GraphedStep(model, optimizer, case.loss, clip=CLIP, autocast=kind)
            step = graphed or plain
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                row = timed(case, device, seconds, lambda step=step: step(next(batches)[0]))  # type: ignore[misc]
                row["captured"] = 0 if graphed is None else graphed.captured
            except Exception as problem:  # the next way may do better
                row = {"failed": first_line(problem)}
            found[way] = {**row, "said": list(said), "parameters": parameters}
            said.clear()
    return found
