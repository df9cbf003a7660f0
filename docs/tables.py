"""Write the measured tables into the documentation: `python docs/tables.py`.

A table stands between `<!-- table: results/bench/FILE.json KEY -->` and `<!-- end -->`; it is made from that file alone. One
of `kvbind plan` stands between `<!-- plan: OPTIONS -->` and `<!-- end -->`; it is made from the library's formulas and its
calibration. The sizes of served requests stand behind `<!-- sizes: MEMORY GiB -->`, which systems are served behind
`<!-- served -->`, the presets of a family behind `<!-- presets: language|images|views -->`, and the README's table of speed
behind `<!-- speed -->`, likewise.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbind.bench.harness.record import answered
from kvbind.bench.tables.cuda_graphs import step_grid as replayed_grid
from kvbind.bench.tables.decoding import decoding_grid
from kvbind.bench.tables.grid import Grid
from kvbind.bench.tables.kernels import profile_grid, speed_grids
from kvbind.bench.tables.layers import layer_grid, step_grids
from kvbind.bench.tables.models import model_grids
from kvbind.bench.tables.peers import peer_grids, short_grid
from kvbind.bench.tables.scaling import scaling_grids
from kvbind.bench.tables.serving import served_grid, serving_grid, size_grid
from kvbind.bench.tables.verify import summary_grid, verify_grid
from kvbind.experiments.outcomes.claims import STATES
from kvbind.experiments.outcomes.text import as_grid, describe, quality_columns, row_names, speed_columns
from kvbind.experiments.report.rules import plain as plain_rule
from kvbind.experiments.report.table_contents import read_outcome
from kvbind.screen import duration

DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
"""Pages with tables that are made from results."""
PLAN = re.compile(r"(<!-- plan: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIZES = re.compile(r"(<!-- sizes: ([0-9]+) GiB -->\n).*?(<!-- end -->)", re.DOTALL)
PRESETS_OF = re.compile(r"(<!-- presets: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SERVED = re.compile(r"(<!-- served -->\n).*?(<!-- end -->)", re.DOTALL)
SPEED = re.compile(r"(<!-- speed -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(grid: Grid) -> str:
    """A table, and below it its note."""
    lines = [f"| {' | '.join(grid.header)} |", "|" + "---|" * grid.left + "---:|" * (len(grid.header) - grid.left)]
    lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    return "\n".join([f"{grid.title}:", "", *lines, *(["", f"{grid.note}."] if grid.note else [])])


def source(record: dict[str, Any], path: str) -> str:
    """Where a table's numbers come from."""
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "triton") if name in record["versions"])
    # the first records were written at the end alone
    whole = (
        "" if record.get("complete", True) else f" Stopped by its budget: {answered(record)} of {record['planned']} rows."
    )
    return f"`{record['command']}`, {record['machine']['device']}, {versions}{dated(record)}; data in `{path}`.{whole}"


def dated(record: dict[str, Any]) -> str:
    """On which day a record was begun, where it says so: what is older than a change does not show it."""
    return f", {record['time'][:10]}" if "time" in record else ""


def drawn(record: dict[str, Any], path: str) -> str:
    """What a picture is drawn from."""
    device = record["machine"]["device"]
    return f"*Drawn by `python docs/figures.py` from `{path}`: {device}{dated(record)}, `{record['command']}`.*"


def ceilings(record: dict[str, Any]) -> str:
    """The limits that a run measured, in a sentence."""
    found = record["ceilings"]
    return (
        f"Ceilings measured in the same run: {found['matmul_flops'] / 1e12:.0f} TFLOP/s in a {found['matmul_size']}^3 "
        f"product of {found['dtype']}, {found['copy_bytes'] / 1e12:.2f} TB/s in a copy."
    )


def pictures(record: dict[str, Any], path: str) -> str:
    """What `docs/figures.py` draws from a record of `kvbind bench kernels`."""
    titles = {"lengths": "the number of tokens", "chunks": "the chunk", "widths": "the width of a head"}
    shown = [f"![Speed by {title}](images/kernels-{part}.png)" for part, title in titles.items() if part in parts(record)]
    return "\n".join([*shown, drawn(record, path)])


