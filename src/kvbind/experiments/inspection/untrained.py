"""The named systems with random weights on a real text or picture: what their form alone does to tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbind import InnerLoop, systems
from kvbind.bench.harness.named_operands import NARROW, Leaves, arguments, draw_leaves, weights_of
from kvbind.bench.harness.operands import Size
from kvbind.experiments.inspection import examples
from kvbind.experiments.inspection.heads import look_at, spec_data
from kvbind.experiments.layer_calls import LayerCall
from kvbind.experiments.subjects.rows import LABELS
from kvbind.inner.systems import RUNGS
from kvbind.tasks.views.procedural import Cameras, make_cameras, make_scenes
from kvbind.tasks.views.raycast import render

TEXT = (
    "It was the best of times , it was the worst of times , it was the age of wisdom , it was the age of foolishness , it "
    "was the epoch of belief , it was the epoch of incredulity , it was the season of Light , it was the season of Darkness "
    ", it was the spring of hope , it was the winter of despair"
)
"""Charles Dickens, A Tale of Two Cities (1859): words that come again."""

GRID, SIDE = (8, 8), 32
"""Patches of the picture, and its side in pixels."""

SETTING = Size(1, GRID[0] * GRID[1], 2, 16)

HIDDEN, CHUNK, SEED = 24, 8, 0


@cache
def untrained_models() -> list[dict[str, Any]]:
    """Every named system and the rungs of its ladder, as the page's script reads them."""
    words, picture = TEXT.split()[: SETTING.tokens], scene()
    text, image = examples.text(words, spaced=True), examples.pictures([("a rendered scene", picture)], GRID)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of operations so small, several threads would wait for each other
    try:
        return [
            model(name, make(), *((image, patches(picture)) if make().visibility == "full" else (text, embedded(words))))
            for name, make in systems.SYSTEMS.items()
            # cells are of tokens that write once each
            if make().writes == 1 and make().window_size == 1
        ]
    finally:
        torch.set_num_threads(threads)


def model(name: str, spec: InnerLoop, shown: tuple[examples.Example, Tensor], tokens: Tensor) -> dict[str, Any]:
    """A system and what its ladder changes, on an example with its cells, whose tokens are vectors `[T, D]`."""
    example, cells = shown
    spec = spec if spec.chunk is None else spec.replace(chunk=min(spec.chunk, CHUNK))
    # here queries are keys, so that the key in the query's place would change nothing
    specs = systems.ladder(spec) | {"ascent": spec.replace(direction="ascent")}
    rows, seen = [], set()
    for i, (row, own) in enumerate(specs.items()):
        # a rung that changes nothing is the one above it, such as updating the last layer alone of a single one
        same = own if len(own.network.matrices) > 1 else own.replace(update="all")
        if same not in seen:
            seen.add(same)
            label = f"{i} {LABELS[row]}" if row in RUNGS else LABELS[row]
            rows.append({"name": row, "label": label, **look(own, tokens, cells)})
    chunks = f" Chunks of {spec.chunk} tokens." if spec.chunk else ""
    return {
        "title": name,
        "group": "named systems, random weights",
        "about": f"Random weights, so that only the form speaks; queries and keys are one projection of the tokens, so that "
        f"equal ones meet.{chunks} Rungs that change nothing here are left out.",
        "example": example,
        "rows": rows,
    }


def look(spec: InnerLoop, tokens: Tensor, cells: Tensor) -> dict[str, Any]:
    """One inner loop on tokens `[T, D]`."""
    call = as_call(spec, leaves_of(spec, tokens))
    return {**spec_data(spec), "layers": [{"name": "the only one", "heads": look_at(call, cells)}]}


def leaves_of(spec: InnerLoop, tokens: Tensor) -> Leaves:
    """Operands of `SETTING` whose queries, keys and values are projections of tokens `[T, D]`."""
    leaves = draw_leaves(spec, SETTING, torch.device("cpu"), hidden=HIDDEN, seed=SEED)
    generator = torch.Generator().manual_seed(SEED + 1)
    shape = (1, SETTING.tokens, SETTING.heads, SETTING.width)

    def projected() -> Tensor:
        matrix = torch.randn(tokens.shape[1], SETTING.heads * SETTING.width, generator=generator)
        return F.silu(tokens @ matrix / tokens.shape[1] ** 0.5).reshape(shape)

    leaves["k"] = leaves["q"] = F.normalize(projected(), dim=-1)
    return leaves | {"v": projected()}


def as_call(spec: InnerLoop, leaves: Leaves) -> LayerCall:
    """The call that operands make."""
    options = arguments(spec, leaves)
    if spec.loss == "squared" and not spec.token_lr:
        options["lr"] = 1 / (spec.chunk or SETTING.tokens)  # with 1, steps on several unit keys at once would grow
    q, k, v = (options.pop(name) for name in NARROW)
    return LayerCall(spec, weights_of(leaves), q, k, v, options)


def embedded(words: list[str]) -> Tensor:
    """A random vector for each different word, `[T, D]`."""
    different = sorted(set(words))
    vectors = torch.randn(len(different), 32, generator=torch.Generator().manual_seed(SEED))
    return vectors[[different.index(word) for word in words]]


def patches(picture: Tensor) -> Tensor:
    """The pixels of each patch of a picture `[3, h, w]`, standardized, `[T, D]`."""
    side = picture.shape[1] // GRID[0]
    cut = picture.float().unfold(1, side, side).unfold(2, side, side)
    flat = cut.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    return (flat - flat.mean()) / flat.std()


def scene() -> Tensor:
    """A view of a procedural scene, uint8 `[3, h, w]`."""
    c2w, intrinsics = make_cameras("held_out", 1, 1, (SIDE, SIDE), Cameras())
    return render(make_scenes("held_out", 1), c2w, intrinsics, (SIDE, SIDE), samples=2)[0, 0]
