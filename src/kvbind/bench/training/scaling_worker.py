"""One process of `kvbind bench scaling`, as `torchrun` starts it: it runs cases one after another and writes what it finds.

    torchrun --standalone --nproc-per-node N -m kvbind.bench.training.scaling_worker CASES.json ROWS.jsonl

A case that runs out of memory on any rank ends all processes, as the others wait for that rank;
`kvbind.bench.training.scaling` starts them again for the rest.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvbind.bench.harness.timing import now
from kvbind.bench.training.overlap import communication
from kvbind.inner.systems import ladder
from kvbind.models import PRESETS, LactConfig, LactForCausalLM
from kvbind.models.flops import lact_flops
from kvbind.models.lact.sharding import shard_batch
from kvbind.precision import matmul_precision
from kvbind.sequence import SequenceShard, count_bytes, sequence_parallel
from kvbind.train.config import ParallelConfig, TrainConfig
from kvbind.train.optimizer import make_optimizer
from kvbind.train.parallel import Distributed, MeshLayout, clip_
from kvbind.train.ranks import connected, rank
from kvbind.train.recompute import recompute

OUT_OF_MEMORY = "out of memory"

OUT_OF_MEMORY_EXIT = 3
"""The exit code of a process whose GPU was too small for a case."""

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class ScalingCase:
    """Training steps to run on some number of GPUs.

    Attributes:
        what: "fsdp", "sequence" or "equality".
        gpus: processes.
        shard: data ranks among which the weights are divided; all of them.
        sequence: ranks that share a sequence.
        preset: the model's size.
        rung: of the ladder.
        form: "parallel" or "recurrent".
        length: tokens in a sequence.
        batch: sequences in a step, of all ranks.
        recompute: what is made again in the backward pass, as `train.activation_checkpointing` takes it.
        steps: how many to take, each on other tokens, and to keep the losses of; 0 to measure speed.
        seconds: how long to measure speed.
    """

    what: str
    gpus: int
    shard: int
    sequence: int
    preset: str
    rung: str
    form: str
    length: int
    batch: int
    recompute: str = "block"
    steps: int = 0
    seconds: float = 6.0

    def row(self) -> dict[str, Any]:
        """What a row of results says of its case."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("shard", "sequence", "seconds")}
        return fields | {"mesh": {"replicate": 1, "shard": self.shard, "sequence": self.sequence}, "gather_bytes": 4}


class Training:
    """A model in training as a case wants it, on random tokens.

    Args:
        case: what is trained, and on how many GPUs.
        device: of this process.
    """

    def __init__(self, case: ScalingCase, device: torch.device) -> None:
        self.case, self.device = case, device
        preset = PRESETS[case.preset]
        inner = ladder(preset["inner"])[case.rung]
        torch.manual_seed(0)
        with torch.device(device):
            model = LactForCausalLM(LactConfig(**{**preset, "inner": inner, "ttt_form": case.form}))
        self.config: LactConfig = model.config
        parallel = ParallelConfig(strategy="fsdp", shard=case.shard, sequence=case.sequence)
        config = TrainConfig(learning_rate=LEARNING_RATE, parallel=parallel)
        self.layout = MeshLayout.of(parallel, device)
        blocks: list[nn.Module] = list(model.model.layers)
        recompute(blocks, case.recompute)
        self.distributed = Distributed(model.train(), blocks, self.layout, config, device)
        self.model, self.optimizer = model, make_optimizer(model, config)
        self.shard = None
        if case.sequence > 1:
            self.shard = SequenceShard.even(case.length, self.layout.group, multiple=inner.span or 1)

    def rows(self, step: int) -> list[Tensor]:
        """This data rank's sequences of a step, `[1, T]` each; the same tokens however many ranks there are."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.config.vocab_size, (self.case.batch, self.case.length), generator=generator)
        index, count = self.layout.data
        return [ids[i : i + 1].to(self.device) for i in range(index, self.case.batch, count)]

    def step(self, rows: list[Tensor]) -> Tensor:
        """One step of AdamW; the loss before it, mean over all ranks' sequences, on every rank."""
        low = self.device.type == "cuda"
        total = torch.zeros((), device=self.device)
        for i, ids in enumerate(rows):
            batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
            if self.shard is not None:
                batch = shard_batch(batch, self.shard)
            with (
                self.distributed.accumulating(last=i == len(rows) - 1),
                sequence_parallel(self.shard) if self.shard is not None else nullcontext(),
            ):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
                    # losses add up along a sequence, and gradients are means over all ranks
                    loss = self.distributed.module(**batch, use_cache=False).loss * self.case.sequence / len(rows)
                loss.backward()
            total = total + loss.detach()
        clip_(self.model.parameters(), 1.0, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total


def measure(case: ScalingCase, device: torch.device) -> dict[str, Any]:
    """Run a case; the same numbers on every rank.

    Returns:
        Of a case with steps, "losses"; of one without, speed, memory and communication.
    """
    training = Training(case, device)
    if case.steps:
        return {"losses": [float(training.step(training.rows(i))) for i in range(case.steps)]}
    rows = training.rows(0)
    training.step(rows)  # compiles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_timed(training, rows, device)]
    more = _agreed(min(4, int(case.seconds / times[0])), device)
    times += [_timed(training, rows, device) for _ in range(more)]
    peak = _agreed(torch.cuda.max_memory_allocated(device), device) if device.type == "cuda" else None

    took = statistics.median(times)
    tokens = case.batch * case.length
    flops = sum(lact_flops(training.config, case.length).values()) / case.length
    found: dict[str, Any] = {
        "tokens_per_second": tokens / took,
        "seconds": took,
        "measured_steps": len(times),
        "peak_bytes": peak,
        "flops_per_token": flops,
        "flops_per_second_per_gpu": flops * tokens / took / case.gpus,
    }
    if case.gpus > 1:
        with count_bytes() as sent:
            found["communication"] = communication(partial(training.step, rows), device)
        layers = training.config.num_hidden_layers
        if case.sequence > 1:
            found["sequence_bytes"] = {
                # the first and last rank receive less than those between them, which have a halo in both directions
                "received_per_layer": {kind: _agreed(n, device) / layers for kind, n in sorted(sent.received.items())},
                "exchanges_per_layer": sum(sent.calls.values()) / layers,
            }
    return found


def _timed(training: Training, rows: list[Tensor], device: torch.device) -> float:
    """How long the slowest rank's step takes, seconds."""
    if dist.is_initialized():
        dist.barrier()
    start = now(device)
    training.step(rows)
    return _most(now(device) - start, device)


def _most(value: float, device: torch.device) -> float:
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return float(box)


def _agreed(value: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    return int(_most(float(value), device))


@contextmanager
def alone() -> Iterator[None]:
    """Leave nothing of a case behind."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(cases: Path, out: Path) -> None:
    """Run all cases of a file, in their order, and append a line of JSON to `out` as each begins and ends."""

    def write(**line: Any) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    described = json.loads(cases.read_text(encoding="utf-8"))
    kind = described["device"]
    with connected(kind), matmul_precision("high"):
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        for number, fields in described["cases"]:
            first = rank() == 0
            if first:
                write(case=number, began=time.time())
            try:
                with alone():
                    found = measure(ScalingCase(**fields), device)
            except torch.cuda.OutOfMemoryError:
                write(case=number, skipped=OUT_OF_MEMORY)
                # other ranks wait in a collective, which nothing but the end of this process ends
                os._exit(OUT_OF_MEMORY_EXIT)
            if first:
                write(case=number, row=found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