def parts(record: dict[str, Any]) -> set[str]:
    """The parts of the benchmark that a record has rows of."""
    return {row["what"] for row in record["rows"]}


def table(path: str, key: str, root: Path) -> str:
    """The text of one block.

    Raises:
        ValueError: the file has no such table.
        OSError: there is no such file.
    """
    record = json.loads((root / path).read_text(encoding="utf-8"))
    if "experiment" in record:
        return f"{experiment(record, key, path)}\n\n{made_by(record, path)}"
    if key == "ceilings":
        return ceilings(record)
    if key == "pictures":
        return pictures(record, path)
    if key == "scaling-picture":
        picture = f"![Training speed by the number of GPUs](images/{Path(path).stem}.png)"
        return f"{picture}\n\n{drawn(record, path)}"
    if key == "views":
        return views_table(record, path)
    if any("against" in row for row in record["rows"]):
        found = agreement_grids(record)
    elif any("peer_name" in row for row in record["rows"]):
        found = model_grids(record)
    elif any("reread_seconds" in row for row in record["rows"]):
        found = [decoding_grid(record)]
    elif any("ratio_plain" in row for row in record["rows"]):
        found = [*peer_grids(record), short_grid(record)]
    elif any("on" in row for row in record["rows"]):
        found = [replayed_grid(record)]
    elif "load" in record["config"]:
        found = [serving_grid(record)]
    elif "fsdp_length" in record["config"]:
        found = scaling_grids(record)
    elif "steps" in record["config"]:
        found = step_grids(record)
    elif any("piece" in row for row in record["rows"]):
        found = [layer_grid(record)]
    elif "rules" in record:
        found = [verify_grid(record), summary_grid(record)]
    else:
        found = [profile_grid(record)] if "multiprocessors" in record else speed_grids(record)
    grids = {grid.key: grid for grid in found}
    if key not in grids:
        raise ValueError(f"{path} has no table {key!r}; it has {', '.join(grids)}")
    return f"{markdown(grids[key])}\n\n{source(record, path)}"


def agreement_grids(record: dict[str, Any]) -> list[Grid]:
    """What `tests/systems/agreement.py` found: "loops" beside others' code, and the library's "systems" beside the loops."""
    numbers = ("output", "state", "gradients")

    def cells(row: dict[str, Any]) -> list[str]:
        return ["-" if name not in row else "0" if not row[name] else f"{row[name]:.0e}" for name in numbers]

    rows = []
    for row in record["rows"]:
        if row["what"] == "loop":
            # a module's path says nothing that the package and the function do not
            short = ".".join(row["function"].split(".")[-2 if row["function"].count(".") == 1 else -1 :])
            rows.append((row["system"], f"{row['against']}: `{short}`", row.get("skipped", row["note"]), *cells(row)))
    title = "Largest relative differences between plain loops and public code, in float64"
    loops = Grid("loops", title, ("system", "public code", "note", *numbers), tuple(rows), left=3)

    by_form = {(row["system"], row["form"]): row for row in record["rows"] if row["what"] == "kvbind"}
    forms = list(dict.fromkeys(form for _, form in by_form))
    rows = []
    for system in dict.fromkeys(name for name, _ in by_form):
        found = [by_form[system, form] for form in forms]
        skipped = list(dict.fromkeys(row["skipped"] for row in found if "skipped" in row))
        shown = [" / ".join(cells(row)) if row["form"] != "linearize" else " / ".join(cells(row)[::2]) for row in found]
        rows.append((system, f"`{found[0]['function']}`", "; ".join(skipped), *shown))
    title = "Largest relative differences between the library and the loops: output / state / gradients"
    header = ("system", "function", "not run, as", *(f"`{form}`" for form in forms))
    return [loops, Grid("systems", title, header, tuple(rows), left=3)]


