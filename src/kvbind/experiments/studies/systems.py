"""Systems side by side: language models of one number of parameters, trained on the same tokens in the same order.

Each has the layer that it was published in: LaCT window attention beside its fast weights, In-Place TTT and softmax full
attention, the linear recurrences and the learners none. MLPs are as wide as leaves all models the parameters of the first.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kvbind.bench.models.decoding import DecodingLoad, timed_tokens
from kvbind.experiments import plotting
from kvbind.experiments.figures.figure3 import SERIES, Along, judge
from kvbind.experiments.report.findings import Findings, write_findings
from kvbind.experiments.request import Request
from kvbind.experiments.results.cache import ResultCache
from kvbind.experiments.studies.state_bytes import state_bytes
from kvbind.experiments.training.jobs import TrainingJob
from kvbind.experiments.training.plans import RunsPlan, configuration, data_edits, plan_configs
from kvbind.experiments.training.run_folders import exported, load_model
from kvbind.experiments.training.runs import Run
from kvbind.experiments.training.trained_rows import unfinished
from kvbind.inner.value import check_choice
from kvbind.models.lact.cache import CACHE
from kvbind.tasks import language
from kvbind.tasks.language.table_rows import FULL
from kvbind.tasks.tokenizers import open_tokenizer
from kvbind.train.config import to_plain

TASK = "language"

MIXERS: dict[str, tuple[str, ...]] = {
    "rung0": (),
    "rung2": ("model.inner.update=last", "model.inner.normalize=false"),
    # in the layer of the recurrences, with their convolution
    "linear_attention": ("model.inner.system=linear_attention", "model.fields.projections={conv: 4}"),
    "gla": ("model.inner.system=gla",),
    "gated_delta_net": ("model.inner.system=gated_delta_net",),
    "kda": ("model.inner.system=kda",),
    "ttt_linear": ("model.inner.system=ttt_linear",),
    "titans": ("model.inner.system=titans",),
    "in_place_ttt": ("model.mixer=in_place",),
    "softmax": ("model.fields.fast_weights=false", f"model.fields.window_size={FULL}"),
}
"""What is compared, and the edits that make it; the first gives the number of parameters."""

LABELS = {"rung0": "lact_llm, rung 0", "rung2": "lact_llm, rung 2"}

SCALES = ("smoke", "small", "large")

STEP = 16
"""Widths of MLPs are multiples of this."""

TOKENS = {"smoke": 32, "small": 256, "large": 256}
"""How many are decoded for their time, by scale."""


@dataclass(frozen=True)
class DecodingCost:
    """What goes on from a held-out sample's length costs.

    Attributes:
        milliseconds: of a token, the median.
        bytes: of the state of one sequence, all layers.
        dtype: of the model.
    """

    milliseconds: float
    bytes: int
    dtype: str


def reproduce(**options: Any) -> dict[str, Any]:
    """Train every system, time how it trains and decodes, and write the report.

    Args:
        options: the fields of `kvbind.experiments.request.Request`; the task is "language", rows are `MIXERS`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: another task, an unknown scale or system, or an edit that does not fit.
        UnfinishedError: there was not time enough for a single run.
    """
    request = Request(**options)
    plan = plan_runs(request)
    request.say(f"systems, scale {request.scale}: {len(plan.jobs)} runs on {plan.device}; report in {plan.out}")

    def finished(job: TrainingJob, run: Run) -> None:
        request.say(f"{job.title}: perplexity {run.result['held_out']['perplexity']:.3f}, {run.time_note}")

    done = plan.train(request, finished)
    plan.out.mkdir(parents=True, exist_ok=True)
    runs = {name: {seed: run for (row, seed), run in done.items() if row == name} for name in plan.rows}
    runs = {name: own for name, own in runs.items() if own}
    decoding = {name: decoded(name, own, plan, request) for name, own in runs.items()}
    missing = unfinished({
        name: ([seed for row, seed in plan.jobs if row == name], runs.get(name, {}))
        for name in plan.rows if request.trains(name)
    })  # fmt: skip
    return write_findings(plan.out, request, findings(runs, decoding, plan, request, missing), plan.device)


def plan_runs(request: Request) -> RunsPlan:
    """The runs; those of the first seed, whose speed counts, have the device to themselves.

    Raises:
        ValueError: an unknown scale or system, or an edit that does not fit.
    """
    check_choice("task", request.task, (TASK,))
    check_choice("scale", request.scale, SCALES)
    request.refuse_measuring("systems")
    for name in request.rows or ():
        check_choice("rows", name, tuple(MIXERS))
    for edit in request.overrides:
        if edit.startswith(("model.mixer=", "model.inner.system=", "model.fields.intermediate_size=")):
            raise ValueError(f"overrides must leave {edit.partition('=')[0]} to the comparison; got {edit!r}")
    edits = [*request.overrides, *data_edits(TASK, request.source(TASK))]
    first = next(iter(MIXERS))
    target = parameters(configuration(TASK, request.scale, 0, [*edits, *MIXERS[first]]))
    own = {
        name: [*edits, *its, f"model.fields.intermediate_size={width}"]
        for name, its in MIXERS.items()
        for width in [fitting(request.scale, [*edits, *its], target)]
    }
    configs = {
        (name, seed): language.resolve(configuration(TASK, request.scale, seed, its))
        for seed in range(request.seeds)
        for name, its in own.items()
    }
    plan = plan_configs("systems", configuration(TASK, request.scale, 0, edits), configs, request)
    return replace(plan, jobs={key: replace(job, alone=not key[1]) for key, job in plan.jobs.items()})


def planned_jobs(request: Request) -> list[tuple[str, TrainingJob]]:
    """The runs in their order, each with the name of its system."""
    return plan_runs(request).by_row()


def parameters(config: Any) -> int:
    """How many a configuration's model has."""
    with torch.device("meta"):
        model = language.build_model(config, open_tokenizer(config.data.tokenizer))
    return sum(p.numel() for p in model.parameters())


