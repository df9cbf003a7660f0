"""A model of any family from its folder, as its `save_pretrained` left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvbind.files import blaming, inside, read_fields, read_tensors, shortened
from kvbind.models.families import family_of
from kvbind.models.loading import configured, load_into
from kvbind.models.saving import CONFIG, GENERATION, weight_files, without_bars


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