def views_table(record: dict[str, Any], path: str) -> str:
    """Both models of `kvbind bench views`, side by side; cells say where a model did not fit or was not tried."""
    found = {(row["model"], row["views"]): row for row in record["rows"]}
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "reading": ("read_seconds", duration),
        "frames/s": ("frames_per_second", lambda x: f"{x:.0f}"),
        "kept": ("scene_bytes", size),
        "peak, reading": ("read_bytes", size),
    }
    header = ["views", *(f"{title}: {model}" for title in columns for model in ("fast weights", "full attention"))]
    lines = []
    for views in sorted({row["views"] for row in record["rows"]}):
        line = [str(views)]
        for name, shown in columns.values():
            for model in ("LaCT", "full attention"):
                row = found.get((model, views))
                line.append("not run" if row is None else shown(row[name]) if row["fits"] else "does not fit")
        lines.append(line)
    made = f"`{record['command']}`, {record['machine']['device']}, torch {record['versions']['torch']}"
    made += f"{dated(record)}; data in `{path}`."
    return f"{plain(header, lines, left=0)}\n\n{made}"


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def experiment(record: dict[str, Any], key: str, path: str) -> str:
    """A table of an experiment's `results.json`: "rows" of a table of the paper, "verdicts", or "measured" steps.

    Raises:
        ValueError: another key.
    """
    if key == "verdicts":
        return verdicts(record["verdicts"])
    if key == "measured":
        return "\n\n".join(plain(x["header"], x["rows"]) for x in record["tables"])
    if key != "rows":
        raise ValueError(f"{path} has no table {key!r}; it has rows, verdicts, measured")
    outcome = read_outcome(record)
    header, rows = as_grid(row_names(outcome, outcome.labels), quality_columns(outcome) + speed_columns(outcome))
    return f"{plain(header, rows)}\n\n{describe(outcome)}"


def verdicts(found: Sequence[dict[str, Any]]) -> str:
    """Claims and what was found, and below them each rule once."""
    rules = list(dict.fromkeys(x["rule"] for x in found))
    rows = [(x["claim"], f"**{STATES[x['holds']]}**", x["found"], str(rules.index(x["rule"]) + 1)) for x in found]
    said = "\n".join(f"{number}. {plain_rule(rule)}." for number, rule in enumerate(rules, start=1))
    return f"{plain(('claim', 'verdict', 'found', 'rule'), rows, left=4)}\n\nA claim holds if:\n\n{said}"


def plain(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table without a title; line breaks in its header become spaces."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ').strip() for cell in line)} |" for line in lines)


def made_by(record: dict[str, Any], path: str) -> str:
    """Where an experiment's numbers come from."""
    device, torch = record["machine"]["device"], record["versions"]["torch"]
    return f"`{record['command']}`, {duration(record['wall_seconds'])} on {device}, torch {torch}; data in `{path}`."


def plan_table(words: str) -> str:
    """The best option for each number of GPUs, and the command that prints it.

    Args:
        words: options of `kvbind plan`, such as "--gpus 1,8 --budget 15e9 model.inner.update=last"; or "calibration", for a
            sentence on what all plans are calibrated with.
    """
    from kvbind.plan.calibration import load_calibration
    from kvbind.plan.command import make_plans
    from kvbind.plan.report import PARTS_HEADER, parts_cells

    if words == "calibration":
        found = load_calibration()
        files = ", ".join(f"`results/bench/{name}`" for name in dict.fromkeys(point.source for point in found.points))
        return f"Calibrated with {files}: {found.summary()}."
    options: dict[str, Any] = {}
    overrides, rest = [], iter(shlex.split(words))
    for word in rest:
        if word.startswith("--"):
            value = next(rest)
            number = {"tokens": int, "batch": int, "budget": float, "price": float}.get(word[2:], str)
            options[word[2:]] = number(value)
        else:
            overrides.append(word)
    made = make_plans(options.pop("preset", "760m"), options.pop("gpus"), overrides, **options)
    rows = tuple(parts_cells(plan.options[0], made.budget) for plan in made.plans)
    notes = list(dict.fromkeys(note for plan in made.plans for note in plan.warnings))
    note = "Notes: " + "; ".join(notes) if notes else ""
    grid = Grid("plan", made.title, PARTS_HEADER, rows, left=0, note=note)
    return f"{markdown(grid)}\n\n`kvbind plan {words}`"


