"""`kvbind bench graphs`: training steps replayed as CUDA graphs beside eager ones, of each family of models.

The steps are those of `kvbind.train.train`, on random batches. First that both kinds come to the same losses, through an
evaluation, and a checkpoint from which the other kind goes on; then how fast they are.
"""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.bench.harness.record import OUT_OF_TIME, growing, provenance, save
from kvbind.bench.harness.timing import now
from kvbind.inner.systems import ladder
from kvbind.kernels.launching import cuda_graphs as inner_graphs
from kvbind.models import PRESETS, LactCache, LactConfig, LactForCausalLM, lact_nvs, vittt
from kvbind.models.flops import lact_flops, lact_nvs_flops, vittt_flops
from kvbind.precision import matmul_precision
from kvbind.sequence.boundaries import Boundaries, with_room
from kvbind.train import TrainConfig, train
from kvbind.train.metrics import read_metrics
from kvbind.train.optimizer import make_optimizer
from kvbind.train.parallel import Distributed, MeshLayout
from kvbind.train.ranks import WHOLE, Share
from kvbind.train.step import Step

DISTINCT = 4
"""Batches that take turns."""

EVALUATED, SAVED, GOES_ON = 20, 25, 30
"""In a comparison: after which steps there is an evaluation and a checkpoint, and in which the first process ends."""


FIRST = 8
"""Steps of each kind at the least, of which the last one's loss is told."""


@dataclass(frozen=True)
class TrainingCase:
    """One model on batches of one size.

    Attributes:
        name: of the row.
        unit: what is counted.
        units: of a batch.
        build: makes the model, on the current device.
        draw: a batch on the CPU, by its number.
        loss: of a model and a batch.
        blocks: the model's repeated parts.
        compared: steps to compare losses over; 0 for none.
        flops: model FLOPs of training on one unit, `kvbind.models.flops`; None where they are not known.
    """

    name: str
    unit: str
    units: int
    build: Callable[[], Any]
    draw: Callable[[int], dict[str, Tensor]]
    loss: Callable[[Any, dict[str, Tensor]], Tensor]
    blocks: Callable[[Any], Iterable[nn.Module]]
    compared: int = 0
    flops: float | None = None


class Random:
    """A task whose batches are random, as `kvbind.train.train` wants one.

    Args:
        case: what draws the batches.
        ends: the batch at which the process is interrupted, or None.
    """

    batch = 1

    def __init__(self, case: TrainingCase, ends: int | None = None) -> None:
        self.case, self.ends, self.unit = case, ends, case.unit
        pinned = torch.cuda.is_available()
        drawn = (case.draw(number) for number in range(DISTINCT))
        self.drawn = [{name: x.pin_memory() if pinned else x for name, x in batch.items()} for batch in drawn]

    def batches(self, position: dict[str, Any] | None, share: Share = WHOLE) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The few batches in turn."""
        for number in itertools.count(position["next"] if position else 0):
            if number == self.ends:
                raise KeyboardInterrupt
            yield self.drawn[number % DISTINCT], {"next": number + 1}

    def size(self, batch: Any) -> int:
        """Units in a batch."""
        return self.case.units

    def weight(self, batch: Any) -> float:
        """All count alike."""
        return 1.0

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of the case's model on a batch."""
        return self.case.loss(model, batch)

    def blocks(self, model: Any) -> Iterable[nn.Module]:
        """The repeated parts of the case's model."""
        return self.case.blocks(model)

    def evaluate(self, model: Any, share: Share = WHOLE) -> dict[str, Any]:
        """The loss of a batch without gradients; a language model also goes on with a few tokens."""
        device = next(model.parameters()).device
        batch = {name: x.to(device) for name, x in self.drawn[0].items()}
        if isinstance(model, LactForCausalLM):
            cache, ids = LactCache(), batch["input_ids"][:1, :64]
            for _ in range(4):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
        return {"loss": float(self.case.loss(model, batch))}


