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

from kvbind.files import blaming, check_links, check_regular, inside, read_fields, read_shapes, read_tensors, shortened
from kvbind.models.auto import NotCopied
from kvbind.models.families import check_layers, configured, family_of, load_into

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

GENERATION, ADAPTER = "generation_config.json", "adapter_config.json"


def open_exported(folder: str | Path, device: torch.device | str = "cpu") -> Any:
    """A model of any family as its `save_pretrained` left it, in evaluation mode.

    Args:
        folder: with `config.json` and `model.safetensors`, or several such files and their index. Pickles are not looked at.
        device: where to put the parameters.

    Raises:
        ValueError: a folder that holds no such model, or a damaged one; the message names the file.
        OSError: a file that cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"folder must be one of a model, which holds {CONFIG}; got {str(folder)!r}")
    fields = read_fields(inside(folder, CONFIG), wide=False)
    kind = fields.get("model_type")
    if kind == "in_place_ttt":
        return _open_in_place(folder).to(device)
    weights = {name: x for path in weight_files(folder) for name, x in read_tensors(path, device)[0].items()}
    try:
        family = family_of(weights, folder)
    except ValueError as error:
        if not isinstance(kind, str):
            raise
        raise ValueError(
            f"folder must be one of a model of this library; {str(folder)!r} holds a {shortened(kind)} of transformers, of "
            "which kvbind in-place makes one with fast weights"
        ) from error
    if family.is_released(fields, weights):
        raise ValueError(
            f"folder must be one of a model of this library; {str(folder)!r} holds a released one (kvbind convert)"
        )
    with configured(folder, family.title, fields, weights):
        model, named = family.build(fields, weights, released=False)
    load_into(model, named, folder)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    if hasattr(model, "generation_config") and (folder / GENERATION).is_file():
        model.generation_config = type(model.generation_config).from_dict(
            read_fields(inside(folder, GENERATION), wide=False)
        )
    return model.eval()


def _open_in_place(folder: Path) -> Any:
    """A model with In-Place TTT, whose weights transformers gives to the model inside."""
    from kvbind.models.in_place import InPlaceForCausalLM

    with without_bars(), blaming(f"the weights of {folder}", "those of its configuration"):
        opened: Any = InPlaceForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
        model, found = opened
        differing = {name: sorted(found[f"{name}_keys"]) for name in ("missing", "unexpected") if found[f"{name}_keys"]}
        if differing:
            raise ValueError("; ".join(f"{name} {shortened(names, 400)}" for name, names in differing.items()))
    return model.eval()


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
