"""Batches of images: in an order that the seed decides, from any place in it, whoever reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kvbind.tasks.images.augment import Among
from kvbind.tasks.images.stores import InMemory, Readable
from kvbind.tasks.reading import read_with
from kvbind.train.ranks import WHOLE, Share

Batch = dict[str, Any]
"""`labels` int64 `[B]` and `images` uint8 `[B, C, H, W]`, or, of images held in memory, `rows` int64 `[B]`; in training also
`seed`, an int from which whatever is random about the batch is drawn, and of a part of a batch `among`, which part."""

Position = dict[str, Any]

MODES = {1: "L", 3: "RGB"}
"""PIL's names of images of so many channels."""


class Prepare(Protocol):
    """Makes an image of the task's size of one of any size."""

    def __call__(self, image: Image, seed: tuple[int, ...]) -> Image:
        """The image; `seed` decides whatever is random."""
        ...


class Order:
    """Every image once per epoch, in an order of the epoch's own; what a last batch lacks is left out.

    Args:
        images: how many there are.
        batch: how many make a batch.
        seed: of every order.

    Raises:
        ValueError: fewer images than a batch has.
    """

    def __init__(self, images: int, batch: int, seed: int) -> None:
        if images < batch:
            raise ValueError(f"data.batch must be at most the number of training images, {images}; got {batch}")
        self.images, self.batch, self.seed = images, batch, seed

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.images // self.batch

    def rows(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Endless batches from number `start` on, counted over all epochs: its epoch, and the images in it."""
        while True:
            epoch, within = divmod(start, self.per_epoch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images).tolist()
            for number in range(within, self.per_epoch):
                yield epoch, order[number * self.batch : (number + 1) * self.batch]
            start = (epoch + 1) * self.per_epoch

    def seed_of(self, number: int) -> int:
        """The seed of what is random about batch `number`."""
        return int(np.random.default_rng((self.seed, number, 1)).integers(2**62))


Place = tuple[int, int]
"""Epoch, and number of the image."""


class Reads(Dataset[tuple[Tensor, int]]):
    """Images read, prepared and turned into uint8 tensors, by place.

    Args:
        images: where they come from.
        prepare: what makes them all of one size.
        channels: 1 for grey, 3 for colour.
        seed: with a place, of whatever is random about an image.
    """

    def __init__(self, images: Readable, prepare: Prepare, channels: int, seed: int) -> None:
        self.images, self.prepare, self.channels, self.seed = images, prepare, channels, seed

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        epoch, index = place
        image = self.images.read(index).convert(MODES[self.channels])
        pixels = np.asarray(self.prepare(image, (self.seed, epoch, index)))
        tensor = torch.from_numpy(pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1).copy())
        return tensor, int(self.images.labels[index])


class Places(Sampler[list[Place]]):
    """An order as a `DataLoader` takes it.

    Args:
        order: the order.
        start: number of the first batch.
        every: how far the next batch is.
        among: which rows of a batch; None for all.
    """

    def __init__(self, order: Order, start: int, every: int = 1, among: Among | None = None) -> None:
        self.order, self.start, self.every, self.among = order, start, every, among

    def __iter__(self) -> Iterator[list[Place]]:
        for epoch, rows in itertools.islice(self.order.rows(self.start), 0, None, self.every):
            chosen = [rows[i] for i in self.among.rows] if self.among else rows
            yield [(epoch, row) for row in chosen]


def training_batches(
    images: InMemory | Reads,
    order: Order,
    workers: int,
    position: Position | None,
    share: Share = WHOLE,
    mixed: bool = False,
) -> Iterator[tuple[Batch, Position]]:
    """Endless batches, each with the position behind it; the same whatever the number of workers.

    Args:
        images: held in memory (batches are then rows alone), or read.
        order: of the images.
        workers: processes that read; 0 for none besides this one.
        position: where to start; None for the beginning.
        share: which batches, and which rows of them; positions are behind those of the other shares of the same turn.
        mixed: whether images get something of those before them, so that a part of a batch needs one more.
    """
    begin = position["batches"] if position else 0
    among = Among.of(share, order.batch, mixed) if share.parts > 1 else None
    places = Places(order, begin + share.turn, share.turns, among)
    batches: Iterator[Batch]
    if isinstance(images, InMemory):
        batches = ({"rows": torch.tensor([row for _, row in batch])} for batch in places)
    else:
        batches = loaded(images, places, workers)
    for number, batch in zip(itertools.count(begin, share.turns), batches, strict=False):
        part = {"among": among} if among else {}
        yield {**batch, "seed": order.seed_of(number + share.turn), **part}, {"batches": number + share.turns}


def evaluation_batches(
    images: InMemory | Reads, batch: int, workers: int, share: Share = WHOLE
) -> Iterator[tuple[Batch, bool]]:
    """All images once, in their own order, or a share of them; and whether each batch counts (`Share.of_items`)."""
    count = len(images.labels) if isinstance(images, InMemory) else len(images)
    chosen = list(share.of_items(torch.arange(count).split(batch)))
    counts = [counted for _, counted in chosen]
    batches: Iterator[Batch]
    if isinstance(images, InMemory):
        batches = ({"rows": rows} for rows, _ in chosen)
    else:
        batches = loaded(images, [[(0, row) for row in rows.tolist()] for rows, _ in chosen], workers)
    yield from zip(batches, counts, strict=True)


def loaded(images: Reads, places: Any, workers: int) -> Iterator[Batch]:
    """Batches of images that are read at `places`, a list of batches or a sampler of them."""
    for pixels, labels in read_with(workers, images, batch_sampler=places, pin_memory=torch.cuda.is_available()):
        yield {"images": pixels, "labels": labels}
