"""Draw the pictures of the documentation: `python docs/figures.py`."""

import json
from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.ticker import FormatStrFormatter, LogLocator

import kvbind
from kvbind import InnerLoop, Linear
from kvbind.bench.tables.decoding import decoding_rows
from kvbind.experiments.plotting import BLUE, GREEN, ORANGE, RED, figure, write_png
from kvbind.hardware import ACCELERATORS

DOCS = Path(__file__).parent
IMAGES, RESULTS = DOCS / "images", DOCS.parent / "results"


def visibility() -> None:
    """The token-mixing matrix of one linear fast layer under each visibility."""
    torch.manual_seed(0)
    tokens, chunk, width = 24, 6, 16
    q, k = (F.normalize(torch.rand(1, tokens, 1, width), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, 1, width)
    with figure(IMAGES / "visibility.png", 11, 3.1) as drawing:
        axes = drawing.subplots(1, 4)
        for ax, name in zip(axes, ("past", "token", "chunk", "full"), strict=True):
            spec = InnerLoop(network=Linear(), visibility=name, chunk=None if name == "full" else chunk)
            weights = {"out": torch.zeros(1, width, width)}
            matrix = kvbind.linearize(spec, weights, q, k, v).matrix()[0, 0]
            ax.imshow(matrix.where(matrix != 0, torch.nan), cmap="viridis", vmin=0, vmax=1)
            ax.grid(visible=False)
            for side in ax.spines.values():
                side.set_visible(True)
            for edge in range(chunk, tokens, chunk):
                ax.axhline(edge - 0.5, color="0.6", linewidth=0.5)
                ax.axvline(edge - 0.5, color="0.6", linewidth=0.5)
            ax.set(title=name, xlabel="token that wrote", xticks=[], yticks=[])
        axes[0].set_ylabel("token that reads")


def training_losses(name: str) -> torch.Tensor:
    """The training loss of every step of a run of the 30m preset."""
    return torch.tensor(json.loads((RESULTS / "language-30m" / "run.json").read_text())["losses"][name])


def smooth(x: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """The mean over the last few steps."""
    return torch.stack([x[max(0, i - steps + 1) : i + 1].mean() for i in range(len(x))])


def kernels_training() -> None:
    """Training on kernels against training on PyTorch, beside the spread of runs that should be the same."""
    kernels, pytorch, other = (training_losses(name) for name in ("rung2", "rung2-pytorch", "rung2-seed1"))
    once, again = training_losses("rung0"), training_losses("rung0-again")
    with figure(IMAGES / "kernels-training.png", 9, 3.4) as drawing:
        left, right = drawing.subplots(1, 2)
        for loss, colour, label in (
            (other, "0.7", "kernels, another seed"),
            (pytorch, ORANGE, "PyTorch"),
            (kernels, BLUE, "kernels"),
        ):
            left.plot(range(1, len(loss) + 1), smooth(loss), color=colour, label=label, linewidth=1.4)
        left.set(title="rung 2, 30m", xlabel="step", ylabel="training loss, mean of 10 steps", ylim=(1.3, 3.5))
        left.legend()
        for first, second, colour, label in (
            (once, again, "0.7", "rung 0 on kernels, the same run twice"),
            (kernels, pytorch, BLUE, "rung 2, kernels and PyTorch"),
        ):
            shared = min(len(first), len(second))
            apart = smooth((first[:shared] - second[:shared]).abs())
            right.plot(range(1, shared + 1), apart, color=colour, label=label, linewidth=1.4)
        right.set(title="how far two runs from one seed are apart", xlabel="step", ylabel="|difference|, mean of 10 steps")
        right.legend()


def decoding() -> None:
    """Time of one more token by the length of the prompt."""
    with figure(IMAGES / "decoding.png", 9, 3.2) as drawing:
        axes = drawing.subplots(1, 3)
        sources = {"tiny, 2 CPU cores": "decode-cpu", "125m, H100": "decode-125m-h100", "760m, H200": "decode-760m-h200"}
        for ax, (title, name) in zip(axes, sources.items(), strict=True):
            rows = decoding_rows(json.loads((RESULTS / "bench" / f"{name}.json").read_text()))
            prompts = [row["prompt"] for row in rows]
            ax.plot(prompts, [row["p50_ms"] for row in rows], "o-", color=BLUE, label="with the cache")
            ax.plot(prompts, [1e3 * row["reread_seconds"] for row in rows], "s--", color=ORANGE, label="prompt read again")
            ax.set(title=title, xscale="log", yscale="log", xlabel="tokens in the prompt")
        axes[0].set_ylabel("ms per token")
        axes[0].legend()


def growth() -> None:
    """How what two evaluations of one inner loop differ by grows with the length of the sequence."""
    record = json.loads((RESULTS / "bench" / "growth-cpu.json").read_text())
    chunk, rows = record["config"]["chunk"], {(x["rung"], x["evaluation"]): x["errors"] for x in record["rows"]}
    lines = {
        "float32": (RED, "-"),
        "products in float32, updates and state in float64": (ORANGE, "--"),
        "float64, weights changed by 1e-08": ("0.55", "-"),
        "float64, weights changed by 1e-12": ("0.55", "--"),
        "float64, weights changed by 1e-15": (BLUE, "-"),
    }
    with figure(IMAGES / "growth.png", 9, 3.6) as drawing:
        axes = drawing.subplots(1, 2, sharey=True)
        for ax, (rung, title) in zip(axes, {"rung0": "rung 0, the full system", "rung2": "rung 2"}.items(), strict=True):
            for name, (colour, style) in lines.items():
                errors = rows[rung, name]
                tokens = [chunk * place for place in range(1, len(errors))]
                ax.plot(tokens, errors[1:], style, color=colour, label=name, linewidth=1.4)
            ax.set(title=title, yscale="log", xlabel="tokens before")
        axes[0].set_ylabel("relative distance from float64")
        axes[1].legend(fontsize=7)


def kernels() -> None:
    """Speed of kernels by the number of tokens, the chunk and the width; forward, and forward and backward."""
    record = json.loads((RESULTS / "bench" / "kernels-shapes-h100.json").read_text())
    lines = {
        ("rung0", "kvbind"): ("rung 0", RED, "o-"),
        ("rung2", "kvbind"): ("rung 2", BLUE, "o-"),
        ("rung6", "kvbind"): ("rung 6", GREEN, "o-"),
        ("rung2", "pytorch"): ("rung 2, PyTorch", BLUE, "s:"),
        ("softmax_attention", "sdpa"): ("softmax attention", ORANGE, "s--"),
    }
    for part, axis, label in (
        ("lengths", "tokens", "tokens"),
        ("chunks", "chunk", "tokens in a chunk"),
        ("widths", "width", "width of a head, with 1536 / width heads"),
    ):
        rows = [row for row in record["rows"] if row["what"] == part]
        if not rows:
            continue
        with figure(IMAGES / f"kernels-{part}.png", 9, 3.4) as drawing:
            axes = drawing.subplots(1, 2)
            for ax, (name, title) in zip(
                axes, {"forward": "forward", "training": "forward and backward"}.items(), strict=True
            ):
                for (rung, by), (called, colour, style) in lines.items():
                    found = [row for row in rows if (row["name"], row["by"]) == (rung, by) and name in row]
                    points = sorted((row[axis], row[name]["mtok_per_s"]) for row in found)
                    if points:
                        ax.plot(*zip(*points, strict=True), style, color=colour, label=called, linewidth=1.4, markersize=4)
                    graphs = sorted(
                        (row[axis], row[name]["graph_mtok_per_s"]) for row in found if row[name]["graph_seconds"]
                    )
                    if graphs and by == "kvbind":
                        ax.plot(*zip(*graphs, strict=True), color=colour, label=f"{called}, graph", linewidth=0.9, alpha=0.7)
                ax.set(title=title, xscale="log", yscale="log", xlabel=label)
                ticks = sorted({row[axis] for row in rows})
                ticks = ticks[:: 1 + len(ticks) // 8]
                ax.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks], minor=False)
                ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
                ax.minorticks_off()
            axes[0].set_ylabel("million tokens per second")
            handles, called_lines = axes[0].get_legend_handles_labels()
            drawing.legend(handles, called_lines, loc="outside right center", fontsize=8.5)


def scenes() -> None:
    """Procedural scenes, one per row, eight views each."""
    from PIL import Image

    from kvbind.tasks.views.procedural import Cameras, make_cameras, make_scenes
    from kvbind.tasks.views.raycast import render

    count, views, side = 4, 8, 128
    c2w, intrinsics = make_cameras("train", count, views, (side, side), Cameras(sector=360))
    pictures = render(make_scenes("train", count), c2w, intrinsics, (side, side), samples=3)
    sheet = pictures.permute(0, 3, 1, 4, 2).reshape(count * side, views * side, 3)
    write_png(IMAGES / "views-scenes.png", Image.fromarray(sheet.numpy()))


def cameras() -> None:
    """A camera in the world, seen from another one, and what it sees: the conventions of view synthesis."""
    from kvbind.models.lact_nvs import project
    from kvbind.tasks.views.orbit import look_at

    up = torch.tensor([0.0, 0, 1])
    width, height, focal = 12, 8, 11.0
    fxfycxcy = torch.tensor([focal, focal, width / 2, height / 2])
    camera = look_at(torch.tensor([-3.0, 0.4, 1.0]), torch.tensor([0.0, 0, 0.2]), up)
    viewer = look_at(torch.tensor([-4.6, -5.6, 3.4]), torch.tensor([-1.35, 0, 0.15]), up)
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5])] * 3)
    edges = [(i, j) for i in range(8) for j in range(i) if (corners[i] - corners[j]).norm() < 1.1]

    def seen(points: torch.Tensor, pose: torch.Tensor, intrinsics: torch.Tensor) -> list[list[float]]:
        return project(points, pose, intrinsics)[0].tolist()

    with figure(IMAGES / "views-cameras.png", 9.5, 3.9) as drawing:
        world, image = drawing.subplots(1, 2, width_ratios=(1.25, 1))
        flat = torch.tensor([1.0, 1, 0, 0])

        def line(points: torch.Tensor, **style: object) -> None:
            world.plot(*zip(*seen(points, viewer, flat), strict=True), **style)

        def at(point: torch.Tensor) -> list[float]:
            return seen(point[None], viewer, flat)[0]

        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # lines end where a word begins
        for i, j in edges:
            line(corners[[i, j]], color="0.45", linewidth=1.2)
        for axis, name in enumerate("xyz"):
            end = torch.zeros(3)
            end[axis] = 1.25
            world.annotate("", at(end), at(torch.zeros(3)), arrowprops={"arrowstyle": "->", "color": "0.65"})
            world.text(*at(end * 1.08), name, color="0.4", fontsize=9, bbox=clear, ha="center", va="center")
        centre, turn = camera[:3, 3], camera[:3, :3]
        places = [(0, 0), (width, 0), (width, height), (0, height)]
        frame = torch.tensor([[(u - width / 2) / focal, (v - height / 2) / focal, 1.0] for u, v in places])
        plane = centre + 1.1 * frame @ turn.T
        line(torch.cat((plane, plane[:1])), color=BLUE, linewidth=1.2)
        for corner in plane:
            line(torch.stack((centre, corner)), color=BLUE, linewidth=0.7)
        for axis, (name, colour) in enumerate({"x right": RED, "y down": GREEN, "z forward": ORANGE}.items()):
            end = centre + (0.85, 0.85, 1.7)[axis] * turn[:, axis]
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8}
            world.annotate("", at(end), at(centre), arrowprops=arrow)
            world.text(
                *at(end + (0.2, 0.14, -0.55)[axis] * turn[:, axis]),
                name,
                color=colour,
                fontsize=9,
                ha="center",
                va="center",
                bbox=clear,
            )
        world.text(*at(centre - 0.35 * turn[:, 0]), "camera", color=BLUE, fontsize=9, ha="right")
        world.set(title="c2w: the camera's axes and centre in the world", xticks=[], yticks=[], aspect="equal")
        world.invert_yaxis()
        world.margins(0.12, 0.16)
        for side in world.spines.values():
            side.set_visible(False)

        for i, j in edges:
            image.plot(*zip(*seen(corners[[i, j]], camera, fxfycxcy), strict=True), color="0.45", linewidth=1.2)
        columns, rows = torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy")
        image.plot(columns.flatten(), rows.flatten(), ".", color="0.75", markersize=2.5)
        image.plot(width / 2, height / 2, "+", color=ORANGE, markersize=9, markeredgewidth=1.8)
        image.text(width / 2 + 0.2, height / 2 - 0.2, "(cx, cy)", color=ORANGE, fontsize=9)
        image.plot(2.5, 1.5, "o", color=BLUE, markersize=4)
        image.text(2.9, 1.6, "pixel in row 1, column 2:\nray through (2.5, 1.5)", color=BLUE, fontsize=8, va="center")
        image.set(
            title="pixels: u to the right, v down", xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="u",
            ylabel="v", xticks=range(width + 1), yticks=range(height + 1),
        )  # fmt: skip


