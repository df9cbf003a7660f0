"""Checkpoints of the released code turned into this library's, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from kvbind import files
from kvbind.files import inside, read_pickled, read_tensors
from kvbind.inner.value import check_choice
from kvbind.models.families import Family, family_of
from kvbind.models.loading import Fields, check_weights, configured, load_into
from kvbind.models.saving import index_parts, without_bars

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth", "checkpoint.pt", "checkpoint.pth")
"""The single files in which a folder may hold its weights, in the order in which they are looked for."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The indices of weights in several files."""

FIELD_FILES = ("config.json", "config.yaml", "config.yml")
"""Where a configuration is looked for, in that order."""

WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training code stores the weights beside other things."""

COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config.json")
"""Files that go along unchanged."""


def convert(
    source: str | Path,
    target: str | Path,
    to: Literal["kvbind", "released"] = "kvbind",
    config: str | Path | None = None,
) -> Path:
    """Convert a checkpoint of any of the three model families, which is told from its parameters.

    Args:
        source: a folder with weights (safetensors, `.bin`, `.pt` or `.pth`, in one file or several) and configuration, or a
            file of weights with the configuration (config.json or config.yaml) beside it.
        target: the folder to write, made where it is missing.
        to: "kvbind" from a released checkpoint, or "released" from one of this library's.
        config: the released configuration, where it is not beside the weights: a JSON or YAML file, or for ViTTT and view
            synthesis a published size by name (`kvbind.models.vittt.SIZES`, `kvbind.models.lact_nvs.PRESETS`). ViTTT needs
            none, as its weights say all sizes; then it is the full system, not one of the ablations (`ttt_loss_type`).

    Returns:
        `target`. To "kvbind": config.json, model.safetensors (several where it is large). To "released": config.json and
        model.safetensors of a language model, config.json and checkpoint.pth of ViTTT, config.yaml and model.pt of view
        synthesis, the weights of the latter two under the key "model". Tokenizer files of `source` go along; weights keep
        their dtype.

    Raises:
        FileNotFoundError: `source` lacks its configuration or weights.
        ValueError: `source` and `target` are one folder or one within the other; the checkpoint is of none of the families
            or of the target's kind already, its configuration is not supported by the target, or its weights do not fit its
            configuration.
    """
    check_choice("to", to, ("kvbind", "released"))
    source, target = Path(source), Path(target)
    folder = source if source.is_dir() else source.parent
    check_apart(source, folder, target)
    weights = read_weights(source)
    family = family_of(weights, source)
    fields = read_fields(folder, config, family)
    released = family.is_released(fields, weights)
    if released != (to == "kvbind"):
        wanted, found = ("released", "kvbind") if to == "kvbind" else ("kvbind", "released")
        raise ValueError(f"source must be a {wanted} checkpoint; {source} is {found}, of a {family.title}")

    copied = [inside(folder, path.name) for pattern in COPIED for path in sorted(folder.glob(pattern)) if path.is_file()]
    with configured(source, family.title, fields, weights):
        model, named = family.build(fields, weights, released)
    load_into(model, named, source)
    if to == "kvbind":
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        target.mkdir(parents=True, exist_ok=True)
        with without_bars():
            model.save_pretrained(target)
    else:
        write_released(target, family, *family.release(model))
    for path in copied:
        shutil.copy2(path, target / path.name)
    return target


def check_apart(source: Path, folder: Path, target: Path) -> None:
    """Raise `ValueError` where what is written would lie among what is read, whatever links lead there."""
    read, written = folder.resolve(), target.resolve()
    # a single file may be converted into a folder beside it
    within = written.is_relative_to(read) if source.is_dir() else written == read
    if within or read.is_relative_to(written):
        raise ValueError(f"target must be a folder apart from source; got {str(target)!r} for {str(source)!r}")


def read_weights(source: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, by name.

    Args:
        source: the folder or file.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file that holds something else.
    """
    if source.is_file():
        return _read_file(source)
    for name in WEIGHT_FILES[:1] + INDEX_FILES + WEIGHT_FILES[1:]:
        path = source / name
        if not path.exists():
            continue
        if name not in INDEX_FILES:
            return _read_file(inside(source, name))
        return {key: x for part in index_parts(inside(source, name)) for key, x in _read_file(part).items()}
    hint = "; those of a training run are in its folder 'model'" if (source / "model").is_dir() else ""
    raise FileNotFoundError(
        f"source must hold weights ({', '.join((*WEIGHT_FILES, *INDEX_FILES))}) beside a config.json or config.yaml; "
        f"{source} {'has none' if source.is_dir() else 'does not exist'}{hint}"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return read_tensors(path)[0]
        except ValueError as error:
            raise ValueError(f"source must hold weights in safetensors; {error}") from error
    try:
        held = read_pickled(path)
    except ValueError as error:
        raise ValueError(f"source must be a file of weights that torch.load reads safely; {error}") from error
    for _ in WRAPPERS:  # one may be inside another
        if isinstance(held, dict) and not any(isinstance(x, Tensor) for x in held.values()):
            held = next((held[name] for name in WRAPPERS if isinstance(held.get(name), dict)), held)
    if not isinstance(held, dict) or not any(isinstance(x, Tensor) for x in held.values()):
        found = files.shortened(list(held) if isinstance(held, dict) else type(held).__name__)
        raise ValueError(f"source must hold a state dict, alone or under {' or '.join(WRAPPERS)}; {path} has {found}")
    # what torch.compile and DistributedDataParallel put before every name
    return {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in check_weights(held, path).items()}


def read_fields(folder: Path, config: str | Path | None, family: Family) -> Fields | None:
    """A checkpoint's configuration as it stands; None where there is none.

    Args:
        folder: where the weights are.
        config: its file or name, or None to look in `folder`.
        family: whose names these are.

    Raises:
        ValueError: a file that holds no mapping, or an unknown name.
    """
    if config is None:
        path = next((inside(folder, name) for name in FIELD_FILES if (folder / name).is_file()), None)
    elif Path(config).is_file():
        path = Path(config)
    else:
        return family.named(str(config))
    return None if path is None else files.read_fields(path, wide=False)


def write_released(target: Path, family: Family, fields: Fields, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint as the released code reads it."""
    target.mkdir(parents=True, exist_ok=True)
    plain = {name: x.detach().contiguous() for name, x in weights.items()}
    path = target / family.weights_file
    if path.suffix == ".safetensors":
        save_file(plain, path, metadata={"format": "pt"})
    else:
        torch.save({"model": plain}, path)
    as_json = family.fields_file.endswith(".json")
    text = json.dumps(fields, indent=2) + "\n" if as_json else yaml.safe_dump(fields, sort_keys=False)
    (target / family.fields_file).write_text(text, encoding="utf-8")
