"""`kvbind bench decode` and `kvbind bench step`: generation and training of the LaCT language model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbind.bench.profiles import launches, summary
from kvbind.bench.timing import now
from kvbind.inner.spec import InnerLoop
from kvbind.models import PRESETS, LactCache, LactConfig, LactForCausalLM
from kvbind.precision import matmul_precision


def build(preset: str, device: torch.device, dtype: torch.dtype, **fields: Any) -> LactForCausalLM:
    """A model of a preset's size with random weights.

    Args:
        preset: a name in `kvbind.models.PRESETS`.
        device: where it lives.
        dtype: of its parameters.
        **fields: of `LactConfig`, in place of the preset's.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = LactForCausalLM(LactConfig(**{**PRESETS[preset], **fields}))
    return nn.Module.to(model, dtype)


@dataclass(frozen=True)
class Decoding:
    """Generation after one prompt.

    Attributes:
        prompt: its tokens.
        prefill_seconds: to read it with a cache, in pieces.
        token_seconds: median time of one more token from the cache.
        slowest_token_seconds: the longest, that of a token which completes a chunk.
        reread_seconds: time of one more token without a cache: the whole prompt again; None where it was not measured.
        cache_bytes: what the cache holds.
    """

    prompt: int
    prefill_seconds: float
    token_seconds: float
    slowest_token_seconds: float
    reread_seconds: float | None
    cache_bytes: int


@torch.no_grad()
def bench_decoding(
    model: LactForCausalLM, prompts: list[int], *, tokens: int = 64, piece: int = 8192, reread: bool = True
) -> list[Decoding]:
    """Time generation, one sequence at a time, greedy, after prompts of random tokens.

    Each prompt of a chunk or more ends `tokens / 2` before a chunk does, so that the measured tokens include one that
    completes it.

    Args:
        model: in evaluation mode.
        prompts: their lengths, rounded to end as said.
        tokens: to generate after each.
        piece: tokens that prefill reads at a time.
        reread: also time a forward pass over the whole prompt.
    """
    device, chunk = model.device, model.config.inner.chunk or 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, max(prompts)), generator=generator).to(device)
    lengths = [max(1, n // chunk * chunk - tokens // 2) if n >= chunk else n for n in prompts]

    def prefill(length: int) -> tuple[LactCache, Tensor]:
        cache = LactCache()
        for begin in range(0, length, piece):
            part = ids[:, begin : min(begin + piece, length)]
            logits = model(part, cache=cache, use_cache=True, logits_to_keep=1).logits
        return cache, logits

    def one_more(cache: LactCache, logits: Tensor) -> Tensor:
        token = logits[:, -1:].argmax(-1)
        after: Tensor = model(token, cache=cache, use_cache=True, logits_to_keep=1).logits
        return after

    def again(length: int) -> None:
        model(ids[:, :length], use_cache=False, logits_to_keep=1)

    one_more(*prefill(lengths[0]))
    prefills, kept, rereads = [], [], []
    for length in lengths:
        prefill(length)
        start = now(device)
        kept.append(prefill(length))
        prefills.append(now(device) - start)
        if reread:
            again(length)
            start = now(device)
            again(length)
            rereads.append(now(device) - start)
    # prompts take turns, so that a machine that slows down slows all of them
    times: list[list[float]] = [[] for _ in lengths]
    for _ in range(tokens):
        for i, (cache, logits) in enumerate(kept):
            start = now(device)
            kept[i] = cache, one_more(cache, logits)
            times[i].append(now(device) - start)
    return [
        Decoding(
            prompt=length,
            prefill_seconds=prefills[i],
            token_seconds=statistics.median(times[i]),
            slowest_token_seconds=max(times[i]),
            reread_seconds=rereads[i] if reread else None,
            cache_bytes=cache_bytes(kept[i][0]),
        )
        for i, length in enumerate(lengths)
    ]


def cache_bytes(cache: LactCache) -> int:
    """The bytes of every tensor in a cache."""
    held: list[Tensor] = []
    for state in cache.states:
        held += state.tensors()
    return sum(x.untyped_storage().nbytes() for x in {x.untyped_storage().data_ptr(): x for x in held}.values())


@dataclass(frozen=True)
class Step:
    """One training step of one inner loop in one form.

    Attributes:
        rung: of the ladder.
        form: "recurrent" or "parallel".
        tokens_per_second: median over the measured steps, the optimizer's included.
        peak_bytes: the most memory held at once, parameters and optimizer included; None on a CPU.
        loss: after the measured steps, on the same random tokens.
        profile: of one more step, `kvbind.bench.profiles.summary`; None where none was asked for.
    """

    rung: str
    form: str
    tokens_per_second: float
    peak_bytes: int | None
    loss: float
    profile: dict[str, Any] | None = None


def bench_step(
    preset: str,
    rungs: dict[str, tuple[InnerLoop, str]],
    length: int,
    device: torch.device,
    *,
    steps: int = 4,
    profile: bool = False,
) -> Iterator[Step]:
    """Time training steps of AdamW under bfloat16 autocast on a GPU (float32 on a CPU), one sequence per step.

    Blocks are checkpointed; matrix products of float32 operands may use TF32.

    Args:
        preset: a name in `kvbind.models.PRESETS`.
        rungs: by row name, the inner loop and the form that evaluates it.
        length: tokens per sequence.
        device: where to run.
        steps: measured, after one to warm up.
        profile: also profile one; on a GPU.
    """
    for name, (inner, form) in rungs.items():
        with matmul_precision("high"):
            model = build(preset, device, torch.float32, inner=inner, ttt_form=form).train()
            # transformers renamed it in 5.23
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
            row = _steps(name, form, model, length, device, steps, profile)
            del model
        yield row


def _steps(name: str, form: str, model: nn.Module, length: int, device: torch.device, steps: int, profile: bool) -> Step:
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for _ in range(1 + steps):
        start = now(device)
        step()
        times.append(now(device) - start)
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    last = float(loss.detach())
    spent = summary(launches(step, device, calls=1), 1) if profile else None
    return Step(name, form, length / statistics.median(times[1:]), peak, last, spent)
