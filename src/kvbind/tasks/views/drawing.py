"""Batches: which scenes, which of their views, and in which order; resumed at the exact batch.

A batch is a function of the run's seed and its number alone, so that a position is that number, and any number of processes
may read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kvbind.models.lact_nvs.cameras import mean_frame
from kvbind.tasks.reading import read_with
from kvbind.tasks.views.config import ViewsDataConfig
from kvbind.tasks.views.scenes import SceneSource
from kvbind.train.ranks import WHOLE, Share

Batch = dict[str, Any]
"""Views of B scenes: `image`, `c2w`, `fxfycxcy` of the V inputs and `target_image`, `target_c2w`, `target_fxfycxcy` of the
targets, each as `kvbind.tasks.views.scenes.SceneViews` has it behind a batch axis; and `number`, the batch's own, an int."""


@lru_cache(maxsize=2)
def scene_order(chunks: tuple[int, ...], window: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch goes through scenes: chunks in random order, scenes shuffled among `window` chunks."""
    rng = np.random.default_rng((seed, epoch))
    starts = np.concatenate(([0], np.cumsum(chunks)))
    shuffled = rng.permutation(len(chunks))
    parts = []
    for begin in range(0, len(chunks), window):
        together = [np.arange(starts[i], starts[i + 1]) for i in shuffled[begin : begin + window]]
        parts.append(rng.permutation(np.concatenate(together)))
    return np.concatenate(parts)


def draw_views(rng: np.random.Generator, count: int, wanted: int, span: int) -> list[int]:
    """`wanted` different views of a scene's `count`, in random order, out of `span` consecutive ones (0: out of all)."""
    length = min(span, count) if span else count
    first = int(rng.integers(count - length + 1))
    return [first + int(i) for i in rng.permutation(length)[:wanted]]


@dataclass(eq=False)
class Batches(Dataset[Batch]):
    """Training batches by their number.

    Attributes:
        source: where scenes come from.
        data: how views are drawn.
        seed: of every choice.
        share: which rows of a batch are read.
    """

    source: SceneSource
    data: ViewsDataConfig
    seed: int
    share: Share = WHOLE

    def __getitem__(self, number: int) -> Batch:
        rows = []
        for row in self.share.rows(self.data.batch):
            scene = self.scene(number * self.data.batch + row)
            rng = np.random.default_rng((self.seed, number, row))
            rows.append((scene, draw_views(rng, self.source.count(scene), self.data.views, self.data.span)))
        return collate(self.source, self.data, rows, number)

    def scene(self, place: int) -> int:
        """The scene at a place of the endless order; a scene that is too short is replaced by the one behind it.

        Raises:
            ValueError: a scene with fewer views than asked for, or no other.
        """
        scenes = len(self.source)
        for following in range(place, place + scenes):
            epoch, at = divmod(following, scenes)
            scene = int(scene_order(tuple(self.source.chunks), self.data.window, self.seed, epoch)[at])
            if long_enough(self.source, scene, self.data):
                return scene
        raise ValueError(
            f"data.source must have a scene of at least {self.data.views} views; {self.source.what} has none "
            "(data.skip_short leaves out the others)"
        )


def long_enough(source: SceneSource, scene: int, data: ViewsDataConfig) -> bool:
    """Whether a scene has as many views as are asked for.

    Raises:
        ValueError: it has not, and such scenes are not to be skipped.
    """
    count = source.count(scene)
    if count < data.views and not data.skip_short:
        raise ValueError(
            f"data.inputs + data.targets must be at most the views of each scene; {source.name(scene)} has {count}, and "
            f"{data.inputs} + {data.targets} are asked for (data.skip_short=true leaves such scenes out)"
        )
    return count >= data.views


def collate(source: SceneSource, data: ViewsDataConfig, rows: list[tuple[int, list[int]]], number: int) -> Batch:
    """Views of some scenes as a batch, in the coordinates that `data.normalize` asks for.

    Args:
        source: of the scenes.
        data: how they are read.
        rows: scenes and their views, inputs first.
        number: of the batch.
    """
    read = [source.read(scene, views) for scene, views in rows]
    image, c2w, fxfycxcy = (torch.stack([one[key] for one in read]) for key in ("image", "c2w", "fxfycxcy"))
    if data.normalize == "mean":
        c2w = mean_frame(c2w[:, : data.inputs]).normalize(c2w)
    batch: Batch = {"number": number}
    for name, x in (("image", image), ("c2w", c2w), ("fxfycxcy", fxfycxcy)):
        batch[name], batch[f"target_{name}"] = x[:, : data.inputs], x[:, data.inputs :]
    return batch


def load_batches(batches: Batches, workers: int, position: dict[str, Any] | None) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Endless batches from `position` on, each with the position behind it, read in this process or in `workers` others.

    Of the batches, those of the share; the position is behind those of the other ranks' shares that belong to the same turn.
    """
    turns = batches.share.turns
    begin = position["next"] if position else 0
    numbers = itertools.count(begin + batches.share.turn, turns)
    pinned = workers > 0 and torch.cuda.is_available()
    loader = read_with(workers, batches, batch_size=None, sampler=numbers, pin_memory=pinned)
    for behind, batch in zip(itertools.count(begin + turns, turns), loader, strict=False):
        yield batch, {"next": behind}


def evaluation_batches(source: SceneSource, data: ViewsDataConfig) -> Iterator[Batch]:
    """The same held-out views every time: of scenes spread evenly over all of them.

    Raises:
        ValueError: as `Batches.scene`.
    """
    spread = np.linspace(0, len(source) - 1, min(data.evaluation_scenes, len(source))).round().astype(int)
    scenes = [int(scene) for scene in np.unique(spread) if long_enough(source, int(scene), data)]
    if not scenes:
        raise ValueError(
            f"the held-out scenes must have at least {data.views} views; of those to evaluate on, {source.what} has none "
            "that has"
        )
    rows = [
        (scene, draw_views(np.random.default_rng(scene), source.count(scene), data.views, data.span)) for scene in scenes
    ]
    size = data.evaluation_batch or data.batch
    for number, begin in enumerate(range(0, len(rows), size)):
        yield collate(source, data, rows[begin : begin + size], number)
