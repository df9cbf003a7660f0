"""The tables of `kvbind bench serving`, and of what is served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from kvbind.bench.models.serving import RequestLoad
from kvbind.bench.tables.grid import Grid
from kvbind.inner.spec import InnerLoop
from kvbind.inner.systems import PROJECTIONS, SYSTEMS, ladder
from kvbind.layers.lact.layer import NOT_MADE
from kvbind.models import PRESETS
from kvbind.serving.checks import check_servable
from kvbind.serving.sizes import RequestSize


def serving_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record's `config` and `rows`."""
    config, lines = record["config"], []
    for row in record["rows"]:
        waits = (row[f"{which}_p{p}"] for which in ("first", "next") for p in (50, 99))
        numbers = [f"{row['parameters'] / 1e6:.2f}M", f"{row['requests_per_second']:.2f}", f"{row['tokens_per_second']:.0f}"]
        lines.append((row["name"], *numbers, *(f"{1e3 * seconds:.1f}" for seconds in waits)))
    load = RequestLoad(**config["load"])
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