def presets_table(family: str, root: Path) -> str:
    """The presets of a family, with what was measured of them on a GPU."""
    import torch
    from torch import nn

    from kvbind.models import PRESETS, LactConfig, LactForCausalLM, lact_nvs, vittt

    makers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "language": {
            name: (
                f"{fields['num_hidden_layers']} x {fields['hidden_size']}, chunks of {fields['inner'].chunk}",
                lambda fields=fields: LactForCausalLM(LactConfig(**fields)),
            )
            for name, fields in PRESETS.items()
        },
        "images": {
            name: (
                f"{fields['depth']} x {fields['embed_dim']}"
                if "depth" in fields
                else f"{'+'.join(map(str, fields['depths']))} layers of {', '.join(map(str, fields['dim']))}",
                lambda name=name: vittt.build(name, num_classes=1000),
            )
            for name, fields in vittt.SIZES.items()
        },
        "views": {
            name: (f"{config.layers} x {config.dim}", lambda config=config: lact_nvs.LactNvs(config))
            for name, config in lact_nvs.PRESETS.items()
        },
    }[family]
    measured = {
        row["name"]: row for row in json.loads((root / "results/bench/models-h200.json").read_text(encoding="utf-8"))["rows"]
    }
    lines = []
    for name, (size, make) in makers.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in make().parameters())
        row = measured.get({"vittt_base": "vittt-b-training"}.get(name, f"lact-{name}-rung0"))
        speed = f"{row['ours']:,.0f} {row['unit']}" if row else "-"
        memory = f"{row['peak_bytes'] / 2**30:.0f} GiB" if row else "-"
        lines.append([f"`{name}`", size, f"{parameters / 1e6:,.1f}M", speed, memory])
    return plain(["preset", "layers x width", "parameters", "training, H200", "memory"], lines, left=2)


def speed_table(root: Path) -> str:
    """Whole models beside a transformer, and the operator beside the released code's way, on one GPU."""
    models, peers = (json.loads((root / f"results/bench/{name}-h200.json").read_text(encoding="utf-8")) for name in
                     ("models", "peers"))  # fmt: skip
    whole = {row["name"]: row for row in models["rows"]}
    calls = {(row["name"], row["pass"]): row for row in peers["rows"]}
    lines = []
    for name, what in {
        "lact-760m-rung0": "train 760M, full system",
        "lact-760m-rung2": "train 760M, rung 2",
        "lact-760m-rung6": "train 760M, linear attention (rung 6)",
        "decode-760m-batch1-ms": "one more token after 32k, rung 2",
        "decode-760m-batch64": "64 sequences after 2k tokens, rung 2",
    }.items():
        row = whole[name]
        ours, peer = (
            f"{row[x]:.2f} ms" if row["unit"] == "ms" else f"{row[x]:,.0f} {row['unit']}" for x in ("ours", "peer")
        )
        lines.append([what, ours, peer, "Llama of that size", f"{row['ratio']:.2f}"])
    for name, what in {"rung0": "full system", "rung2": "rung 2"}.items():
        row = calls[name, "training"]
        ours, peer = (f"{row[f'{x}_plain']:.3g}M tokens/s" for x in ("ours", "peer"))
        other = "the released code's loop, compiled" if name == "rung0" else "plain PyTorch, compiled"
        lines.append([f"the operator with backward, {what}", ours, peer, other, f"{row['ratio_plain']:.2f}"])
    return plain(["", "kvbind", "beside it", "what that is", "x"], lines)


def fill(text: str, root: Path) -> str:
    """A page with every block made anew."""
    text = PLAN.sub(lambda block: f"{block[1]}{plan_table(block[2])}\n{block[3]}", text)
    text = SIZES.sub(lambda block: f"{block[1]}{markdown(size_grid(int(block[2]) << 30))}\n{block[3]}", text)
    text = PRESETS_OF.sub(lambda block: f"{block[1]}{presets_table(block[2], root)}\n{block[3]}", text)
    text = SERVED.sub(lambda block: f"{block[1]}{markdown(served_grid())}\n{block[2]}", text)
    text = SPEED.sub(lambda block: f"{block[1]}{speed_table(root)}\n{block[2]}", text)
    return BLOCK.sub(lambda block: f"{block[1]}{table(block[2], block[3], root)}\n{block[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        if (new := fill(old, DOCS.parent)) != old:
            page.write_text(new, encoding="utf-8")
