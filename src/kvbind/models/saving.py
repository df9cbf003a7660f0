"""Models in folders: those of this library read from safetensors alone, and written without a word.

A folder may be from elsewhere. Nothing in it is run, no file outside of it is read, and weights that do not fit the
configuration are refused before anything of its sizes is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from kvbind.files import blaming, check_links, check_regular, inside, read_fields, read_shapes, shortened
from kvbind.models.auto import NotCopied
from kvbind.models.loading import check_layers

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        ValueError: none, an index that is no index, or a file that leaves the folder.
        OSError: a file that cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [inside(folder, WEIGHTS)]
    if (folder / INDEX).is_file():
        return index_parts(inside(folder, INDEX))
    raise ValueError(f"folder must hold {WEIGHTS}, or {INDEX} and its parts; {str(folder)!r} has neither")


def index_parts(index: Path) -> list[Path]:
    """The files beside an index that hold the weights it lists.

    Args:
        index: such as `model.safetensors.index.json`.

    Raises:
        ValueError: a file that is no index, or one that names a file that leaves the folder.
        OSError: a file that cannot be read.
    """
    places = read_fields(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} must have a weight_map from parameters to files; got {shortened(places)}")
    return [check_regular(inside(index.parent, name, index)) for name in sorted(set(places.values()))]


def check_model_folder(folder: Path) -> None:
    """Refuse a model's folder in which anything that transformers would read is damaged or leaves it.

    Raises:
        ValueError: a link or an index that leads elsewhere, JSON or safetensors that are none; the message names the file.
        OSError: a file that cannot be read.
    """
    check_links(folder)
    fields = {
        name: read_fields(folder / name, wide=False) for name in (CONFIG, GENERATION, ADAPTER) if (folder / name).exists()
    }
    base = fields.get(ADAPTER, {}).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER} must name its base model by a text; got {shortened(base)}")
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        parameters = sum(len(read_shapes(path)) for path in weight_files(folder))
        check_layers(folder, fields.get(CONFIG), parameters)
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        facts = read_fields(folder / INDEX).get("metadata")
        if not isinstance(facts, dict):  # transformers reads it, and adds to it
            raise ValueError(f"{folder / INDEX} must have metadata, a mapping; got {shortened(facts)}")


class FromFolder(NotCopied):
    """What models of transformers do beside their `from_pretrained`: look at a folder before anything of it is opened."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As transformers', from safetensors alone unless `use_safetensors=False` is given.

        Raises:
            ValueError: a folder as `check_model_folder` refuses it.
        """
        folder = (
            None
            if pretrained_model_name_or_path is None
            else Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        )
        if folder is not None and folder.is_dir():
            check_model_folder(folder)
        kwargs.setdefault("use_safetensors", True)
        try:
            made: Self = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        except (ValueError, OSError, ImportError, MemoryError):
            raise
        except Exception:  # whatever types and sizes that are none lead to
            if folder is not None and (folder / CONFIG).is_file() and "config" not in kwargs:
                described: Any = cls
                with blaming(f"the configuration of {folder}", f"of a {cls.__name__}"), torch.device("meta"):
                    described(described.config_class.from_dict(read_fields(folder / CONFIG, wide=False)))
            raise
        return made


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for each model that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