def views(path: Path) -> None:
    """Time and memory of view synthesis by the number of input views, beside full attention."""
    rows = json.loads(path.read_text())["rows"]
    models = {"LaCT": ("fast weights", BLUE, "o-"), "full attention": ("full attention", ORANGE, "s--")}
    panels = {
        "read_seconds": ("reading a scene", "seconds", 1.0),
        "frames_per_second": ("rendering", "frames per second", 1.0),
        "scene_bytes": ("kept of a scene", "GiB", 2.0**30),
        "read_bytes": ("peak while reading", "GiB", 2.0**30),
    }
    ticks = sorted({row["views"] for row in rows})
    with figure(IMAGES / f"{path.stem}.png", 11.5, 3.2) as drawing:
        axes = drawing.subplots(1, 4)
        for ax, (name, (title, unit, scale)) in zip(axes, panels.items(), strict=True):
            for model, (called, colour, style) in models.items():
                points = [(row["views"], row[name] / scale) for row in rows if row["model"] == model and row["fits"]]
                ax.plot(*zip(*points, strict=True), style, color=colour, label=called, linewidth=1.4, markersize=4)
                if too_many := [row["views"] for row in rows if row["model"] == model and not row["fits"]]:
                    ax.axvline(min(too_many), color=colour, linestyle=":", linewidth=1.2, label=f"{called}: does not fit")
            ax.set(title=title, xscale="log", yscale="log", xlabel="input views", ylabel=unit)
            ax.set_xticks(ticks, [str(x) if i % 2 == 0 else "" for i, x in enumerate(ticks)], minor=False)
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.minorticks_off()
        axes[3].axhline(ACCELERATORS["h100"].memory / 2**30, color="0.5", linestyle=":", linewidth=1.2)
        axes[3].annotate("an H100's memory", (ticks[0], ACCELERATORS["h100"].memory / 2**30), xytext=(0, 3),
                         textcoords="offset points", fontsize=8, color="0.4")  # fmt: skip
        axes[1].set_ylim(bottom=10)  # the same work takes fast weights up to 1.5 times as long: no more than that shows
        shared = [limit for ax in axes[2:] for limit in ax.get_ylim()]
        for ax in axes[2:]:
            ax.set_ylim(min(shared), max(shared))
        axes[0].legend(fontsize=8)


