"""Draw the pictures of the documentation: `python docs/figures.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import kvbind
from kvbind import InnerLoop, Linear
from kvbind.experiments.figures import BLUE, GREEN, ORANGE, RED, figure

DOCS = Path(__file__).parent
IMAGES, RESULTS = DOCS / "images", DOCS.parent / "results"


def visibility() -> None:
    """The token-mixing matrix of one linear fast layer under each visibility."""
    torch.manual_seed(0)
    tokens, chunk, width = 24, 6, 16
    q, k = (F.normalize(torch.rand(1, tokens, 1, width), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, 1, width)
    drawing, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
    for ax, name in zip(axes, ("past", "token", "chunk", "full"), strict=True):
        spec = InnerLoop(network=Linear(), visibility=name, chunk=None if name == "full" else chunk)
        weights = {"out": torch.zeros(1, width, width)}
        matrix = kvbind.linearize(spec, weights, q, k, v).matrix()[0, 0]
        ax.imshow(matrix.where(matrix != 0, torch.nan), cmap="viridis", vmin=0, vmax=1)
        for edge in range(chunk, tokens, chunk):
            ax.axhline(edge - 0.5, color="0.6", linewidth=0.5)
            ax.axvline(edge - 0.5, color="0.6", linewidth=0.5)
        ax.set(title=name, xlabel="token that wrote", xticks=[], yticks=[])
    axes[0].set_ylabel("token that reads")
    drawing.savefig(IMAGES / "visibility.png", dpi=150)


def language_30m() -> None:
    """Training loss of four rungs on one H100, by tokens and by time."""
    colours = {"rung0": RED, "rung1": ORANGE, "rung2": BLUE, "rung6": GREEN}
    with figure(IMAGES / "language-30m.png", 9, 3.4) as drawing:
        by_tokens, by_time = drawing.subplots(1, 2, sharey=True)
        for rung, colour in colours.items():
            lines = (RESULTS / "language-30m" / f"{rung}.jsonl").read_text().splitlines()
            steps = [row for row in map(json.loads, lines) if "loss" in row]
            loss = torch.tensor([row["loss"] for row in steps])
            smooth = torch.stack([loss[max(0, i - 9) : i + 1].mean() for i in range(len(loss))])
            for ax, x in (
                (by_tokens, [row["step"] * 3 * 8192 / 1e6 for row in steps]),
                (by_time, [row["seconds"] for row in steps]),
            ):
                ax.plot(x, smooth, color=colour, label=rung.replace("rung", "rung "), linewidth=1.4)
        by_tokens.set(xlabel="million tokens (bytes)", ylabel="training loss, mean of 10 steps", ylim=(1.3, 3.5))
        by_time.set(xlabel="seconds, four runs at once")
        by_tokens.legend()


def decoding() -> None:
    """Time of one more token by the length of the prompt."""
    with figure(IMAGES / "decoding.png", 9, 3.2) as drawing:
        axes = drawing.subplots(1, 3)
        sources = {"tiny, 2 CPU cores": "decode-cpu", "125m, H100": "decode-125m-h100", "760m, H100": "decode-760m-h100"}
        for ax, (title, name) in zip(axes, sources.items(), strict=True):
            rows = json.loads((RESULTS / "bench" / f"{name}.json").read_text())["rows"]
            prompts = [row["prompt"] for row in rows]
            ax.plot(prompts, [1e3 * row["token_seconds"] for row in rows], "o-", color=BLUE, label="with the cache")
            ax.plot(prompts, [1e3 * row["reread_seconds"] for row in rows], "s--", color=ORANGE, label="prompt read again")
            ax.set(title=title, xscale="log", yscale="log", xlabel="tokens in the prompt")
        axes[0].set_ylabel("ms per token")
        axes[0].legend()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    visibility()
    language_30m()
    decoding()
