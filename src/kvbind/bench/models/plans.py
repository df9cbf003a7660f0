"""What `kvbind bench models` measures: rows, and the jobs that answer them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kvbind.bench.harness.device_time import duration
from kvbind.bench.harness.timing import now
from kvbind.bench.models import softmax_peers
from kvbind.bench.models.decoding import DecodingLoad, decode, decode_llama
from kvbind.bench.models.vision import draw, forward, vision_transformer
from kvbind.bench.training import cases, cuda_graphs
from kvbind.bench.training.cases import TrainingCase
from kvbind.bench.training.cuda_graphs import give_back
from kvbind.bench.training.steps import build
from kvbind.inner.systems import ladder
from kvbind.layers.lact.layer import DecodeDtype
from kvbind.models import PRESETS, LactConfig, lact_nvs, vittt
from kvbind.models.peers import llama as make_llama
from kvbind.precision import matmul_precision

PARTS = ("language", "small", "vision", "views", "decode")
"""Rows that are measured together."""

COMPILING = {"blocks": 60.0, "whole": 100.0}
"""Seconds after which a peer's compilation is given up: of its blocks, of the whole model."""

WAYS = {
    "": {"eager": "eager", "graphs": "graphs"},
    "blocks": {"eager": "compiled blocks", "graphs": "compiled blocks, graphs"},
    "whole": {"eager": "compiled", "graphs": "compiled, graphs"},
}
"""What ways are called, by what is compiled."""

RUNGS = ("rung2", "rung0", "rung6")

Found = dict[str, Any]
"""What was measured in one way: "value", in the row's unit, with more; or "failed" or "skipped", and why."""


@dataclass(frozen=True)
class LanguageSize:
    """A size of the LaCT language model, on rows of `length` tokens."""

    name: str
    preset: str
    length: int
    rows: int
    vocabulary: int


@dataclass(frozen=True)
class ModelSizes:
    """How large everything is.

    Attributes:
        language, small: models that train.
        vision: size of ViTTT, images, their side, and the peer's name in timm.
        views: layers, width, scenes, input views (as many are rendered), side of the images.
        preset: of the model that decodes; with rung 2 of the ladder, and once with rung 0.
        one, many: what is decoded.
    """

    language: LanguageSize
    small: LanguageSize
    vision: tuple[str, int, int, str]
    views: tuple[int, int, int, int, int]
    preset: str
    one: DecodingLoad
    many: DecodingLoad


SIZES = {
    "full": ModelSizes(
        LanguageSize("lact-760m", "760m", 32768, 1, 32000), LanguageSize("lact-30m", "30m", 8192, 3, 256),
        ("base", 256, 224, "vit_base_patch16_224"), (12, 768, 4, 8, 128),
        "760m", DecodingLoad(1, 32768, 4096, 8192), DecodingLoad(64, 2048, 160, 512),
    ),
    "tiny": ModelSizes(
        LanguageSize("lact-tiny", "tiny", 128, 1, 256), LanguageSize("lact-tinier", "tiny", 64, 2, 256),
        ("tiny", 2, 32, "vit_tiny_patch16_224"), (1, 32, 1, 2, 16),
        "tiny", DecodingLoad(1, 128, 8, 64), DecodingLoad(2, 64, 8, 64),
    ),
}  # fmt: skip
"""By name; "tiny" for a look on a CPU, which measures nothing that matters."""


@dataclass(frozen=True)
class ModelRow:
    """What is compared.

    Attributes:
        name: of the row.
        part: of `PARTS`.
        unit: of its numbers.
        peer: what the peer is.
        higher: whether higher is better.
        flops: model FLOPs of each of what is counted per second; None where that is not asked.
    """

    name: str
    part: str
    unit: str
    peer: str
    higher: bool = True
    flops: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Something to measure.

    Attributes:
        rows: whose.
        side: "ours", "peer", or "beside" for what is no candidate, but worth knowing.
        ways: what it finds, by name.
        work: takes its share of the time, seconds, which what can be cut short keeps to; returns what it found in each way.
        first: whether it is done before those that are not.
        weight: of its share of the time.
        limit: seconds after which it is given up, if time is left; None for a multiple of its share.
    """

    rows: tuple[str, ...]
    side: str
    ways: tuple[str, ...]
    work: Callable[[float], dict[str, Found]] = field(repr=False)
    first: bool = True
    weight: float = 1.0
    limit: float | None = None


Plan = tuple[list[ModelRow], list[Measurement]]


def per_second(found: dict[str, Found]) -> dict[str, Found]:
    """Ways of training with their speed as the value."""
    return {way: {"value": x["per_second"], **x} if "per_second" in x else x for way, x in found.items()}


def ours(case: TrainingCase, device: torch.device, seconds: float, how: str, share: float) -> dict[str, Found]:
    """This library's training steps: `how` is "graphs" or "eager"."""
    found = cuda_graphs.speed(case, device, {"graphs": "on", "eager": "off"}[how], min(seconds, share / 2))
    return per_second({how: found})