def ladder(path: Path, name: str) -> None:
    """A table's quality by row, the paper's and ours."""
    from kvbind.experiments.outcomes.plots import quality_figure
    from kvbind.experiments.report.table_contents import read_outcome

    quality_figure(IMAGES / name, read_outcome(json.loads(path.read_text())))


def capacity(path: Path) -> None:
    """Recall by bytes of state."""
    from kvbind.experiments.studies.capacity_findings import CapacityPoint, draw

    curves = json.loads(path.read_text())["curves"]
    draw(IMAGES / "capacity.png", {one["name"]: [CapacityPoint(**point) for point in one["points"]] for one in curves})


def scaling(path: Path) -> None:
    """Training speed by the number of GPUs, sharded and with one sequence cut over all, beside speed that grows with it."""
    rows = [row for row in json.loads(path.read_text())["rows"] if "tokens_per_second" in row]
    sharded = [row for row in rows if row["what"] == "fsdp"]
    cut = [row for row in rows if row["what"] == "sequence"]
    lengths = sorted({row["length"] for row in cut})
    panels = [("one sequence on each GPU", [sharded])] if sharded else []
    panels += [("one sequence cut over all GPUs", [[r for r in cut if r["length"] == n] for n in lengths])] if cut else []
    numbers = sorted({row["gpus"] for row in rows})
    with figure(IMAGES / f"{path.stem}.png", 4.7 * len(panels), 3.4) as drawing:
        axes = drawing.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (title, series) in zip(axes, panels, strict=True):
            fewest = [min(line, key=lambda row: row["gpus"]) for line in series]
            best = max(row["tokens_per_second"] / row["gpus"] for row in fewest)
            wide = 0.8 / len(series)
            # side by side, as speeds of several lengths are nearly the same
            for i, line in enumerate(series):
                length = line[0]["length"] // 1024
                places = [numbers.index(row["gpus"]) + (i - (len(series) - 1) / 2) * wide for row in line]
                speeds = [row["tokens_per_second"] / 1000 for row in line]
                label = f"{length}k tokens" if length < 1024 else f"{length // 1024}M tokens"
                ax.bar(places, speeds, 0.9 * wide, color=mpl.colormaps["viridis"]((i + 0.5) / len(series)), label=label)
            for place, number in enumerate(numbers):
                label = None if place else f"{best / 1000:.0f}k tokens/s for each GPU"
                ax.plot(
                    [place - 0.45, place + 0.45], [best * number / 1000] * 2, "--", color="0.3", linewidth=1.2, label=label
                )
            ax.set(title=title, xlabel="GPUs")
            ax.set_xticks(range(len(numbers)), [str(n) for n in numbers])
            ax.grid(visible=False, axis="x")
            ax.legend(fontsize=8, loc="upper left")
        axes[0].set_ylabel("thousand tokens per second")


