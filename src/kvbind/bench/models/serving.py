"""Requests to a model in vLLM, beside a Llama of its size in the same engine: how many, and how long each waits."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvbind.bench.harness.fresh_process import in_fresh_process
from kvbind.bench.tables.kernels import Grid
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import PROJECTIONS, SYSTEMS, ladder
from kvbind.layers.lact import NOT_MADE
from kvbind.models import PRESETS
from kvbind.serving.checks import check_servable
from kvbind.serving.sizes import RequestSize

LIMIT = 3600.0
"""Seconds after which a model's process is ended."""

CPU_POOL = 1 << 30
"""Bytes of the pool on a CPU, where vLLM would otherwise take nearly all there are."""

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""The engine in one process, whose steps are seen as they end."""


@dataclass(frozen=True)
class Load:
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


def bench_serving(preset: str, rung: int, load: Load, dtype: str) -> list[dict[str, Any]]:
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
        rows.append(in_fresh_process("served", fields, ENVIRONMENT, LIMIT))
    return rows


def served(fields: dict[str, Any]) -> dict[str, Any]:
    """One row: a model with random weights, saved to a folder, served, and asked."""
    load = Load(**fields["load"])
    with tempfile.TemporaryDirectory() as folder:
        model = _model(fields["name"], fields["preset"], fields["rung"])
        numbers, vocabulary = model.num_parameters(), model.config.vocab_size
        model.save_pretrained(folder)
        del model
        waits = answer(Path(folder), load, vocabulary, fields["dtype"])
    return {"name": fields["name"], "parameters": numbers, **waits}


def serving_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record's `config` and `rows`."""
    config, lines = record["config"], []
    for row in record["rows"]:
        waits = (row[f"{which}_p{p}"] for which in ("first", "next") for p in (50, 99))
        numbers = [f"{row['parameters'] / 1e6:.2f}M", f"{row['requests_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        lines.append((row["name"], *numbers, *(f"{1e3 * seconds:.1f}" for seconds in waits)))
    load = Load(**config["load"])
    arrive = f"{load.rate:g} a second" if load.rate else "all at once"
    return Grid(
        "serving",
        f"{config['preset']}, rung {config['rung']}, {config['dtype']}: {load.requests} requests {arrive}, at most "
        f"{load.running} running, prompts to {load.prompt} and answers to {load.answer} tokens",
        ("model", "parameters", "requests/s", "tokens/s", "first p50", "first p99", "next p50", "next p99"),
        tuple(lines),
        left=1,
        note="Milliseconds from a request's arrival to its first token, and from each token to the next",
    )


ALONE = ("gated_delta_net", "titans")
"""Systems of layers without attention whose requests `size_grid` tells."""


def size_grid(memory: int) -> Grid:
    """What a request of each preset takes in bfloat16, by rung, and how many fit.

    Args:
        memory: bytes of a GPU's memory, of which vLLM takes nine tenths; the model's weights come off that.
    """
    from kvbind.models import LactConfig, LactForCausalLM

    rows = []
    for preset, fields in PRESETS.items():
        if preset == "tiny":
            continue
        rungs = enumerate(ladder(fields["inner"]).values())
        served: dict[str, dict[str, Any]]
        served = {f"rung {rung}": {"inner": inner} for rung, inner in rungs if rung in (0, 2, 6)}
        served |= {f"{name} alone": {"inner": SYSTEMS[name](), "projections": name} for name in ALONE}
        for name, own in served.items():
            config = LactConfig(**{**fields, **own})
            with torch.device("meta"):
                weights = 2 * LactForCausalLM(config).num_parameters()
            plain, cached = RequestSize.of(config), RequestSize.of(config, cached=True)
            fit = [int((0.9 * memory - weights) // size.bytes) for size in (plain, cached)]
            tokens = str(plain.block) if plain.window else ""
            each = [f"{plain.layers * plain.state / 2**20:.1f}", tokens, f"{plain.bytes / 2**20:.0f}"]
            rows.append((f"`{preset}`, {name}", *each, f"{cached.bytes / 2**20:.0f}", *map(str, fit)))
    return Grid(
        "sizes",
        f"A request in bfloat16, and how many fit a GPU of {memory / 2**30:.0f} GiB",
        ("model", "states, MiB", "page, tokens", "request, MiB", "with prefix caching", "fit", "with prefix caching, fit"),
        tuple(rows),
        left=1,
    )


def served_grid() -> Grid:
    """Which systems vLLM serves, beside attention and alone, and which field is in the way of the others."""
    from kvbind.models import LactConfig

    def answer(inner: InnerLoop, projections: str | None) -> str:
        config = LactConfig(inner=inner, projections=projections)
        if projections is None and config.projections is not None:
            # what attention's layer makes no keys for makes a configuration one of layers without attention
            return "no: " + ", ".join(f"`{name}`" for name in NOT_MADE if name in inner.extensions)
        try:
            check_servable(config)
        except ValueError as error:
            (field,) = re.findall("inner's ([a-z]+) must ", str(error))
            return f"no: `{field}`"
        return "yes"

    rows = []
    for name, make in SYSTEMS.items():
        alone = answer(make(), name) if name in PROJECTIONS else ""
        rows.append((f"`{name}`", answer(make(), None), alone))
    return Grid("served", "Systems that are served", ("system", "beside attention", "alone"), tuple(rows), left=3)


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


def answer(folder: Path, load: Load, vocabulary: int, dtype: str) -> dict[str, Any]:
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
