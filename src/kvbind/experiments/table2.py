"""Table 2: the ladder from LaCT down to standard linear attention, and Table 1's two controls.

Every row is the same model, trained from scratch on the same data in the same order from the same seed; only the inner loop
differs. Each is evaluated on text that it has not seen, and its inner loop is timed in both forms.
"""

from __future__ import annotations

import html
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kvbind.bench.forms import tokens_per_second
from kvbind.bench.operands import Size
from kvbind.experiments import figures, report
from kvbind.experiments.paper import PUBLISHED, Published
from kvbind.experiments.provenance import command, machine, versions
from kvbind.experiments.runs import Run, discard, run_name
from kvbind.experiments.workers import Job, default_workers, train_all
from kvbind.forms.analysis import explain
from kvbind.forms.api import Form
from kvbind.inner import InnerLoop
from kvbind.inner.systems import RUNGS, ladder
from kvbind.inner.value import check_positive_int, nearest
from kvbind.tasks import language
from kvbind.train.checkpoint import write_text
from kvbind.train.config import config_hash, read_config, to_plain, to_yaml
from kvbind.train.loop import pick_device


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    Attributes:
        preset: of the task.
        overrides: edits of it.
        about: for people.
    """

    preset: str
    overrides: tuple[str, ...]
    about: str


SCALES = {
    "smoke": Scale("tiny", ("train.steps=180", "train.warmup=18"), "minutes on two CPU cores"),
    "small": Scale("30m", (), "minutes per row on one GPU"),
    "paper": Scale("760m", (), "the paper's own size: 760M parameters, 21 billion tokens per row"),
}

LABELS = {
    "rung0": "the full system",
    "rung1": "last layer alone updated",
    "rung2": "no weight normalization",
    "rung3": "one linear layer",
    "rung4": "no per-token rate",
    "rung5": "no momentum",
    "rung6": "no orthogonalization",
    "ascent": "gradient ascent",
    "key_for_query": "key for query",
}
"""What each row changes: each rung keeps the changes above it, and the last two change the full system."""

JOINED = len(RUNGS)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: of the variant.
        label: what it changes.
        inner: its inner loop.
        paper: what the paper has for it.
        runs: one finished training run per seed.
        recurrent: tokens per second, forward and backward, of the inner loop's recurrent form.
        parallel: those of its parallel form; None where there is none.
    """

    name: str
    label: str
    inner: InnerLoop
    paper: Published
    runs: tuple[Run, ...]
    recurrent: float
    parallel: float | None

    def values(self, metric: str) -> list[float]:
        """A held-out metric, seed by seed."""
        return [run.result["held_out"][metric] for run in self.runs]

    def mean(self, metric: str) -> float:
        """A held-out metric, averaged over seeds."""
        return statistics.fmean(self.values(metric))

    def spread(self, metric: str) -> float | None:
        """Its standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values(metric)) if len(self.runs) > 1 else None


def variants(system: InnerLoop) -> dict[str, InnerLoop]:
    """The inner loops that the table compares, by the names of `LABELS`."""
    return ladder(system) | {"ascent": system.replace(direction="ascent"), "key_for_query": system.replace(query="key")}


def configuration(scale: str, seed: int, inner: InnerLoop | None, overrides: Sequence[str] = ()) -> language.LanguageConfig:
    """The training run of one row; `inner=None` leaves the scale's own system.

    Raises:
        ValueError: an edit that does not fit, or one of the seed.
    """
    if any(edit.startswith("seed=") for edit in overrides):
        raise ValueError("overrides must not set seed: seeds says how many there are, counted from 0")
    chosen = SCALES[scale]
    config = read_config(language.LanguageConfig, language.PRESETS, chosen.preset, [*chosen.overrides, *overrides])
    config.seed = seed
    if inner is not None:
        config.model.inner = inner.to_dict()
    return language.resolve(config)


def reproduce(
    *,
    task: str = "language",
    scale: str = "smoke",
    seeds: int = 1,
    out: Path | None = None,
    fresh: bool = False,
    data: str | None = None,
    workers: int | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, evaluate and time every row, then write the report.

    Finished rows are kept and an unfinished one goes on from its last checkpoint, so that the same call continues what was
    interrupted.

    Args:
        task: "language".
        scale: one of `SCALES`.
        seeds: how many, counted from 0.
        out: the report's folder, whose `trained/` holds the training runs; default `runs/table2-TASK-SCALE`, with the
            runs in `runs/trained`, where other experiments find them.
        fresh: train everything anew.
        data: another source of text.
        workers: rows trained at once, each in a process of one thread; 1 for in this process, one after another. Default:
            one for each CPU core up to `kvbind.experiments.workers.MOST_WORKERS`, and 1 on a GPU.
        overrides: further `key=value` edits of every row's configuration.
        console: where progress and the table are shown; None for nowhere.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: an unknown task or scale, or an edit that does not fit.
    """
    if task != "language":
        raise ValueError(f"task must be 'language'; got {task!r}{nearest(task, ['language'])}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}; got {scale!r}{nearest(scale, SCALES)}")
    for name, value in (("seeds", seeds), ("workers", 1 if workers is None else workers)):
        check_positive_int(name, value)
    started = time.monotonic()
    trained = out / "trained" if out else Path("runs/trained")
    out = out or Path(f"runs/table2-{task}-{scale}")
    edits = [*overrides, *([f"data.source={json.dumps(data)}"] if data else [])]

    base = configuration(scale, 0, None, edits)
    device = pick_device(base.train.device)
    rows = variants(language.inner_loop(base.model))
    if console:
        console.print(
            f"[bold]Table 2, {task}, scale {scale}[/]: {len(rows)} rows x {seeds} seed(s) on {device}; report in {out}"
        )
        console.print(to_yaml(base), style="dim", highlight=False, markup=False, soft_wrap=True)

    jobs = []
    for seed in range(seeds):
        for number, (name, inner) in enumerate(rows.items(), start=1):
            config = configuration(scale, seed, inner, edits)
            folder = trained / run_name(task, config)
            if fresh:
                discard(folder)
            title = f"{number}/{len(rows)} {name}" + (f" seed {seed}" if seeds > 1 else "")
            jobs.append(Job(task, config, folder, title))

    def finished(job: Job, run: Run) -> None:
        if console:
            note = "finished earlier" if run.reused else f"{run.result['training_seconds']:.0f} s"
            console.print(f"{job.title:<18} perplexity {run.result['held_out']['perplexity']:.3f}, {note}", soft_wrap=True)

    runs = train_all(jobs, workers or default_workers(device), console, finished)
    by_row = {name: tuple(runs[i :: len(rows)]) for i, name in enumerate(rows)}

    fast_heads = base.model.fields["num_lact_heads"]
    shape = Size(base.data.batch, base.data.length, fast_heads, base.model.fields["hidden_size"] // fast_heads)
    out.mkdir(parents=True, exist_ok=True)
    speeds = throughputs(out / "throughput.json", rows, shape, device, fresh)
    table = [Row(name, LABELS[name], inner, PUBLISHED[name], by_row[name], **speeds[name]) for name, inner in rows.items()]

    results = {
        "experiment": "table2",
        "task": task,
        "scale": scale,
        "seeds": list(range(seeds)),
        "command": command(),
        "wall_seconds": round(time.monotonic() - started, 1),
        "training_seconds": round(sum(run.result["training_seconds"] for run in runs), 1),
        "versions": versions(),
        "machine": machine(device),
        "text": runs[0].result["text"],
        "config": to_plain(base),
        "throughput_shape": vars(shape),
        "rows": [as_data(row, trained) for row in table],
    }
    write_report(out, results, table, to_yaml(base))
    if console:
        for part in rich_tables(table, results):
            console.print(part)
        console.print(describe(results))
        console.print(f"{results['wall_seconds']:.0f} s. Everything is in {out}; start with {out / 'index.html'}")
    return results


def throughputs(
    path: Path, inners: dict[str, InnerLoop], shape: Size, device: torch.device, fresh: bool
) -> dict[str, dict[str, Any]]:
    """Tokens per second of each inner loop in both forms; None for a form that it does not have.

    Kept in `path`, so that a continued command does not measure twice.
    """
    key = config_hash([{name: inner.to_dict() for name, inner in inners.items()}, vars(shape), machine(device), versions()])
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not fresh else {}
    if kept.get("key") != key:
        forms: tuple[Form, ...] = ("recurrent", "parallel")
        cases = [(name, form) for form in forms for name in inners if form == "recurrent" or explain(inners[name]).parallel]
        measured = tokens_per_second([(inners[name], form) for name, form in cases], shape, device)
        speeds: dict[str, dict[str, Any]] = {name: dict.fromkeys(forms) for name in inners}
        for (name, form), speed in zip(cases, measured, strict=True):
            speeds[name][form] = speed
        kept = {"key": key, "tokens_per_second": speeds}
        report.write_json(path, kept)
    found: dict[str, dict[str, Any]] = kept["tokens_per_second"]
    return found


def as_data(row: Row, trained: Path) -> dict[str, Any]:
    """A row as `results.json` holds it."""
    paper, home = row.paper, trained.parent
    return {
        "name": row.name,
        "label": row.label,
        "perplexity": row.mean("perplexity"),
        "perplexity_std": row.spread("perplexity"),
        "bits_per_byte": row.mean("bits_per_byte"),
        "untrained_perplexity": statistics.fmean(run.result["untrained"]["perplexity"] for run in row.runs),
        "recurrent_tokens_per_second": row.recurrent,
        "parallel_tokens_per_second": row.parallel,
        "paper": {"perplexity": paper.language, "recurrent_mtok": paper.recurrent, "parallel_mtok": paper.parallel},
        "inner": row.inner.to_dict(),
        "runs": [
            {"seed": seed, "folder": run.folder.relative_to(home).as_posix(), **run.result}
            for seed, run in enumerate(row.runs)
        ],
    }


HEADER = (
    "", "ppl\nhere", "bits/byte\nhere", "change\nhere", "ppl\npaper", "change\npaper",
    "recurrent\nhere", "parallel\nhere", "recurrent\npaper", "parallel\npaper",
)  # fmt: skip
"""Changes are of perplexity, against the full system; throughputs are in millions of tokens per second."""


NONE = "\N{EN DASH}"
"""In a cell without a number."""


def cells(table: Sequence[Row]) -> list[list[str]]:
    """The table's texts, one list per row."""
    full, published = table[0].mean("perplexity"), table[0].paper.language

    def number(x: float | None, pattern: str = ".2f") -> str:
        return NONE if x is None else f"{x:{pattern}}"

    def change(x: float | None, reference: float | None) -> str:
        # the full system against itself is no change worth a number
        if x is None or reference is None or x == reference:
            return NONE
        return f"{100 * (x / reference - 1):+.1f}%"

    lines = []
    for i, row in enumerate(table):
        spread = row.spread("perplexity")
        ours = row.mean("perplexity")
        lines.append(
            [
                f"{i}  {row.label}" if i < JOINED else f"   {row.label}",
                number(ours, ".3f") + (f" ± {spread:.3f}" if spread is not None else ""),
                number(row.mean("bits_per_byte"), ".3f"),
                change(ours, full),
                number(row.paper.language),
                change(row.paper.language, published),
                number(row.recurrent / 1e6, ".3f"),
                number(row.parallel and row.parallel / 1e6, ".3f"),
                number(row.paper.recurrent),
                number(row.paper.parallel),
            ]
        )
    return lines


def describe(results: dict[str, Any]) -> str:
    """One line on what was run, out of the results themselves."""
    run, shape = results["rows"][0]["runs"][0], results["throughput_shape"]
    return (
        f"{run['parameters'] / 1e6:.2f}M parameters, {run['tokens'] / 1e6:.2f}M training tokens per row, "
        f"{run['held_out']['tokens']:,} held-out tokens, {len(results['seeds'])} seed(s). Before training, perplexity (ppl) "
        f"is {results['rows'][0]['untrained_perplexity']:.0f}. Each rung keeps the changes above it; rung {JOINED - 1} is "
        "standard linear attention. The rows below the ladder change the full system. Change is of perplexity against the "
        "full system. Throughput is forward and backward of the inner loop alone, in millions of tokens per second, at "
        f"{shape['batch']} x {shape['tokens']} tokens, {shape['heads']} heads of {shape['width']}, on "
        f"{results['machine']['device']}."
    )


def rich_tables(table: Sequence[Row], results: dict[str, Any]) -> Iterator[Table]:
    """The table for a terminal of 80 columns: perplexity, then throughput."""
    title = f"Table 2, {results['task']}, scale {results['scale']}"
    parts = {
        f"{title}: perplexity on held-out text": slice(1, 6),
        f"{title}: training of the inner loop, million tokens/s": slice(6, 10),
    }
    for heading, columns in parts.items():
        shown = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        shown.add_column("")
        for name in HEADER[columns]:
            shown.add_column(name, justify="right", no_wrap=True)
        for i, line in enumerate(cells(table)):
            shown.add_row(line[0], *line[columns], end_section=i == JOINED - 1)
        yield shown


def as_csv(data: dict[str, Any]) -> dict[str, Any]:
    """A row of `results.json` as `results.csv` holds it: numbers alone."""
    flat = {name: value for name, value in data.items() if name not in ("paper", "inner", "runs")}
    flat["training_seconds"] = sum(run["training_seconds"] for run in data["runs"])
    return flat | {f"paper_{name}": value for name, value in data["paper"].items()}


def write_report(out: Path, results: dict[str, Any], table: Sequence[Row], config: str) -> None:
    """JSON, CSV, pictures, and the page."""
    title = f"Table 2: {results['task']}, scale {results['scale']}"
    about = describe(results)
    report.write_json(out / "results.json", results)
    report.write_csv(out / "results.csv", [as_csv(data) for data in results["rows"]])
    write_text(out / "config.yaml", config)

    figures.table_image(out / "table.png", HEADER, cells(table), title=title, note=about)
    ladder_figure(out / "ladder.png", table, results)
    throughput_figure(out / "throughput.png", table, results)
    names = {row.name: f"{i}  {row.label}" if i < JOINED else row.label for i, row in enumerate(table)}
    figures.curves(
        out / "loss.png",
        {names[row.name]: figures.smoothed(row.runs[0].losses(), 0.95) for row in table},
        title="Training loss, smoothed", x="step", y="nats per token", rungs=JOINED,
    )  # fmt: skip
    figures.curves(
        out / "positions.png",
        {names[row.name]: figures.pooled(row.runs[0].result["held_out"]["loss_by_position"], 16) for row in table},
        title="Held-out loss by position", x="position in the sequence", y="nats per token", rungs=JOINED,
    )  # fmt: skip
    pictures = {
        "The ladder": ("ladder.png", "perplexity by rung, in the paper and here"),
        "Throughput": ("throughput.png", "throughput by rung, recurrent and parallel"),
        "Training": ("loss.png", "training loss by step"),
        "Positions": ("positions.png", "held-out loss by position"),
    }
    report.write_page(
        out / "index.html",
        title,
        about,
        {"Table": report.html_table(HEADER, cells(table))}
        | {heading: report.html_image(out / file, text) for heading, (file, text) in pictures.items()}
        | {
            "How it was made": f"<pre>{html.escape(results['command'])}</pre>"
            + report.html_details("configuration", config)
            + report.html_details("versions and machine", json.dumps([results["versions"], results["machine"]], indent=2))
            + report.html_details("inner loops", "\n".join(f"{row.name}: {row.inner!r}" for row in table)),
        },
    )


def ladder_figure(path: Path, table: Sequence[Row], results: dict[str, Any]) -> None:
    """Perplexity by rung, the paper's and ours side by side."""
    labels = [f"{row.label}  {i}" if i < JOINED else row.label for i, row in enumerate(table)]
    spread = [row.spread("perplexity") or 0.0 for row in table]
    parameters = results["rows"][0]["runs"][0]["parameters"]
    with figures.figure(path, 9.2, 4.0) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        figures.rung_dots(
            left,
            labels,
            [row.paper.language for row in table],
            title="Paper: perplexity at 760M",
            colour=figures.MUTED,
            joined=JOINED,
        )
        figures.rung_dots(
            right, labels, [row.mean("perplexity") for row in table], title=f"Here: perplexity at {parameters / 1e6:.2g}M",
            colour=figures.BLUE, joined=JOINED, spread=spread if any(spread) else None,
        )  # fmt: skip
        for ax in (left, right):
            ax.axhline(JOINED - 0.5, color=figures.GRID, linewidth=1.0)
            ax.set_xlabel("lower is better")


def throughput_figure(path: Path, table: Sequence[Row], results: dict[str, Any]) -> None:
    """Throughput by rung, the paper's and ours side by side."""
    rungs = table[:JOINED]
    with figures.figure(path, 9.2, 3.6) as fig:
        left, right = fig.subplots(1, 2, sharey=True)
        sides = (
            (left, "Paper", [row.paper.recurrent for row in rungs], [row.paper.parallel for row in rungs]),
            (right, "Here", [row.recurrent / 1e6 for row in rungs], [row.parallel and row.parallel / 1e6 for row in rungs]),
        )
        for ax, title, recurrent, parallel in sides:
            for shift, colour, label, values in (
                (-0.18, figures.ORANGE, "recurrent", recurrent),
                (0.18, figures.BLUE, "parallel", parallel),
            ):
                there = [(i + shift, x) for i, x in enumerate(values) if x is not None]
                ax.barh([i for i, _ in there], [x for _, x in there], height=0.34, color=colour, label=label)
            figures.log_axis(ax)
            ax.set_yticks(range(JOINED), [f"{row.label}  {i}" for i, row in enumerate(rungs)])
            ax.set_ylim(JOINED - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.set_title(title)
            ax.set_xlabel("million tokens per second")
        right.legend(loc="upper right")
