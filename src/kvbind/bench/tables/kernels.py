"""The tables of `kvbind bench kernels` and `kvbind bench verify`, as texts: for a terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvbind.bench.harness.profiler import short
from kvbind.bench.kernels.cases import BY, PASSES, WHATS
from kvbind.bench.kernels.goals import FIRST_CALL_SECONDS, TRAINING_BYTES
from kvbind.bench.tables.grid import Grid, Row


def speed_grids(record: Mapping[str, Any]) -> list[Grid]:
    """The tables of a record of `kvbind bench kernels`, of the parts that it has rows of."""
    config, found = record["config"], []
    at = f"{config['dtype']}, batch {config['batch']}, {config['heads']} heads x {config['width']}, T = {config['tokens']}"
    for what in WHATS:
        rows = [row for row in record["rows"] if row["what"] == what]
        if not rows:
            continue
        if what == "first":
            found.append(_first_grid(rows))
            continue
        if what == "targets":
            rows.sort(
                key=lambda row: (row["by"] == "sdpa", row["name"], row["form"] != "recurrent", list(BY).index(row["by"]))
            )
        titles = {
            "targets": f"Every rung; {at}, chunk {config['chunk']}",
            "token": f"Token visibility; {config['dtype']}, T = {config['tokens']}",
            "lengths": f"By number of tokens; chunk {config['chunk']}, {config['heads']} heads x {config['width']}",
            "chunks": f"By chunk; {at}",
            "widths": f"By width; T = {config['tokens']}, chunk {config['chunk']}",
            "compiled": f"PyTorch's forms under torch.compile; {at}, chunk {config['chunk']}",
        }
        found.append(_speed_grid(what, titles[what], rows))
    return found


def _speed_grid(what: str, title: str, rows: Sequence[Row]) -> Grid:
    varies = {
        "targets": ("form", lambda row: row["form"] if row["by"] != "sdpa" else _heads(row)),
        "token": ("heads", _heads),
        "lengths": ("tokens", lambda row: f"{row['tokens']}"),
        "chunks": ("chunk", lambda row: f"{row['chunk']}"),
        "widths": ("heads", _heads),
        "compiled": ("form", lambda row: row["form"]),
    }
    place, cell = varies[what]
    graphs = any((row.get(name) or {}).get("graph_mtok_per_s") for row in rows for name in PASSES)
    goals = any((row.get(name) or {}).get("of_goal") for row in rows for name in PASSES)
    columns = ["Mtok/s", *(["graph"] if graphs else []), *(["/ goal"] if goals else []), "of limit"]
    header = (_called(what), place, "by", *(f"{name} {x}" for name in ("fwd", "f+b") for x in columns), "TFLOP/s", "GiB")
    lines = []
    for row in rows:
        line = [_name(row), cell(row), _by(row)]
        for name in PASSES:
            timed = row.get(name)
            if timed is None:
                line += ["-"] * len(columns)
                continue
            line.append(_number(timed["mtok_per_s"]))
            if graphs:
                line.append(_number(timed["graph_mtok_per_s"]))
            if goals:
                line.append("-" if timed["of_goal"] is None else f"{timed['of_goal']:.2f}")
            line.append(f"{timed['of_limit']:.0%}")
        forward, training = row.get("forward"), row.get("training")
        line.append("-" if forward is None else f"{forward['tflop_per_s']:.0f}")
        line.append("-" if training is None else f"{(training['peak_bytes'] + row['operand_bytes']) / 2**30:.2f}")
        lines.append(tuple(line))
    return Grid(what, title, header, tuple(lines), left=3, note=_note(rows))


def _note(rows: Sequence[Row]) -> str:
    said = [
        "fwd: forward without gradients; f+b: forward and backward, gradients of every operand; Mtok/s: of plain calls; "
        "graph: of replays of a CUDA graph; of limit: of plain calls; TFLOP/s: of the forward pass; GiB: the most held in "
        "f+b, operands included"
    ]
    for row in rows:
        if row["name"] == "rung2" and row["by"] == "kvbind" and (row["name"], row["form"]) in TRAINING_BYTES:
            peer, goal = (x / 2**30 for x in TRAINING_BYTES[row["name"], row["form"]])
            if (row.get("forward") or {}).get("goal_mtok_per_s"):
                said.append(f"rung 2 parallel f+b, memory: goal {goal:.1f} GiB, peer {peer:.1f} GiB")
    said += dict.fromkeys(
        f"softmax attention: {row['heads']} heads x {row['width']}, as the backend does not take {row['refused_widths'][0]}"
        for row in rows
        if row.get("refused_widths")
    )
    reasons = {str((row.get(name) or {}).get("not_capturable")) for row in rows for name in PASSES}
    said += [f"no graph: {reason}" for reason in sorted(reasons - {"None", "not tried", "not on a GPU"})]
    return ". ".join([*said, *_failures(rows)])


def _failures(rows: Sequence[Row]) -> list[str]:
    """What kept rows from being measured, each reason once."""
    failed: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("error"):
            failed.setdefault((BY[row["by"]], row["error"]), []).append(row)
    return [
        f"{by}: {error} ({'; '.join(dict.fromkeys(_place(row) for row in found))})" for (by, error), found in failed.items()
    ]


def _first_grid(rows: Sequence[Row]) -> Grid:
    header = ("rung", "form", "cache", "first call s", "goal s", "the next s", "first at other lengths s")
    lines = []
    for row in rows:
        for state in ("cold", "warm"):
            if state not in row:
                continue
            seen = row[state]
            others = ", ".join(f"{x:.2f}" for x in seen["new_length_seconds"].values())
            lines.append(
                (
                    row["name"].replace("rung", "rung "),
                    row["form"],
                    state,
                    f"{seen['first_seconds']:.2f}",
                    f"{FIRST_CALL_SECONDS[state]:.0f}",
                    f"{seen['again_seconds']:.3f}",
                    others,
                )
            )
    note = "forward and backward, import and compilation of kernels included, in a fresh process with PyTorch started"
    return Grid("first", "First calls", header, tuple(lines), left=3, note=". ".join([note, *_failures(rows)]))


LEAST_SHARE = 0.05
"""The share of a call's time on the device from which a kernel is listed."""


