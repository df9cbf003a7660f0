"""`kvbind bench decode`: decoding token by token, of the LaCT language model and of a Llama of its size."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from kvbind.bench.harness.timing import now
from kvbind.bench.training.steps import build
from kvbind.inner.systems import PROJECTIONS, SYSTEMS, named
from kvbind.kernels.launching.cuda_graphs import capture
from kvbind.layers.attention.modules import AttentionState
from kvbind.layers.lact.layer import DecodeDtype, LactState
from kvbind.models import LactCache, LactForCausalLM
from kvbind.models.lact.cache import CACHE

BEFORE = 64
"""Tokens between a prompt's end and that of a chunk, so that even a short measurement has one."""

LEAST = 2 * BEFORE
"""Tokens that are timed at the least."""

CAUSAL = tuple(name for name, make in SYSTEMS.items() if make().visibility in ("past", "token"))
"""Named systems that a language model can have."""

QUEUED = 48
"""Tokens of which each begins without waiting for the last."""


@dataclass(frozen=True)
class DecodingLoad:
    """What is decoded.

    Attributes:
        batch: sequences.
        prompt: tokens of each, before its end is put `BEFORE` tokens ahead of a chunk's.
        tokens: to time at the most.
        piece: tokens that prefill reads at a time.
    """

    batch: int
    prompt: int
    tokens: int
    piece: int

    def length(self, chunk: int) -> int:
        """Tokens of a prompt."""
        whole = self.prompt // chunk * chunk
        return whole - min(BEFORE, chunk // 2) if whole else self.prompt


@contextmanager
def graphs_switched(on: bool) -> Iterator[None]:
    """Inside, decoding runs as CUDA graphs, or does not."""
    before = os.environ.get("KVBIND_GRAPHS")
    os.environ["KVBIND_GRAPHS"] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KVBIND_GRAPHS"]
        else:
            os.environ["KVBIND_GRAPHS"] = before


def timed_tokens(one_more: Callable[[], object], device: torch.device, load: DecodingLoad, until: float) -> dict[str, Any]:
    """Time a function that decodes one more token of each sequence.

    Args:
        one_more: is called up to `load.tokens + QUEUED + 1` times.
        device: where it runs.
        load: how many sequences and tokens are decoded.
        until: by `time.perf_counter`, when to stop; not before `LEAST` tokens.

    Returns:
        "first_seconds" of the first call, which compiles and captures; of the others, each waited for, "p50_ms", "p99_ms"
        and "slowest_ms", with "tokens", how many those are; "queued_ms", the mean of calls that do not wait for one another,
        and "tokens_per_second", of these, all sequences together.
    """
    start = now(device)
    one_more()
    first = now(device) - start
    taken: list[float] = []
    while len(taken) < load.tokens and (len(taken) < LEAST or time.perf_counter() < until):
        start = now(device)
        one_more()
        taken.append(now(device) - start)
    start = now(device)
    for _ in range(QUEUED):
        one_more()
    queued = (now(device) - start) / QUEUED
    ordered = sorted(taken)
    return {
        "first_seconds": first,
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "slowest_ms": 1e3 * ordered[-1],
        "tokens": len(taken),
        "queued_ms": 1e3 * queued,
        "tokens_per_second": load.batch / queued,
    }


def peak(device: torch.device) -> int | None:
    """The most memory held since peaks were reset, bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Count the device's peak memory anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def prompts(load: DecodingLoad, chunk: int, vocabulary: int, device: torch.device) -> Tensor:
    """Random tokens, int64 `[batch, length]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (load.batch, load.length(chunk)), generator=generator).to(device)


def prefilled(read: Callable[[], tuple[Any, Tensor]], device: torch.device) -> tuple[Any, Tensor, dict[str, Any]]:
    """What reading prompts gives (a cache and logits), once more than to compile what it needs; its time and memory."""
    start = now(device)
    read()
    first = now(device) - start
    reset_peak(device)
    start = now(device)
    cache, logits = read()
    found = {"first_prefill_seconds": first, "prefill_seconds": now(device) - start, "prefill_peak_bytes": peak(device)}
    return cache, logits, found


def state_bytes(cache: LactCache) -> int:
    """The bytes of the fast weights in a cache, with what it has beside attention of tokens that are still to be written."""
    fast = [
        state.held if isinstance(state, LactState) else state.fast
        for state in cache.states
        if not isinstance(state, AttentionState)
    ]
    return bytes_of([x for state in fast for x in state.tensors.values()])


def bytes_of(held: Sequence[Tensor]) -> int:
    """The bytes of tensors, of which several may share memory."""
    return sum(x.untyped_storage().nbytes() for x in {x.untyped_storage().data_ptr(): x for x in held}.values())


@torch.no_grad()
def decode(model: LactForCausalLM, load: DecodingLoad, until: float, *, graphs: bool) -> dict[str, Any]:
    """Time greedy decoding of a LaCT model.

    Args:
        model: in evaluation mode.
        load: what to decode.
        until: as `timed_tokens` takes it.
        graphs: as CUDA graphs, where there are any.

    Returns:
        As `timed_tokens`, and "prompt", its tokens; "prefill_seconds" and "first_prefill_seconds", which contains what is
        compiled; "cache_bytes" of all sequences, and "state_bytes" of their fast weights alone; "prefill_peak_bytes" and
        "peak_bytes", of decoding; "captured".
    """
    device, span = model.device, model.config.inner.span or 1
    ids = prompts(load, span, model.config.vocab_size, device)

    def read() -> tuple[LactCache, Tensor]:
        cache = LactCache()
        for part in ids.split(load.piece, dim=1):
            logits = model(part, cache=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits

    with graphs_switched(graphs):
        cache, logits, found = prefilled(read, device)
        found["state_bytes"] = state_bytes(cache)

        def one_more() -> None:
            nonlocal logits
            logits = model(logits[:, -1:].argmax(-1), cache=cache, use_cache=True, logits_to_keep=1).logits

        reset_peak(device)
        found |= timed_tokens(one_more, device, load, until)
    found |= {"cache_bytes": cache.nbytes, "peak_bytes": peak(device), "captured": cache.rows is not None}
    return {"prompt": ids.shape[1], **found}


@torch.no_grad()
def reread_seconds(model: LactForCausalLM, load: DecodingLoad) -> float:
    """How long one more token takes without a cache: the whole prompt again, once more than to compile what it needs."""
    ids = prompts(load, model.config.inner.span or 1, model.config.vocab_size, model.device)
    for _ in range(2):
        start = now(model.device)
        model(ids, use_cache=False, logits_to_keep=1)
        taken = now(model.device) - start
    return taken


def bench_decoding(
    model: LactForCausalLM, loads: Sequence[DecodingLoad], graphs: Sequence[bool], seconds: float
) -> Iterator[dict[str, Any]]:
    """Time greedy decoding after prompts of random tokens, each with CUDA graphs, without, or both.

    Args:
        model: in evaluation mode.
        loads: what to decode.
        graphs: with them or without, in this order.
        seconds: for the tokens of a row; no row has fewer than `LEAST`, or all that its load asks for.

    Yields:
        Rows: what `decode` says, with "batch", "graphs" and "reread_seconds", of one sequence alone (None of several).
    """
    for load in loads:
        again = reread_seconds(model, load) if load.batch == 1 else None
        for on in graphs:
            found = decode(model, load, time.perf_counter() + seconds, graphs=on)
            yield {"batch": load.batch, "graphs": on, **found, "reread_seconds": again}


def bench_systems(
    preset: str,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    loads: Sequence[DecodingLoad],
    graphs: Sequence[bool],
    seconds: float,
    decode_dtype: DecodeDtype | None = None,
) -> Iterator[dict[str, Any]]:
    """Time greedy decoding of a preset, as it is or with the fast weights of named systems.

    Args:
        preset: a name in `kvbind.models.PRESETS`.
        names: of `CAUSAL`; none for the preset's own inner loop.
        device: where to run.
        dtype: of parameters.
        loads: as `bench_decoding` takes them.
        graphs: as `bench_decoding` takes them.
        seconds: as `bench_decoding` takes them.
        decode_dtype: as `LactConfig` takes it.

    Yields:
        Its rows, each with the name under "system" where there are names.
    """
    fields = {name: {"inner": named(name), "projections": name if name in PROJECTIONS else None} for name in names}
    for name, given in (fields or {"": {}}).items():
        model = build(preset, device, dtype, **given, decode_dtype=decode_dtype)
        model.train(False)
        for row in bench_decoding(model, loads, graphs, seconds):
            yield ({"system": name} if name else {}) | row


@torch.no_grad()
def decode_llama(model: LlamaForCausalLM, load: DecodingLoad, chunk: int, until: float, *, static: bool) -> dict[str, Any]:
    """Time greedy decoding of a Llama.

    Args:
        model: in evaluation mode.
        load: what to decode.
        chunk: that of the LaCT model whose prompts are decoded.
        until: as `timed_tokens` takes it.
        static: with transformers' `StaticCache`, each token a replay of a CUDA graph on a GPU; else `DynamicCache`, eager.

    Returns:
        As `decode`.
    """
    device = model.device
    ids = prompts(load, chunk, model.config.vocab_size, device)
    room = ids.shape[1] + load.tokens + QUEUED + 2
    cache, logits, found = prefilled(lambda: read_llama(model, ids, room if static else None), device)
    one_more, _ = llama_tokens(model, cache, logits, ids.shape[1], room if static else None)
    reset_peak(device)
    replays = static and device.type == "cuda"
    if replays:
        one_more = captured(one_more, device)
    found |= timed_tokens(one_more, device, load, until)
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    bytes_held = sum(x.numel() * x.element_size() for x in held)
    return {"prompt": ids.shape[1], **found, "cache_bytes": bytes_held, "peak_bytes": peak(device), "captured": replays}


def read_llama(model: LlamaForCausalLM, ids: Tensor, room: int | None) -> tuple[Any, Tensor]:
    """A cache with the prompts `ids` in it, static where there is `room` for a number of tokens, and the next logits."""
    cache = DynamicCache(config=model.config) if room is None else StaticCache(config=model.config, max_cache_len=room)
    return cache, model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits


def llama_tokens(
    model: LlamaForCausalLM, cache: Any, logits: Tensor, length: int, room: int | None
) -> tuple[Callable[[], None], Tensor]:
    """What decodes one more token of each row, on tensors that stay where they are; and the tokens, int64 `[B, 1]`.

    Args:
        model: in evaluation mode.
        cache: from `read_llama`.
        logits: of the last token read, from `read_llama`.
        length: tokens in it.
        room: as `read_llama` took it.
    """
    token = logits[:, -1:].argmax(-1)
    position = torch.full((1, 1), length, device=model.device)
    places = None if room is None else torch.arange(room, device=model.device)

    def one_more() -> None:
        mask = None if places is None else (places <= position)[None, None]
        given = {"attention_mask": mask, "position_ids": position, CACHE: cache}
        after = model(token, **given, use_cache=True, logits_to_keep=1).logits
        token.copy_(after[:, -1:].argmax(-1))
        position.add_(1)

    return one_more, token


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work: the first call as it is, which compiles it; then captured, and replayed."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    held: list[Callable[[], object]] = []

    def run() -> None:
        if held:
            held[0]()
            return
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)
        held.append(capture(work, device, stream, pool))

    return run