def cases(sizes: str = "full") -> Iterator[TrainingCase]:
    """What is measured.

    Args:
        sizes: "full", or "tiny" for a look on a CPU.
    """
    tiny = sizes == "tiny"
    small, length, rows = ("tiny", 64, 1) if tiny else ("30m", 8192, 3)
    for rung in ("rung2", "rung6", "rung0"):
        # the rungs share what is compared: how steps are taken
        yield language(f"lact-{small}-{rung}", small, rung, length, rows, 256, compared=50 if rung == "rung2" else 0)
    yield images(*(("tiny", 2, 32) if tiny else ("base", 256, 224)))
    yield views(*((1, 32, 1, 2, 16) if tiny else (12, 768, 4, 8, 128)))
    if not tiny:
        for rung in ("rung2", "rung0", "rung6"):
            yield language(f"lact-760m-{rung}", "760m", rung, 32768, 1, 32000)
    yield packed(f"lact-{small}-rung2-packed", small, "rung2", length, rows, 256, compared=40)


def language(name: str, preset: str, rung: str, length: int, rows: int, vocabulary: int, compared: int = 0) -> TrainingCase:
    """The LaCT language model of a preset, with a rung of the ladder."""
    sizes = PRESETS[preset]
    inner = ladder(sizes["inner"])[rung]
    config = LactConfig(**{**sizes, "inner": inner, "vocab_size": vocabulary, "max_position_embeddings": length})

    def draw(number: int) -> dict[str, Tensor]:
        ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(number))
        return {"input_ids": ids, "labels": ids}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, use_cache=False).loss
        return found

    build = partial(LactForCausalLM, config)
    flops = sum(lact_flops(config, length).values()) / length
    return TrainingCase(name, "tokens", rows * length, build, draw, loss, lambda model: model.model.layers, compared, flops)


def packed(name: str, preset: str, rung: str, length: int, rows: int, vocabulary: int, compared: int = 0) -> TrainingCase:
    """As `language`, of one row that is packed with some twelve documents, of 1 token or up to `length`."""
    whole = language(name, preset, rung, length, rows, vocabulary, compared)
    total = rows * length

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        inside = torch.randint(1, total, (8 + number,), generator=generator)
        bounds = torch.cat((torch.arange(rows + 1) * length, inside)).unique()
        ids = torch.randint(256, (1, total), generator=generator)
        return {"input_ids": ids, "labels": ids, "boundaries": with_room(bounds.to(torch.int32))}

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        bounds = Boundaries(batch["boundaries"], ids.shape[1])
        found: Tensor = model(ids, labels=batch["labels"], cu_seqlens=bounds, use_cache=False).loss
        return found

    return replace(whole, draw=draw, loss=loss)


