"""Sources: where posed images come from, by the words of a configuration."""

from __future__ import annotations

from pathlib import Path

from kvbind.tasks.views.chunks import ViewChunks
from kvbind.tasks.views.config import PROCEDURAL, ViewsDataConfig
from kvbind.tasks.views.pool import ScenePool
from kvbind.tasks.views.posed_images import PosedImages
from kvbind.tasks.views.scenes import SceneSource, Split


def open_training(data: ViewsDataConfig) -> SceneSource:
    """The scenes to train on.

    Raises:
        ValueError: a source that does not exist, is of no known kind, or holds no scene to train on.
    """
    if data.source == PROCEDURAL:
        return ScenePool(data.procedural, "train", data.procedural.scenes, data.size)
    return open_files("data.source", data.source, None if data.held_out_source else "train", data)


def open_held_out(data: ViewsDataConfig) -> SceneSource:
    """The scenes to evaluate on.

    Raises:
        ValueError: as `open_training`.
    """
    where = data.held_out_source or data.source
    if where == PROCEDURAL:
        return ScenePool(data.procedural, "held_out", data.evaluation_scenes, data.size)
    if data.held_out_source:
        return open_files("data.held_out_source", where, None, data)
    return open_files("data.source", where, "held_out", data)


def open_files(argument: str, where: str, split: Split | None, data: ViewsDataConfig) -> SceneSource:
    """The scenes of one split of a folder or file.

    Args:
        argument: the configuration's key that names it, for errors.
        where: the folder or file.
        split: which; None for all.
        data: how they are read.

    Raises:
        ValueError: as `open_training`.
    """
    path = Path(where).expanduser()
    if not path.exists():
        raise ValueError(f"{argument} must be {PROCEDURAL!r}, or a folder or JSON file that exists; there is no {where!r}")
    kind = ViewChunks if ViewChunks.recognizes(path) else PosedImages
    found = kind.open(path, split, data.held_out, data.size, data.expanded_gib)
    if not len(found):
        raise ValueError(
            f"{argument} must hold scenes{f' for the split {split!r}' if split else ''}; {where!r} has none "
            "(data.held_out_source names other scenes to evaluate on)"
        )
    return found
