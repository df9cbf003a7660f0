"""`kvbind show images`: what a trained ViTTT attends to, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from kvbind.experiments import plotting
from kvbind.experiments.training.runs import load_model, open_run
from kvbind.tasks import images
from kvbind.tasks.images.attention import Attention, effective_attention
from kvbind.tasks.images.augment import normalized

BRANCHES = {"heads": "GLU heads", "conv": "convolution"}
"""What columns are called, by the fields of `Attention`."""

PLACES = ((0.25, 0.5), (0.5, 0.5), (0.75, 0.5))
"""Where the shown queries are unless said otherwise: down the image's middle, as fractions of its height and width."""

MOST_LAYERS = 4


def show(
    run: Path,
    out: Path,
    *,
    image: int = 0,
    places: Sequence[tuple[float, float]] = PLACES,
    layers: Sequence[int] = (),
) -> dict[str, Any]:
    """Draw, for some query patches of one held-out image, how much each layer's output there holds of every patch.

    Both branches are drawn as the linear attention that they are: `kvbind.linearize` of the operands that the layers have on
    that image, averaged over heads and channels, positive and negative.

    Args:
        run: folder of a training run of the task "images".
        out: PNG to write.
        image: number of the held-out image.
        places: of the queries, as fractions of the image's height and width.
        layers: to draw, from 0; up to `MOST_LAYERS`, spread over the depth, where none is named.

    Returns:
        "class" and "predicted", the image's class and what the model takes it for, by name; "layers"; "queries", the row and
        column of each query's patch in the first drawn layer.

    Raises:
        ValueError: a run of another task or without a checkpoint, or an image, place or layer that does not exist.
    """
    named, config = open_run(run)
    if named != "images":
        raise ValueError(f"run must be one of task 'images'; {str(run)!r} is one of {named!r}")
    for place in places:
        if not all(0 <= x < 1 for x in place):
            raise ValueError(f"places must be fractions of the height and the width, from 0 and below 1; got {place}")
    task = images.Task(config, training=False)
    model = load_model(run, task).vittt
    pixels, label = task.held_out_image(image)
    x = normalized(pixels[None], config.data.mean, config.data.std)[0]
    drawn = list(layers) or spread(len(model.mixers), MOST_LAYERS)
    found = effective_attention(model, x, drawn)
    with torch.no_grad():
        predicted = int(model(x[None]).argmax())
    answer = {"class": task.names[label], "predicted": task.names[predicted], "layers": drawn}
    draw(out, pixels, found, places, f"class {answer['class']}, predicted {answer['predicted']}")
    return answer | {"queries": [patch_at(found[0].grid, place) for place in places]}


def read_place(text: str) -> tuple[float, float]:
    """A place from "Y,X".

    Raises:
        ValueError: other text.
    """
    try:
        y, x = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(f"at must be two fractions such as 0.5,0.25; got {text!r}") from error
    return y, x


def spread(count: int, most: int) -> list[int]:
    """Up to `most` numbers from 0 to `count - 1`, first and last included, evenly apart."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def patch_at(grid: tuple[int, int], place: tuple[float, float]) -> tuple[int, int]:
    """Row and column of the patch at a place."""
    return int(place[0] * grid[0]), int(place[1] * grid[1])


def draw(path: Path, pixels: Tensor, layers: Sequence[Attention], places: Sequence[tuple[float, float]], title: str) -> None:
    """One row per query: the image with the query's patch, then each layer's two branches.

    Args:
        path: PNG to write.
        pixels: uint8 `[C, H, W]`.
        layers: their attention.
        places: of the queries.
        title: above the image.
    """
    columns = 1 + len(BRANCHES) * len(layers)
    shown = pixels.permute(1, 2, 0).numpy()
    with plotting.figure(path, 1.35 * columns, 1.35 * len(places) + 0.95) as fig:
        axes = np.atleast_2d(fig.subplots(len(places), columns, squeeze=False))
        for row, place in zip(axes, places, strict=True):
            picture(row[0], shown)
            mark(row[0], patch_at(layers[0].grid, place), layers[0].grid, shown.shape[:2])
            cells = ((layer, branch) for layer in layers for branch in BRANCHES)
            for ax, (layer, branch) in zip(row[1:], cells, strict=True):
                query = patch_at(layer.grid, place)
                weights = layer.of(branch, query[0] * layer.grid[1] + query[1]).numpy()
                heat(ax, weights)
                mark(ax, query, layer.grid, layer.grid)
                if branch == "conv":
                    mark(ax, query, layer.grid, layer.grid, around=1)
        axes[0, 0].set_title(title.replace(", ", "\n"), fontsize=8.5)
        for i, layer in enumerate(layers):
            for j, word in enumerate(BRANCHES.values()):
                axes[0, 1 + len(BRANCHES) * i + j].set_title(f"layer {layer.layer}\n{word}", fontsize=8.5)
        fig.supxlabel(
            "How much the output at the outlined patch holds of each patch's effective value: red positive, blue negative, "
            "each panel to its own scale.\n"
            "The convolution compares the 3 x 3 patches around the query (dashed) with those around every other patch.",
            fontsize=8.5, color=plotting.MUTED,
        )  # fmt: skip


def picture(ax: Axes, pixels: NDArray[np.uint8]) -> None:
    """An image, `[H, W, 1 or 3]`, without axes."""
    bare(ax)
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255)


def heat(ax: Axes, weights: NDArray[np.float32]) -> None:
    """Signed weights `[height, width]`, white at 0."""
    bare(ax)
    most = float(np.abs(weights).max()) or 1.0
    ax.imshow(weights, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")


def bare(ax: Axes) -> None:
    """No ticks, no grid."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color(plotting.GRID)


def mark(ax: Axes, patch: tuple[int, int], grid: tuple[int, int], size: tuple[int, ...], around: int = 0) -> None:
    """Outline a patch of a grid, or it and the patches `around` it, on a picture of `size` rows and columns."""
    height, width = size[0] / grid[0], size[1] / grid[1]
    corner = (patch[1] - around) * width - 0.5, (patch[0] - around) * height - 0.5
    sides = (2 * around + 1) * width, (2 * around + 1) * height
    style = (0, (2, 2)) if around else "-"
    ax.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=plotting.ORANGE, linewidth=1.6, linestyle=style))