def images(size_of_model: str, batch: int, size: int) -> TrainingCase:
    """ViTTT on images of random pixels, which are made floats on the device."""

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        return {"x": pixels, "labels": torch.randint(1000, (batch,), generator=generator)}

    def loss(network: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(network(batch["x"].float() / 128 - 1).float(), batch["labels"])

    sizes = vittt.SIZES[f"vittt_{size_of_model}"]
    flops = sum(vittt_flops(vittt.VitttConfig(**sizes, num_labels=1000), (size, size)).values())
    build = partial(vittt.build, f"vittt_{size_of_model}", num_classes=1000)
    return TrainingCase(
        f"vittt-{size_of_model[0]}-training", "images", batch, build, draw, loss, lambda network: [], flops=flops
    )


def views(layers: int, dim: int, batch: int, inputs: int, side: int) -> TrainingCase:
    """LaCT view synthesis on scenes of random pictures, as many targets as inputs."""
    config = lact_nvs.LactNvsConfig(dim=dim, layers=layers, fast_head_dim=dim, head_dim=min(64, dim))

    def draw(number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (batch, 2 * inputs, 3, side, side), generator=generator, dtype=torch.uint8)
        poses = torch.eye(4).repeat(batch, 2 * inputs, 1, 1)
        poses[..., :3, 3] = 2 * torch.rand(batch, 2 * inputs, 3, generator=generator) - 1
        return {
            "pixels": pixels,
            "c2w": poses,
            "fxfycxcy": torch.tensor([side, side, side / 2, side / 2]).repeat(batch, 2 * inputs, 1),
        }

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        pixels, poses, lenses = batch["pixels"].float() / 255, batch["c2w"], batch["fxfycxcy"]
        found = model(pixels[:, :inputs], poses[:, :inputs], lenses[:, :inputs], poses[:, inputs:], lenses[:, inputs:])
        return F.mse_loss(found.float(), pixels[:, inputs:])

    build = partial(lact_nvs.LactNvs, config)
    flops = sum(lact_nvs_flops(config, (side, side), inputs, inputs).values()) / (2 * inputs)
    return TrainingCase(
        "lact-nvs-training", "views", 2 * inputs * batch, build, draw, loss, lambda model: model.blocks, flops=flops
    )


def configuration(device: torch.device, how: str, **fields: Any) -> TrainConfig:
    """How steps are taken."""
    return TrainConfig(
        **{"learning_rate": 3e-4, "warmup": 5, "device": str(device), "checkpoint_minutes": 0.0, "graphs": how, **fields}
    )


def build(case: TrainingCase, device: torch.device) -> nn.Module:
    """A model with the same random weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = case.build()
    return model.train()


def give_back(device: torch.device) -> None:
    """Free what earlier work has left on a GPU."""
    inner_graphs.clear()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def warnings_of_training() -> Iterator[list[str]]:
    """What training says about graphs."""
    said: list[str] = []

    class SaidLines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("kvbind.train"), SaidLines()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def losses(
    case: TrainingCase, device: torch.device, folder: Path, kinds: tuple[str, ...], steps: int
) -> dict[str, list[float]]:
    """Losses of a run, and of its evaluations; with two kinds the first is interrupted and the second goes on."""
    fields = {"steps": steps, "evaluate_every": EVALUATED, "checkpoint_every": SAVED if len(kinds) > 1 else 0}
    for i, how in enumerate(kinds):
        give_back(device)
        last = i == len(kinds) - 1
        try:
            task = Random(case, None if last else GOES_ON)
            train(build(case, device), task, configuration(device, how, **fields), folder)
        except KeyboardInterrupt:
            if last:
                raise
    rows = read_metrics(folder)
    return {name: [row[name] for row in rows if row.get(name) is not None] for name in ("loss", "held_out/loss")}


def compare(case: TrainingCase, device: torch.device) -> dict[str, Any]:
    """How far the losses of replayed steps are from those of eager ones, and from a second eager run's where they differ."""

    def apart(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
        pairs = [pair for name in a for pair in zip(a[name], b[name], strict=False)]
        return max(abs(x - y) / max(abs(x), 1e-9) for x, y in pairs)

    with tempfile.TemporaryDirectory() as place, warnings_of_training() as said:
        folder = Path(place)
        eager = losses(case, device, folder / "eager", ("off",), case.compared)
        found: dict[str, Any] = {}
        for name, kinds in {
            "replayed": ("on",),
            "eager_then_replayed": ("off", "on"),
            "replayed_then_eager": ("on", "off"),
        }.items():
            found[name] = apart(eager, losses(case, device, folder / name, kinds, case.compared))
        if any(found.values()):
            found["eager_again"] = apart(eager, losses(case, device, folder / "again", ("off",), case.compared))
    return {"steps": case.compared, "relative": found, "said": said}


def timed(case: TrainingCase, device: torch.device, seconds: float, step: Callable[[], Any]) -> dict[str, Any]:
    """Take steps and say how long they took.

    Args:
        case: what is trained.
        device: where the steps run.
        seconds: how long to go on, after four.
        step: takes one, and returns its loss.

    Returns:
        "per_second", the units of a median step; "first_seconds", of the first step; "capture_seconds", of the third, in
        which replayed steps are captured; "peak_bytes" since peaks were reset; "steps"; "loss" of step `FIRST`.
    """
    times: list[float] = []
    loss = float("nan")
    began = time.perf_counter()
    while len(times) < FIRST or (time.perf_counter() - began < seconds and len(times) < 200):
        start = now(device)
        found = step()
        times.append(now(device) - start)
        if len(times) == FIRST:
            loss = float(found)
        if len(times) == 4:
            began = time.perf_counter()
    return {
        "per_second": case.units / statistics.median(times[4:]),
        "first_seconds": times[0],
        "capture_seconds": times[2],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "steps": len(times),
        "loss": loss,
    }


def speed(case: TrainingCase, device: torch.device, how: str, seconds: float) -> dict[str, Any]:
    """Time steps of one kind.

    Returns:
        As `timed`, and "captured", how many graphs there are; "said".
    """
    give_back(device)
    with warnings_of_training() as said, matmul_precision("high"):
        model, config = build(case, device), configuration(device, how)
        together = Distributed(model, case.blocks(model), MeshLayout(), config, device)
        task = Random(case)
        optimizer = make_optimizer(model, config)
        step = Step(model, together, task, config, optimizer, None, task.batches(None), WHOLE, device)
        found = timed(case, device, seconds, lambda: step(1e-4, 0.0, more=True).loss)
        graphs = 0 if step.replayed is None else step.replayed.work.captured
    return {**found, "captured": graphs, "said": said}


def measured(
    device: torch.device, chosen: Iterable[TrainingCase], seconds: float, budget: float
) -> Iterator[dict[str, Any]]:
    """A row for each case: what was compared, and both kinds' speeds; what failed says why."""
    began = time.perf_counter()
    for case in chosen:
        row: dict[str, Any] = {"name": case.name, "unit": case.unit, "units": case.units}
        works: dict[str, Callable[[], dict[str, Any]]] = {
            how: partial(speed, case, device, how, seconds) for how in ("on", "off")
        }
        if case.compared:
            works["same"] = partial(compare, case, device)
        for name, work in works.items():
            if time.perf_counter() - began > budget:
                row["skipped"] = OUT_OF_TIME
                break
            try:
                row[name] = work()
            except Exception as error:  # the next case may do better
                row[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["seconds"] = round(time.perf_counter() - began, 1)
        give_back(device)
        yield row


def main(
    out: str | Path | None = None,
    device: str = "auto",
    *,
    sizes: str = "full",
    only: str = "",
    seconds: float = 1.5,
    budget: float = 165.0,
) -> dict[str, Any]:
    """Compare and time all cases, and print a line for each as it comes.

    Args:
        out: a JSON file for the record, written as it grows; None for none.
        device: where; "auto" for a GPU where there is one.
        sizes: "full", or "tiny" for a look on a CPU.
        only: part of the names of the cases to run; all of them by default.
        seconds: how long to time each kind of steps, after four.
        budget: begin nothing more after this, seconds.

    Returns:
        The record.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(name)
    about = provenance(place, ("triton",)) | {"config": {"sizes": sizes, "seconds": seconds}}
    record: dict[str, Any] = {}
    chosen = [case for case in cases(sizes) if only in case.name]
    for record in growing(about, len(chosen), measured(place, chosen, seconds, budget)):
        save(None if out is None else Path(out), record)
        if record["rows"]:
            print(line_of(record["rows"][-1]), flush=True)
    return record


def line_of(row: dict[str, Any]) -> str:
    """A row in one line of text, and one for everything that was said or has failed."""
    parts, told = [f"{row['name']:18}"], []
    for how in ("on", "off"):
        found = row.get(how, {})
        if "per_second" in found:
            peak = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 2**30:.1f} GiB"
            graphs = f", {found['captured']} graphs, capture {found['capture_seconds']:.2f} s" if how == "on" else ""
            speed = f"{found['per_second']:,.0f} {row['unit']}/s"
            parts.append(f"{how}: {speed}, first {found['first_seconds']:.1f} s{graphs}{peak}, loss {found['loss']:.5f}")
        told += [f"    {how}: {x}" for x in (*found.get("said", ()), *([found["failed"]] if "failed" in found else []))]
    same = row.get("same", {})
    if "relative" in same:
        parts.append("same: " + ", ".join(f"{name} {x:.1e}" for name, x in same["relative"].items()))
    told += [
        f"    same: {x}" for x in (*dict.fromkeys(same.get("said", ())), *([same["failed"]] if "failed" in same else []))
    ]
    if "skipped" in row:
        parts.append(row["skipped"])
    return "\n".join([" | ".join(parts), *told])
