"""Requests to a model in vLLM, beside a Llama of its size in the same engine: how many, and how long each waits."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvbind.bench.harness.fresh_process import in_fresh_process
from kvbind.inner.systems import ladder
from kvbind.models import PRESETS

LIMIT = 3600.0
"""Seconds after which a model's process is ended."""

CPU_POOL = 1 << 30
"""Bytes of the pool on a CPU, where vLLM would otherwise take nearly all there are."""

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""The engine in one process, whose steps are seen as they end."""


@dataclass(frozen=True)
class RequestLoad:
    """Requests with random tokens, and lengths drawn evenly.

    Attributes:
        requests: how many.
        prompt: tokens in the longest prompt; the shortest has one.
        answer: tokens in the longest answer; the shortest has one.
        rate: requests a second, at random times; 0 for all at once.
        running: how many run at once at most.
        step: tokens in a step at most.
        seed: of all that is drawn.
    """

    requests: int
    prompt: int
    answer: int
    rate: float
    running: int
    step: int
    seed: int = 0

    def drawn(self, vocabulary: int) -> list[tuple[float, list[int], int]]:
        """Of each request when it arrives (seconds), its prompt, and the length of its answer."""
        rng, now, found = random.Random(self.seed), 0.0, []
        for _ in range(self.requests):
            now += rng.expovariate(self.rate) if self.rate else 0.0
            ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, self.prompt))]
            found.append((now, ids, rng.randint(1, self.answer)))
        return found


def bench_serving(preset: str, rung: int, load: RequestLoad, dtype: str) -> list[dict[str, Any]]:
    """Rows of the model and of the Llama, each measured in a process of its own.

    Args:
        preset: a name in `PRESETS`.
        rung: of the ladder that the preset's inner loop starts.
        load: the requests.
        dtype: of both models.
    """
    rows = []
    for name in ("LaCT", "Llama"):
        fields = {"name": name, "preset": preset, "rung": rung, "dtype": dtype, "load": asdict(load)}
        rows.append(in_fresh_process(served, fields, ENVIRONMENT, LIMIT))
    return rows


def served(fields: dict[str, Any]) -> dict[str, Any]:
    """One row: a model with random weights, saved to a folder, served, and asked."""
    load = RequestLoad(**fields["load"])
    with tempfile.TemporaryDirectory() as folder:
        model = _model(fields["name"], fields["preset"], fields["rung"])
        numbers, vocabulary = model.num_parameters(), model.config.vocab_size
        model.save_pretrained(folder)
        del model
        waits = answer(Path(folder), load, vocabulary, fields["dtype"])
    return {"name": fields["name"], "parameters": numbers, **waits}


def _model(name: str, preset: str, rung: int) -> Any:
    from kvbind.models import LactConfig, LactForCausalLM

    torch.manual_seed(0)
    sizes = dict(PRESETS[preset])
    sizes["inner"] = list(ladder(sizes["inner"]).values())[rung]
    config = LactConfig(**sizes)
    if name == "LaCT":
        return LactForCausalLM(config)
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(width: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attn_heads,
            num_key_value_heads=config.num_attn_heads,
            intermediate_size=width,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )

    with torch.device("meta"):
        wanted = LactForCausalLM(config).num_parameters()
        found = LlamaForCausalLM(llama(config.mlp_width)).num_parameters()
    # what the fast weights take goes to the MLP, so that both have as many parameters
    more = round((wanted - found) / (3 * config.hidden_size * config.num_hidden_layers))
    return LlamaForCausalLM(llama(config.mlp_width + more))


def answer(folder: Path, load: RequestLoad, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Seconds that requests to a model in a folder wait.

    Returns:
        `seconds` until the last is answered; `requests_per_second` and `tokens_per_second` of answers; `first_p50` and
        `first_p99`, seconds from a request's arrival to its first token, and `next_p50` and `next_p99`, from each token to
        the next.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=load.prompt + load.answer,
        max_num_seqs=load.running,
        max_num_batched_tokens=load.step,
        enable_prefix_caching=False,
        disable_log_stats=True,
        # on a CPU, as much memory as is said, and no compiler
        **({} if torch.cuda.is_available() else {"kv_cache_memory_bytes": CPU_POOL, "enforce_eager": True}),
    )

    def parameters(tokens: int) -> Any:
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    # what is compiled, tuned or captured at first use
    warm = [{"prompt_token_ids": [1] * length} for length in (1, load.prompt)]
    llm.generate(warm, parameters(min(8, load.answer)), use_tqdm=False)

    engine, waiting = llm.llm_engine, load.drawn(vocabulary)[::-1]
    arrived: dict[str, float] = {}
    when: dict[str, list[float]] = {}
    begin = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        while waiting and begin + waiting[-1][0] <= time.perf_counter():
            due, ids, tokens = waiting.pop()
            name = str(len(arrived))
            arrived[name], when[name] = begin + due, []
            engine.add_request(name, {"prompt_token_ids": ids}, parameters(tokens))
        if not engine.has_unfinished_requests():
            time.sleep(max(begin + waiting[-1][0] - time.perf_counter(), 0))
            continue
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            # a step that brings several is one wait
            when[output.request_id] += [now] * (len(output.outputs[0].token_ids) - len(when[output.request_id]))
    seconds = time.perf_counter() - begin
    first = torch.tensor([times[0] - arrived[name] for name, times in when.items()])
    later = torch.tensor([b - a for times in when.values() for a, b in pairwise(times)])
    tokens = sum(map(len, when.values()))
    return {
        "seconds": seconds,
        "requests_per_second": load.requests / seconds,
        "tokens_per_second": tokens / seconds,
        **{f"first_p{p}": first.quantile(p / 100).item() for p in (50, 99)},
        **{f"next_p{p}": later.quantile(p / 100).item() if len(later) else None for p in (50, 99)},
    }