def operators() -> None:
    """Token-mixing matrices of all named systems, of the ladder and of the paper's controls, on random operands."""
    from kvbind.experiments.theorems import SETTINGS, check, draw_operators, inner_loops

    setting = SETTINGS["smoke"]
    loops = {name: spec for name, spec in inner_loops(setting.chunk).items() if not name.endswith("one step")}
    draw_operators(IMAGES / "operators.png", {name: check(spec, setting, 0) for name, spec in loops.items()})


def vision() -> None:
    """Speed and memory of ViTTT-B by the size of the images, beside a ViT-B."""
    rows = json.loads((RESULTS / "bench" / "vision-h100.json").read_text())["rows"]
    models = {"vittt_base": ("ViTTT-B", BLUE, "o-"), "vit_base_patch16_224": ("ViT-B", ORANGE, "s--")}
    panels = {
        "forward": ("forward", "images per second", 1.0),
        "training": ("training", "images per second", 1.0),
        "forward_bytes": ("forward", "MiB per image", 2.0**20),
        "training_bytes": ("training", "MiB per image", 2.0**20),
    }
    sizes = sorted({row["size"] for row in rows})
    with figure(IMAGES / "vision.png", 11.5, 3.2) as drawing:
        axes = drawing.subplots(1, 4)
        for ax, (name, (title, unit, scale)) in zip(axes, panels.items(), strict=True):
            for model, (called, colour, style) in models.items():
                points = [(row["size"], row[name] / scale) for row in rows if row["model"] == model]
                ax.plot(*zip(*points, strict=True), style, color=colour, label=called, linewidth=1.4, markersize=4)
            ax.set(title=title, xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel=unit)
            ax.set_xticks(sizes, [str(size) for size in sizes], minor=False)
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.minorticks_off()
        axes[0].legend(fontsize=8)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    visibility()
    kernels_training()
    decoding()
    growth()
    ladder(RESULTS / "table2-language-small" / "results.json", "ladder.png")  # the README's first picture
    capacity(RESULTS / "capacity-small-cpu" / "results.json")
    if (RESULTS / "bench" / "kernels-shapes-h100.json").is_file():
        kernels()
    scenes()
    cameras()
    operators()
    vision()
    views(RESULTS / "bench" / "views-h200.json")
    for name in ("scaling-2-h200", "scaling-h200"):
        scaling(RESULTS / "bench" / f"{name}.json")
    for drawn in IMAGES.glob("*.svg"):  # beside some of the PNGs, larger and the same
        drawn.unlink()
