"""Inputs to look at models with, as a page shows them: cells of text, or the patches of pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Example = dict[str, Any]
"""As the page's script reads it: "unit", what a cell is, and

- of "kind" "text": "tokens", the text of each cell, with a blank behind each where "spaced";
- of "kind" "image": "panels", each a "caption" and a "source", and "grid", the rows and columns of cells in every panel.
"""

TEXT_CELLS, PICTURE_CELLS = 128, 256
"""Rows of a matrix at most; more tokens are gathered into cells."""


def text(tokens: Sequence[str], spaced: bool = False) -> tuple[Example, Tensor]:
    """A text, and the cell of each token, int64 `[T]`.

    Args:
        tokens: the text of each token.
        spaced: a blank stands between them.
    """
    cell = -(-len(tokens) // TEXT_CELLS)
    cells = ["".join(tokens[i : i + cell]) for i in range(0, len(tokens), cell)]
    unit = "token" if cell == 1 else f"cell of {cell} tokens"
    return {"kind": "text", "unit": unit, "tokens": cells, "spaced": spaced}, torch.arange(len(tokens)) // cell


def pictures(panels: Sequence[tuple[str, Tensor]], grid: tuple[int, int]) -> tuple[Example, Tensor]:
    """Pictures, and the cell of each patch, int64 `[T]`.

    Args:
        panels: a caption and the pixels, uint8 `[1 or 3, h, w]`, of each.
        grid: rows and columns of patches in each; their tokens follow each other row by row, picture by picture.
    """
    side = 1
    while len(panels) * -(-grid[0] // side) * -(-grid[1] // side) > PICTURE_CELLS:
        side += 1
    rows, columns = -(-grid[0] // side), -(-grid[1] // side)
    panel, y, x = torch.meshgrid(*(torch.arange(n) for n in (len(panels), *grid)), indexing="ij")
    cells = (panel * rows + y // side) * columns + x // side
    example = {
        "kind": "image",
        "unit": "patch" if side == 1 else f"cell of {side} x {side} patches",
        "panels": [{"caption": caption, "source": png(pixels)} for caption, pixels in panels],
        "grid": [rows, columns],
    }
    return example, cells.flatten()


def png(pixels: Tensor) -> str:
    """A picture, uint8 `[1 or 3, h, w]`, as a data URI."""
    plain = pixels.cpu().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(plain[..., 0] if plain.shape[-1] == 1 else plain).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
