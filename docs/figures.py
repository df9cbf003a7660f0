"""Draw the pictures of the documentation: `python docs/figures.py`."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import kvbind
from kvbind import InnerLoop, Linear

IMAGES = Path(__file__).parent / "images"


def visibility() -> None:
    """The token-mixing matrix of one linear fast layer under each visibility."""
    torch.manual_seed(0)
    tokens, chunk, width = 24, 6, 16
    q, k = (F.normalize(torch.rand(1, tokens, 1, width), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, 1, width)
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
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
    figure.savefig(IMAGES / "visibility.png", dpi=150)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    visibility()
