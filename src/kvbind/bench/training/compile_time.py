"""`kvbind bench compile`: how long `torch.compile` takes for a training step of a language model, its caches empty."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from kvbind.bench.harness.fresh_process import TookTooLongError, in_fresh_process

WAYS = ("model", "blocks")
"""`model.compile(fullgraph=True)`, or `block.compile(fullgraph=True)` of each block, all of which share one graph."""


def compiled_step(fields: dict[str, Any], backend: str = "inductor") -> dict[str, Any]:
    """Seconds of the first training step, of one more, of the first at another length; this process's processor seconds."""
    import torch

    from kvbind.inner.systems import lact_llm, ladder
    from kvbind.models.lact import LactConfig, LactForCausalLM

    torch.manual_seed(0)
    device, width, chunk = torch.device(fields["device"]), fields["width"], fields["chunk"]
    config = LactConfig(
        vocab_size=512, hidden_size=width, num_hidden_layers=fields["layers"], num_attn_heads=2, num_lact_heads=2,
        window_size=chunk, inner=ladder(lact_llm(chunk))[fields["rung"]],
    )  # fmt: skip
    model: torch.nn.Module = LactForCausalLM(config)
    model = model.to(device).train()

    def step(tokens: int) -> tuple[float, float]:
        ids = torch.randint(0, 512, (2, tokens), device=device)
        begin, used = time.perf_counter(), sum(os.times()[:4])
        model(input_ids=ids, labels=ids).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, sum(os.times()[:4]) - used

    tokens = fields["tokens"]
    # what PyTorch starts at its own first step
    step(tokens)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for part in [model] if fields["way"] == "model" else model.model.layers:  # type: ignore[union-attr]
        part.compile(fullgraph=True, backend=backend)
    (first, used), (again, _), (other, _) = step(tokens), step(tokens), step(tokens + chunk // 2 + 3)
    found = torch._dynamo.utils.counters["stats"]
    return {
        "first_seconds": first, "processor_seconds": used, "again_seconds": again, "new_length_seconds": other,
        "graphs": found["unique_graphs"], "nodes": found["calls_captured"],
    }  # fmt: skip


def bench_compile(rungs: tuple[str, ...], config: dict[str, Any], *, limit: float) -> Iterator[dict[str, Any]]:
    """Rows of each rung and way, each in a process of its own.

    Args:
        rungs: names of the ladder.
        config: layers, width, chunk, tokens and device.
        limit: seconds after which a process is given up on.
    """
    for rung in rungs:
        for way in WAYS:
            row = {"rung": rung, "way": way}
            with tempfile.TemporaryDirectory() as folder:
                empty = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
                try:
                    yield row | in_fresh_process(compiled_step, row | config, empty, limit)
                except (TookTooLongError, RuntimeError) as problem:
                    yield row | {"error": str(problem)}