def peers(case: TrainingCase, device: torch.device, seconds: float, scope: str, share: float) -> dict[str, Found]:
    """A peer's training steps; `scope` is what is compiled."""
    found = softmax_peers.training(case, device, min(seconds, share / 4), scope=scope)
    return per_second({WAYS[scope][way]: x for way, x in found.items()})


def peer_jobs(rows: tuple[str, ...], work: Callable[[str, float], dict[str, Found]]) -> list[Measurement]:
    """Those of a peer, whose `work` takes what is compiled."""
    return [
        Measurement(
            rows, "peer", tuple(WAYS[scope].values()), partial(work, scope), first=not scope, limit=COMPILING.get(scope)
        )
        for scope in WAYS
    ]


def our_jobs(case: TrainingCase, device: torch.device, seconds: float) -> list[Measurement]:
    """Those of this library's training steps."""
    return [
        Measurement((case.name,), "ours", (how,), partial(ours, case, device, seconds, how), first=how == "graphs")
        for how in ("graphs", "eager")
    ]


def language_plan(part: str, sizes: LanguageSize, device: torch.device, seconds: float) -> Plan:
    """The language model in three rungs, and a Llama of its size."""
    rungs = [
        cases.language(f"{sizes.name}-{rung}", sizes.preset, rung, sizes.length, sizes.rows, sizes.vocabulary)
        for rung in RUNGS
    ]
    config = LactConfig(**{**PRESETS[sizes.preset], "vocab_size": sizes.vocabulary, "max_position_embeddings": sizes.length})
    jobs = [job for case in rungs for job in our_jobs(case, device, seconds)]
    peer = softmax_peers.language(rungs[0], config)
    jobs += peer_jobs(tuple(case.name for case in rungs), partial(peers, peer, device, seconds))
    rows = [
        ModelRow(case.name, part, "tokens/s", "transformers' Llama of that size, SDPA", flops=case.flops)
        for case in sorted(rungs, key=lambda case: case.name)
    ]
    return rows, jobs


def forward_speed(
    make: Callable[[], nn.Module], batch: int, size: int, device: torch.device, seconds: float, scope: str, share: float
) -> dict[str, Found]:
    """Images per second without gradients, eager and as a CUDA graph; `scope` is what is compiled."""
    give_back(device)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = make()
    softmax_peers.compile_(model, model.blocks, scope)
    images, _ = draw(batch, size, device)
    with matmul_precision("high"):
        start = now(device)
        forward(model, images)
        first = now(device) - start
        took = duration(partial(forward, model, images), device, seconds=min(seconds, share / 4))
    known = {"first_seconds": first, "peak_bytes": torch.cuda.max_memory_allocated(device) if images.is_cuda else None}
    found: dict[str, Found] = {"eager": {"value": batch / took.seconds, **known}}
    if took.graph_seconds is None:
        found["graphs"] = {"failed": took.not_capturable}
    else:
        found["graphs"] = {"value": batch / took.graph_seconds, **known}
    return {WAYS[scope][way]: x for way, x in found.items()}


def vision_plan(sizes: ModelSizes, device: torch.device, seconds: float) -> Plan:
    """ViTTT and a vision transformer of timm's, training and forward."""
    model, batch, side, peer = sizes.vision
    case = cases.images(model, batch, side)
    name = f"vittt-{model[0]}-forward"
    called = f"timm's {peer}"
    rows = [
        ModelRow(case.name, "vision", "images/s", called, flops=case.flops),
        ModelRow(name, "vision", "images/s", called),
    ]

    def forwards(make: Callable[[], nn.Module], scope: str, share: float) -> dict[str, Found]:
        return forward_speed(make, batch, side, device, seconds, scope, share)

    own = partial(vittt.build, f"vittt_{model}", num_classes=1000)
    return rows, [
        *our_jobs(case, device, seconds),
        *peer_jobs((case.name,), partial(peers, softmax_peers.images(case, peer, side), device, seconds)),
        Measurement((name,), "ours", ("eager", "graphs"), partial(forwards, own, "")),
        *peer_jobs((name,), partial(forwards, partial(vision_transformer, peer, side))),
    ]