def profile_grid(record: Mapping[str, Any]) -> Grid:
    """The table of a record of `kvbind bench kernels --profile`: where each call's time on the device goes."""
    header = ("rung", "form", "pass", "kernel", "launches", "ms", "share", "blocks", "registers", "KiB shared")
    lines = []
    for row in record["rows"]:
        called = (_name(row), row["form"], "fwd" if row["pass"] == PASSES[0] else "f+b")
        lines.append((*called, "all", f"{row['launches']:.0f}", f"{row['device_ms']:.3f}", "100%", "-", "-", "-"))
        for kernel in row["kernels"]:
            if kernel["share"] < LEAST_SHARE:
                continue
            registers, shared = kernel["registers"], kernel["shared_bytes"]
            lines.append(
                (
                    *called,
                    short(kernel["name"]).strip("_"),
                    f"{kernel['launches']:.0f}",
                    f"{kernel['ms']:.3f}",
                    f"{kernel['share']:.0%}",
                    f"{kernel['programs']}",
                    "-" if registers is None else f"{registers}",
                    "-" if shared is None else f"{shared / 1024:.0f}",
                )
            )
    config = record["config"]
    at = f"{config['dtype']}, batch {config['batch']}, {config['heads']} heads x {config['width']}, T = {config['tokens']}"
    note = (
        f"ms: per call, summed over launches; blocks: of the largest launch (multiprocessors: {record['multiprocessors']}); "
        f"registers: per thread; kernels of at least {LEAST_SHARE:.0%}"
    )
    return Grid("profile", f"Time on the device; {at}, chunk {config['chunk']}", header, tuple(lines), left=4, note=note)


def _called(what: str) -> str:
    return "system" if what == "token" else "rung"


def _place(row: Row) -> str:
    return f"{row['name']} {row['form']}, {_heads(row)}, T = {row['tokens']}, chunk {row['chunk']}"


def _name(row: Row) -> str:
    return "-" if row["by"] == "sdpa" else row["name"].replace("_attention", "").replace("rung", "rung ")


def _by(row: Row) -> str:
    if row["by"] == "kvbind" and not row.get("operators"):
        return "no kernel"
    return BY[row["by"]]


def _heads(row: Row) -> str:
    return f"{row['heads']} x {row['width']}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"