def fitting(scale: str, edits: Sequence[str], target: int) -> int:
    """The width of MLPs at which a model has nearest to `target` parameters."""
    few, more = (
        parameters(configuration(TASK, scale, 0, [*edits, f"model.fields.intermediate_size={n * STEP}"])) for n in (1, 2)
    )
    return STEP * max(1 + round((target - few) / (more - few)), 1)


@torch.no_grad()
def decoded(name: str, runs: Mapping[int, Run], plan: RunsPlan, request: Request) -> DecodingCost | None:
    """Time decoding of a system's first run; None where its weights are not here, and there is no earlier measurement."""
    costs, tokens = ResultCache(plan.out / "decoding.json", plan.device, request.fresh), TOKENS[request.scale]
    seed = min(runs)
    job = plan.jobs[name, seed]
    known = costs.get(to_plain(job.config), tokens)
    if known is not None:
        return DecodingCost(**known)
    if not exported(job.folder):
        return None
    model = load_model(job.folder, language.Task(job.config, training=False)).to(plan.device)
    if plan.device.type == "cuda":
        model = model.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, job.config.data.length), generator=generator).to(plan.device)
    read = model(ids, use_cache=True, logits_to_keep=1)
    cache, logits = getattr(read, CACHE), read.logits
    held = state_bytes(cache)

    def one_more() -> None:
        nonlocal logits
        logits = model(logits[:, -1:].argmax(-1), **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits

    load = DecodingLoad(1, ids.shape[1], tokens, ids.shape[1])
    taken = timed_tokens(one_more, plan.device, load, time.perf_counter())
    found = DecodingCost(taken["p50_ms"], held, str(model.dtype).removeprefix("torch."))
    costs.put(asdict(found), to_plain(job.config), tokens)
    return found


def along(runs: Mapping[int, Run]) -> Along:
    """Held-out losses by position, averaged over seeds."""
    held_out = [run.result["held_out"] for run in runs.values()]
    curve = [
        (float(each[0][0]), statistics.fmean(x for _, x in each))
        for each in zip(*(one[SERIES] for one in held_out), strict=True)
    ]
    return Along(curve, statistics.fmean(one["loss"] for one in held_out))


def findings(
    runs: Mapping[str, Mapping[int, Run]],
    decoding: Mapping[str, DecodingCost | None],
    plan: RunsPlan,
    request: Request,
    missing: str,
) -> Findings:
    """What came out, and the picture of it."""
    rows = {name: along(own) for name, own in runs.items()}
    labels = {name: LABELS.get(name, name) for name in rows}
    plotting.curves(
        plan.out / "positions.png",
        {labels[name]: plotting.pooled(own.curve, 16) for name, own in rows.items()},
        title="Held-out loss by position", x="position in the sequence", y="nats per token", rungs=len(rows),
    )  # fmt: skip
    data, lines = [], []
    for name, own in rows.items():
        losses = [run.result["held_out"]["loss"] for run in runs[name].values()]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
        first = runs[name][min(runs[name])]
        speed, cost = first.speed("tokens"), decoding[name]
        size = first.result["parameters"]
        data.append({
            "name": name, "label": labels[name], "parameters": size, "loss": own.overall, "loss_standard_error": error,
            "perplexity": math.exp(own.overall), "early": own.early, "late": own.late,
            SERIES: [list(point) for point in own.curve], "training_tokens_per_second": speed,
            "decoding": None if cost is None else asdict(cost),
            "runs": [{"seed": seed, "folder": run.folder.name, **run.result} for seed, run in runs[name].items()],
        })  # fmt: skip
        lines.append([
            labels[name], f"{size / 1e6:.2f}", f"{own.overall:.3f}" + ("" if error is None else f" ± {error:.3f}"),
            f"{math.exp(own.overall):.3f}", f"{math.exp(own.early):.3f}", f"{math.exp(own.late):.3f}", f"{speed:,.0f}",
            *(("-", "-") if cost is None else (f"{cost.milliseconds:.2f}", f"{cost.bytes / 1024:,.0f}")),
        ])  # fmt: skip
    header = ["system", "parameters, M", "loss", "perplexity", "early", "late", "training tokens/s", "decoding ms/token",
              "state KiB"]  # fmt: skip
    length = plan.config.data.length
    left_out = f" Unfinished, and left out: {missing}." if missing else ""
    return Findings(
        experiment="systems",
        title=f"Systems side by side, scale {request.scale}",
        lead=f"Language models of about as many parameters, trained on the same tokens in the same order, {request.seeds} "
        "seed(s): held-out loss in nats per token; perplexity overall, over the first and over the last quarter of the "
        f"positions; tokens per second of the median training step; the median token decoded behind {length} others; and "
        f"what is kept of these, in all layers. LaCT has window attention beside its fast weights, In-Place TTT and softmax "
        f"attention to everything.{left_out}",
        config=to_plain(plan.config),
        data={"rows": data, "unfinished": missing},
        verdicts=judge(rows),
        tables={"Each system": (header, lines)},
        pictures={"Along the sequence": ("positions.png", "held-out loss by position, every system")},
    )