def views_plan(sizes: ModelSizes, device: torch.device, seconds: float) -> Plan:
    """LaCT view synthesis, and the same transformer with full attention."""
    case = cases.views(*sizes.views)
    layers, dim = sizes.views[:2]
    config = lact_nvs.LactNvsConfig(dim=dim, layers=layers, fast_head_dim=dim, head_dim=min(64, dim))
    row = ModelRow(case.name, "views", "views/s", "the same with full attention, SDPA", flops=case.flops)
    jobs = peer_jobs((case.name,), partial(peers, softmax_peers.views(case, config), device, seconds))
    return [row], our_jobs(case, device, seconds) + jobs


def decode_plan(sizes: ModelSizes, device: torch.device, seconds: float) -> Plan:
    """A token of one sequence, and of many."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset = PRESETS[sizes.preset]
    chunk = preset["inner"].chunk
    one, many = f"decode-{sizes.preset}-batch{sizes.one.batch}-ms", f"decode-{sizes.preset}-batch{sizes.many.batch}"
    measured = {one: "p50_ms", many: "tokens_per_second"}

    def valued(name: str, found: Found) -> Found:
        return {"value": found[measured[name]], **found}

    def lact(
        name: str, load: DecodingLoad, rung: str, how: str, way: str, share: float, reads: DecodeDtype | None = None
    ) -> dict[str, Found]:
        give_back(device)
        model = build(sizes.preset, device, dtype, inner=ladder(preset["inner"])[rung], decode_dtype=reads).eval()
        until = time.perf_counter() + 0.75 * share
        return {way: valued(name, decode(model, load, until, graphs=how == "graphs"))}

    def llama(name: str, load: DecodingLoad, how: str, share: float) -> dict[str, Found]:
        give_back(device)
        torch.manual_seed(0)
        with torch.device(device):
            model = make_llama(LactConfig(**preset))
        model = nn.Module.to(model, dtype).eval()
        until = time.perf_counter() + 0.75 * share
        return {how: valued(name, decode_llama(model, load, chunk, until, static=how == "static graphs"))}

    def short(load: DecodingLoad) -> DecodingLoad:
        return replace(load, tokens=min(load.tokens, 256))

    jobs = []
    for name, load, weight in ((one, sizes.one, 5.0), (many, sizes.many, 2.0)):
        jobs += [
            Measurement((name,), "ours", ("graphs",), partial(lact, name, load, "rung2", "graphs", "graphs"), weight=weight),
            Measurement((name,), "peer", ("static graphs",), partial(llama, name, short(load), "static graphs")),
            Measurement((name,), "peer", ("dynamic",), partial(llama, name, short(load), "dynamic"), first=False),
            Measurement(
                (name,), "ours", ("eager",), partial(lact, name, short(load), "rung2", "eager", "eager"), first=False
            ),
            Measurement(
                (name,),
                "beside",
                ("rung0",),
                partial(lact, name, short(load), "rung0", "graphs", "rung0"),
                first=False,
                limit=COMPILING["blocks"],
            ),
            *(
                Measurement(
                    (name,),
                    "beside",
                    (way,),
                    partial(lact, name, short(load), rung, "graphs", way, reads="bfloat16"),
                    first=False,
                    limit=COMPILING["blocks"],
                )
                for rung, way in (("rung2", "rung2, read in bfloat16"), ("rung0", "rung0, read in bfloat16"))
            ),
        ]
    peer = "transformers' Llama of that size, SDPA"
    return [ModelRow(one, "decode", "ms", peer, higher=False), ModelRow(many, "decode", "tokens/s", peer)], jobs


def plan(what: Sequence[str], sizes: ModelSizes, device: torch.device, seconds: float) -> Plan:
    """Rows and jobs of some of `PARTS`, in that order."""
    plans: dict[str, Callable[[], Plan]] = {
        "language": partial(language_plan, "language", sizes.language, device, seconds),
        "small": partial(language_plan, "small", sizes.small, device, seconds),
        "vision": partial(vision_plan, sizes, device, seconds),
        "views": partial(views_plan, sizes, device, seconds),
        "decode": partial(decode_plan, sizes, device, seconds),
    }
    found = [plans[part]() for part in what]
    return [row for rows, _ in found for row in rows], [job for _, jobs in found for job in jobs]
